"""Bicubic interpolation of a square table of vectors, one output at a time (Keys 1981, a = -0.75, clamped borders)."""

from __future__ import annotations

import math

import torch


def kernel(x: float, a: float = -0.75) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic(grid: torch.Tensor, after: int) -> torch.Tensor:
    """`grid` [before, before, D] as [after, after, D]; pixels are squares, values belong to their centres."""
    before = grid.shape[0]
    made = torch.zeros(after, after, grid.shape[2])
    for row in range(after):
        for column in range(after):
            y, x = ((place + 0.5) * before / after - 0.5 for place in (row, column))
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    inside = [min(max(place, 0), before - 1) for place in (i, j)]
                    made[row, column] += kernel(y - i) * kernel(x - j) * grid[inside[0], inside[1]]
    return made
