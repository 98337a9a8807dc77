"""Masked forward KL by loops over samples, tokens and words."""

from __future__ import annotations

import math

from torch import Tensor


def softmax(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    raw = [math.exp((x - top) / temperature) for x in logits]
    return [x / sum(raw) for x in raw]


def masked_forward_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, shifted: bool) -> float:
    """``T^2`` times the mean KL(teacher || student) over answer tokens; logits [batch, tokens, words]."""
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            source = t - 1 if shifted else t
            if int(labels[row, t]) == -100 or source < 0:
                continue
            p = softmax(teacher[row, source].tolist(), temperature)
            q = softmax(student[row, source].tolist(), temperature)
            total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q) if a > 0)
            count += 1
    return total / count * temperature**2
