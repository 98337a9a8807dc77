"""Metrics by loops: divergences token by token, McNemar by counting outcomes, a bootstrap drawn picture by picture."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from typing import Any

import torch


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def kl(teacher: list[float], student: list[float]) -> float:
    """KL of the softmaxes of two rows of logits, in nats."""
    pairs = zip(log_softmax(teacher), log_softmax(student))
    return math.fsum(math.exp(p) * (p - q) for p, q in pairs)


def answer_rows(model: Any, batch: dict[str, torch.Tensor], shifted: bool) -> list[tuple[list[float], int]]:
    """(logits, reference token) of every answer token of a batch, row by row."""
    with torch.no_grad():
        logits = model(**batch).logits.double()
    out = []
    for row, labels in zip(logits, batch["labels"].tolist()):
        for t, label in enumerate(labels):
            if label != -100:
                out.append((row[t - 1 if shifted else t].tolist(), label))
    return out


def best(logits: list[float]) -> int:
    return max(range(len(logits)), key=logits.__getitem__)


def mcnemar(b: int, c: int) -> float:
    """Two-sided p: the share of all 2^(b+c) outcomes that are at least as uneven."""
    outcomes = [sum(o) for o in itertools.product((0, 1), repeat=b + c)]
    uneven = [abs(2 * k - b - c) >= abs(b - c) for k in outcomes]
    return float(Fraction(sum(uneven), len(uneven)))


def bootstrap(before: list[bool], after: list[bool], clusters: list[str], resamples: int, seed: int) -> list[float]:
    """Sorted differences of the mean, by drawing clusters with replacement."""
    groups: dict[str, list[int]] = {}
    for was, now, name in zip(before, after, clusters):
        groups.setdefault(name, []).append(int(now) - int(was))
    names, draw = sorted(groups), random.Random(seed)
    means = []
    for _ in range(resamples):
        drawn = [d for name in draw.choices(names, k=len(names)) for d in groups[name]]
        means.append(sum(drawn) / len(drawn))
    return sorted(means)
