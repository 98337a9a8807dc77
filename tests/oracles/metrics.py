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


def left_out(said: str, people: list[str]) -> Fraction:
    """VQA soft accuracy by leaving out one of the people after the other; texts are equal or not."""
    total = Fraction(0)
    for i in range(len(people)):
        others = people[:i] + people[i + 1 :]
        total += min(Fraction(sum(other == said for other in others), 3), Fraction(1))
    return total / len(people)


def edits(a: str, b: str) -> int:
    """Edit distance by trying everything."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def calibration_error(confidence: list[float], right: list[bool], bins: int) -> float:
    """Expected calibration error by sorting answers into bins one after the other."""
    total = 0.0
    for m in range(bins):
        inside = [i for i, c in enumerate(confidence) if m / bins < c <= (m + 1) / bins or (m == 0 and c == 0)]
        if inside:
            gap = sum(right[i] for i in inside) / len(inside) - sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(gap)
    return total
