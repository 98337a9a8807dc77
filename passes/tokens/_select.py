"""Which visual tokens stay: batched tensor code, features in, positions out. Nothing here knows a model.

All functions work image by image (no statistic is taken over the batch) and break ties towards the first token, so
that a choice does not depend on what else is in the batch. Positions come sorted: kept tokens keep their order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

FLOOR = 1e-10  # smallest remaining variance; below it a token holds nothing that the chosen ones do not
OFFSET = 1e-6  # keeps the least relevant token's kernel row from being exactly zero


def dpp(features: Tensor, k: int, relevance: Tensor | None = None) -> Tensor:
    """Greedy MAP of a determinantal point process: tokens that are relevant and unlike each other.

    The kernel is ``K_ij = r_i cos(F_i, F_j) r_j`` with the relevance scaled to (0, 1] in each image, or ``r = 1``; each
    step adds the token that raises ``log det K_S`` most (CDPruner, arXiv 2506.10967; fast greedy MAP, arXiv 1709.05135:
    an incremental Cholesky factor, k steps of T k operations).

    Args:
        features: [images, T, D].
        k: tokens to keep, at most T.
        relevance: [images, T], larger stays rather; any scale and offset.

    Returns:
        Positions [images, k], ascending.
    """
    kernel = cosines(features)
    if relevance is not None:
        r = scaled(relevance.to(kernel.dtype))
        kernel = r[:, :, None] * kernel * r[:, None, :]
    images, tokens, _ = kernel.shape
    rows = torch.arange(images, device=kernel.device)
    left = kernel.diagonal(dim1=1, dim2=2).clamp_min(FLOOR).clone()
    factor = kernel.new_zeros(images, k, tokens)
    chosen = torch.empty(images, k, dtype=torch.long, device=kernel.device)
    for step in range(k):
        best = left.argmax(dim=1)
        chosen[:, step] = best
        variance = left[rows, best]
        done = factor[:, :step]
        column = kernel[rows, best] - (done[rows, :, best][:, None] @ done).squeeze(1)
        column = (column / variance.sqrt()[:, None]).masked_fill((variance <= FLOOR)[:, None], 0)
        factor[:, step] = column
        left = (left - column.square()).clamp_min(FLOOR)
        left = left.scatter(1, chosen[:, : step + 1], -math.inf)
    return chosen.sort(dim=1).values


def scaled(relevance: Tensor) -> Tensor:
    """Relevance [images, T] brought to (0, 1] in each image: ``(r - min + 1e-6) / (max - min + 1e-6)``."""
    low, high = relevance.amin(dim=1, keepdim=True), relevance.amax(dim=1, keepdim=True)
    return (relevance - low + OFFSET) / (high - low + OFFSET)


def random_positions(tokens: int, k: int, seed: int) -> Tensor:
    """k of `tokens` positions, ascending: one fixed draw for each count and seed, the same on every machine."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + tokens)
    return torch.randperm(tokens, generator=generator)[:k].sort().values


def grid_positions(shape: tuple[int, int], k: int) -> Tensor:
    """k positions, ascending, evenly spaced over a picture of `shape` (rows, columns), row by row.

    They lie on about ``sqrt(k rows / columns)`` evenly spaced rows and evenly within each row.
    """
    height, width = shape
    lines = bands(shape, k)
    ends = [(i * k) // lines for i in range(lines + 1)]
    rows = _even(height, lines).tolist()
    return torch.cat([y * width + _even(width, ends[i + 1] - ends[i]) for i, y in enumerate(rows)])


def bands(shape: tuple[int, int], k: int) -> int:
    """Over how many rows k places are spread so that they are about as far from each other in both directions."""
    height, width = shape
    return min(height, k, max(round(math.sqrt(k * height / width)), -(-k // width)))


def _even(length: int, k: int) -> Tensor:
    return ((torch.arange(k) * 2 + 1) * length) // (2 * k)


def divprune(features: Tensor, k: int) -> Tensor:
    """Max-min diversity: the token farthest from its nearest chosen one is chosen next (DivPrune, arXiv 2503.02175).

    Distances are ``1 - cos``. The first token is the one that is farthest from its nearest other.

    Args:
        features: [images, T, D]. k: tokens to keep, at most T.

    Returns:
        Positions [images, k], ascending.
    """
    distance = 1 - cosines(features)
    images, tokens, _ = distance.shape
    rows = torch.arange(images, device=features.device)
    others = torch.eye(tokens, dtype=torch.bool, device=features.device)
    chosen = torch.empty(images, k, dtype=torch.long, device=features.device)
    chosen[:, 0] = distance.masked_fill(others, math.inf).amin(dim=2).argmax(dim=1)
    nearest = torch.full_like(distance[:, 0], math.inf)
    for step in range(1, k):
        nearest = torch.minimum(nearest, distance[rows, chosen[:, step - 1]])
        nearest = nearest.scatter(1, chosen[:, :step], -math.inf)  # chosen once
        chosen[:, step] = nearest.argmax(dim=1)
    return chosen.sort(dim=1).values


def cosines(features: Tensor) -> Tensor:
    """Cosine of every token with every other of its image, [images, T, T]; exactly 1 with itself.

    In float64 on the CPU, where it costs little, so that neither the batch nor rounding decides between near ties.
    """
    unit = normalize(features.to(precise(features)), dim=-1)
    found = unit @ unit.transpose(1, 2)
    found.diagonal(dim1=1, dim2=2).fill_(1)  # alone, all tokens are equal: no rounding error may choose the first one
    return found


def precise(features: Tensor) -> torch.dtype:
    """The dtype that choices are made in: float64 is slow on GPUs."""
    return torch.float64 if features.device.type == "cpu" else torch.float32
