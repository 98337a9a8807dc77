"""Round-to-nearest: choosing the scales of a grid. Pure: tensors in, tensors out."""

from __future__ import annotations

import torch

from ...compress.runtime.grid import Grid
from ._threads import one_thread

CLIPS = [1.0 - 0.05 * k for k in range(14)]  # shares of the range that the scale search tries: 1.00 to 0.35
POLISH = 3  # rounds of least squares after the best of them
CHUNK = 1 << 16  # weights that are searched at a time: what a core's cache holds


def groups_of(w: torch.Tensor, group: int) -> torch.Tensor:
    """[out, in] as [out, groups, columns of a group]; group -1 is the whole row."""
    return w.reshape(w.shape[0], -1, w.shape[1] if group == -1 else group)


def absmax_grid(w: torch.Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype, clip: float = 1.0) -> Grid:
    """The plain grid of `w` [out, in].

    Symmetric: ``scale = max|w| / (2^(b-1) - 1)``. Asymmetric: ``scale = (max - min) / (2^b - 1)``, with 0 inside
    [min, max], and ``zero = round(-min / scale)``. `clip` shrinks the range. Scales are rounded to `dtype` here, before
    any integer is chosen; a group of zeros gets scale 1.
    """
    parts = groups_of(w.float(), group)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if symmetric:
        scale = clip * parts.abs().amax(-1) / high
        scale = torch.where(scale > 0, scale, 1.0).to(dtype)
        return Grid(bits, group, True, _positive(scale))
    bottom, top = clip * parts.amin(-1).clamp(max=0), clip * parts.amax(-1).clamp(min=0)
    scale = (top - bottom) / (high - low)
    scale = _positive(torch.where(scale > 0, scale, 1.0).to(dtype))
    zero = (low - bottom / scale.float()).round().clamp(low, high).to(torch.int8)
    return Grid(bits, group, False, scale, zero)


@one_thread()
def searched_grid(
    w: torch.Tensor, importance: torch.Tensor | None, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> Grid:
    """The grid with the least ``sum_j importance_j (w_j - w^_j)^2`` of every group (after AutoRound's opt-RTN).

    Symmetric grids use all 2^b levels: the scale may be negative, which puts the extra level, -2^(b-1), on the side of
    the larger weights. Clipped ranges of either sign are tried, then the best is polished by turns: the integers
    nearest for this scale, and the scale of least squares for these integers, ``sum c w q / sum c q^2``. The plain grid
    is among the candidates, so that no group is worse than with `absmax_grid`.

    Args:
        w: [out, in]. importance: [in], E[x^2] of the inputs; None weighs all alike.
    """
    weight = torch.ones(w.shape[1]) if importance is None else importance
    top = float(weight.max())
    weight = (weight / top if top > 0 else torch.ones_like(weight)).to(w.device, torch.float32)
    rows = max(1, CHUNK // w.shape[1])
    parts = [_searched(part.float(), weight, bits, group, symmetric, dtype) for part in w.split(rows)]
    zero = None if symmetric else torch.cat([part.zero for part in parts if part.zero is not None])
    return Grid(bits, group, symmetric, torch.cat([part.scale for part in parts]), zero)


def _searched(w: torch.Tensor, c: torch.Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """`searched_grid` of a few rows."""
    best = absmax_grid(w, bits, group, symmetric, dtype)
    parts, c = groups_of(w, group), groups_of(c[None], group)[0]
    least = _error(parts, best, c)[0]

    def take(trial: Grid, at_most: torch.Tensor) -> torch.Tensor:
        """Let the trial's groups in where they are better; the integers (less the zeros) of the trial."""
        nonlocal best, least
        error, q = _error(parts, trial, c)
        better = (error < least) & at_most
        least = torch.where(better, error, least)
        best.scale = torch.where(better, trial.scale, best.scale)
        if best.zero is not None and trial.zero is not None:
            best.zero = torch.where(better, trial.zero, best.zero)
        return q

    everywhere = torch.ones_like(least, dtype=torch.bool)
    high = (1 << (bits - 1)) - 1
    if symmetric:
        largest = parts.abs().amax(-1)
        largest = torch.where(largest > 0, largest, 1.0)
        for clip in CLIPS:
            for sign in (1, -1):
                take(Grid(bits, group, True, _positive((largest * (clip / high)).to(dtype)) * sign), everywhere)
    else:
        for clip in CLIPS[1:]:
            take(absmax_grid(w, bits, group, False, dtype, clip), everywhere)
    for _ in range(POLISH):
        q = _error(parts, best, c)[1]
        whole = (q.square() * c).sum(-1)
        scale = torch.where(whole > 0, (parts * q * c).sum(-1) / whole, best.scale.float()).to(dtype)
        usable = scale.isfinite() & (scale.float().abs() >= torch.finfo(dtype).tiny)
        take(Grid(bits, group, symmetric, torch.where(usable, scale, best.scale), best.zero), usable)
    return best


def _error(parts: torch.Tensor, grid: Grid, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted squared error of every group [out, groups]; the integers less the zeros [out, groups, size]."""
    scale = grid.scale.float().unsqueeze(-1)
    q = (parts / scale).round_()
    if grid.zero is None:
        q.clamp_(grid.low, grid.high)
    else:
        zero = grid.zero.float().unsqueeze(-1)
        q = q.clamp_(grid.low - zero, grid.high - zero)
    return torch.addcmul(parts, q, scale, value=-1).square_().mul_(c).sum(-1), q


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """A scale that underflowed in its dtype becomes the smallest normal number of it."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)
