"""FLAP (arXiv 2312.11983) the slow way: loops over tokens and channels, one unit at a time."""

from __future__ import annotations

import math


def wifv(x: list[list[float]], weights: list[float], matrix: list[list[float]]) -> list[float]:
    """Weighted variance of each input channel times the squared norm of its column. x: tokens of channels."""
    total = sum(weights)
    scores = []
    for j in range(len(x[0])):
        mean = sum(w * row[j] for w, row in zip(weights, x)) / total
        variance = sum(w * (row[j] - mean) ** 2 for w, row in zip(weights, x)) / total
        scores.append(variance * sum(row[j] ** 2 for row in matrix))
    return scores


def shares(scores: list[float]) -> list[float]:
    return [s / sum(scores) for s in scores]


def global_sizes(scores: list[list[float]], ratio: float, floor: float) -> list[int]:
    """Units that each block keeps when the lowest shares of all go, none below its floor. multiple = 1."""
    everything = sorted((s, block) for block, some in enumerate(scores) for s in shares(some))
    kept = [len(some) for some in scores]
    least = [max(1, math.ceil(floor * len(some))) for some in scores]
    gone, wanted = 0, ratio * sum(kept)
    for _, block in everything:
        if gone + 0.5 > wanted:
            break
        if kept[block] > least[block]:
            kept[block] -= 1
            gone += 1
    return kept
