"""Naive greedy MAP of a determinantal point process: every candidate's determinant, anew in every step."""

from __future__ import annotations

import torch
from torch import Tensor


def kernel(features: Tensor, relevance: Tensor | None = None) -> Tensor:
    """``r_i cos(F_i, F_j) r_j`` of one image, by loops. features [T, D], relevance [T]."""
    tokens = len(features)
    made = torch.zeros(tokens, tokens, dtype=torch.float64)
    scale = torch.ones(tokens, dtype=torch.float64)
    if relevance is not None:
        r = relevance.double()
        scale = (r - r.min() + 1e-6) / (r.max() - r.min() + 1e-6)
    for i in range(tokens):
        for j in range(tokens):
            a, b = features[i].double(), features[j].double()
            alike = (a @ b) / (a.norm() * b.norm()) if i != j else 1.0
            made[i, j] = scale[i] * scale[j] * alike
    return made


def greedy(matrix: Tensor, k: int) -> list[int]:
    """Add k times the token that makes the determinant of the chosen ones' kernel largest."""
    chosen: list[int] = []
    for _ in range(k):
        best, largest = -1, float("-inf")
        for j in range(len(matrix)):
            if j in chosen:
                continue
            subset = [*chosen, j]
            value = float(torch.linalg.det(matrix[subset][:, subset]))
            if value > largest:
                best, largest = j, value
        chosen.append(best)
    return sorted(chosen)
