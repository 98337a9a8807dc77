"""Losses of distillation by loops over samples, tokens, words and channels."""

from __future__ import annotations

import math

from torch import Tensor


def softmax(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    raw = [math.exp((x - top) / temperature) for x in logits]
    return [x / sum(raw) for x in raw]


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b) if x > 0)


def masked(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, shifted: bool, kind: str, skew: float
) -> float:
    """``T^2`` times the mean divergence over answer tokens; logits [batch, tokens, words]."""
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            source = t - 1 if shifted else t
            if int(labels[row, t]) == -100 or source < 0:
                continue
            p = softmax(teacher[row, source].tolist(), temperature)
            q = softmax(student[row, source].tolist(), temperature)
            if kind == "forward":
                total += kl(p, q)
            elif kind == "reverse":
                total += kl(q, p)
            elif kind == "skewed":
                total += kl(p, [skew * x + (1 - skew) * y for x, y in zip(p, q)])
            else:
                total += kl(q, [(1 - skew) * x + skew * y for x, y in zip(p, q)])
            count += 1
    return total / count * temperature**2


def distance(student: Tensor, teacher: Tensor, kind: str) -> float:
    """Mean over tokens; states [tokens, width]."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        if kind == "mse":
            total += sum((a - b) ** 2 for a, b in zip(s, t)) / sum(b * b for b in t)
        else:
            dot = sum(a * b for a, b in zip(s, t))
            total += 1 - dot / math.sqrt(sum(a * a for a in s)) / math.sqrt(sum(b * b for b in t))
    return total / len(student)


def greedy_pairs(student: Tensor, teacher: Tensor) -> list[int]:
    """The nearest pair by L1, then the nearest of what is left, ..."""
    pairs = [
        (sum(abs(a - b) for a, b in zip(s, t)), i, j)
        for i, s in enumerate(student.tolist())
        for j, t in enumerate(teacher.tolist())
    ]
    found: dict[int, int] = {}
    for _, i, j in sorted(pairs):
        if i not in found and j not in found.values():
            found[i] = j
    return [found[i] for i in range(len(student))]
