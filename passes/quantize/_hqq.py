"""Half-quadratic quantization (HQQ, Badri and Shaji 2023): grids that bear outliers, from the weights alone.

Pure: tensors in, tensors out. The rounding error's p-norm, p < 1, is split by an auxiliary error that is sparse: it is
shrunk towards 0, and zero points (or scales) are fitted to what is left, in turns.
"""

from __future__ import annotations

import torch

from ...compress.runtime.grid import Grid
from ._rtn import absmax_grid, groups_of


def hqq(
    w: torch.Tensor,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    dtype: torch.dtype,
    norm: float = 0.7,
    iterations: int = 20,
    beta: float = 10.0,
    kappa: float = 1.01,
) -> Grid:
    """The grid of `w` [out, in] with the least ``sum |w - w^|^p`` of every group among those that the turns pass.

    The plain grid is the first of them, so no group ever gets worse. One run fits the zero point, rounded to an integer
    every time; a second one the scale as well (a symmetric grid has only that). Errors are counted in steps of the
    plain scale, so that `beta` means the same for weights of any size.

    Args:
        norm: p. iterations: turns. beta, kappa: how strongly the auxiliary error is tied, and its growth a turn.
    """
    best = absmax_grid(w, bits, group, symmetric, dtype)
    parts = groups_of(w.float(), group)
    unit = best.scale.float()[..., None]
    least = lp_errors(parts, best, norm)
    for moving in (True,) if symmetric else (False, True):
        trial, tie = _copy(best if symmetric else absmax_grid(w, bits, group, symmetric, dtype)), beta
        for _ in range(iterations):
            trial = turn(parts, trial, unit, norm, tie, moving)
            tie *= kappa
            error = lp_errors(parts, trial, norm)
            better = error < least
            least = torch.where(better, error, least)
            best.scale = torch.where(better, trial.scale, best.scale)
            if best.zero is not None and trial.zero is not None:
                best.zero = torch.where(better, trial.zero, best.zero)
    return best


def turn(parts: torch.Tensor, grid: Grid, unit: torch.Tensor, norm: float, tie: float, moving: bool) -> Grid:
    """One turn: integers, auxiliary error, zero point and, with `moving`, scale. `parts` [out, groups, columns]."""
    scale = grid.scale.float()[..., None]
    zero = None if grid.zero is None else grid.zero.float()[..., None]
    q, value = _rounded(parts, grid)
    target = parts - shrink((parts - value) / unit, norm, tie) * unit
    if zero is not None:
        zero = (q - target / scale).mean(-1, keepdim=True).round().clamp(grid.low, grid.high)
    if moving:
        level = q if zero is None else q - zero
        length = level.square().sum(-1, keepdim=True)
        fitted = (level * target).sum(-1, keepdim=True) / length.clamp(min=1)
        scale = torch.where((length > 0) & (fitted > 0), fitted, scale)
    rounded = scale.squeeze(-1).to(grid.scale.dtype).clamp(min=torch.finfo(grid.scale.dtype).tiny)
    return Grid(
        grid.bits, grid.group, grid.symmetric, rounded, None if zero is None else zero.squeeze(-1).to(torch.int8)
    )


def shrink(error: torch.Tensor, norm: float, tie: float) -> torch.Tensor:
    """The proximal step of ``|e|^p``: ``sign(e) max(|e| - |e|^(p-1) / tie, 0)``; 0 stays 0."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-12).pow(norm - 1) / tie).clamp(min=0)


def lp_errors(parts: torch.Tensor, grid: Grid, norm: float) -> torch.Tensor:
    """[out, groups]: ``sum |w - w^|^p`` of every group of `parts` [out, groups, columns]."""
    return (parts - _rounded(parts, grid)[1]).abs().pow(norm).sum(-1)


def _rounded(parts: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and values, [out, groups, columns]."""
    scale = grid.scale.float()[..., None]
    zero = 0.0 if grid.zero is None else grid.zero.float()[..., None]
    q = ((parts / scale).round() + zero).clamp(grid.low, grid.high)
    return q, ((q - zero) * scale).to(grid.scale.dtype).float()


def _copy(grid: Grid) -> Grid:
    return Grid(grid.bits, grid.group, grid.symmetric, grid.scale.clone(), grid.zero)
