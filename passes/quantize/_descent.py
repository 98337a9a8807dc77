"""Refining a rounded weight under its Hessian: scales by least squares, integers by coordinate descent, in turns.

The layer's error ``tr((W - Q) H (W - Q)^T)`` is quadratic in the scales while the integers stand, and in one integer
while all else stands; each step takes the exact minimum (coordinate descent on integers: QuantEase, arXiv 2309.01885;
CDQuant, arXiv 2406.17542) and can only lower it. H is damped as in GPTQ. Pure: tensors in, tensors out.
"""

from __future__ import annotations

import torch

from ...compress.runtime.grid import Grid


def descend(
    w: torch.Tensor,
    q: torch.Tensor,
    grid: Grid,
    h: torch.Tensor,
    damping: float,
    rounds: int,
    drift: torch.Tensor | None = None,
    blocksize: int = 128,
) -> tuple[torch.Tensor, Grid]:
    """`q` [out, in], on `grid`, after `rounds` turns of new scales and one sweep over the integers: (weight, grid).

    Args:
        w: [out, in], the weight to be near to, in the precision to compute in. h: [in, in], undamped.
        damping: what is added to the diagonal of h; columns without input get 1 besides.
        drift: as in `gptq`; the error is then ``tr((W - Q) H (W - Q)^T) + 2 tr((W - Q) (W D)^T)``.
    """
    damped = h.to(w.dtype).clone()
    diagonal = damped.diagonal()
    diagonal += torch.where(diagonal == 0, 1.0, 0.0) + damping
    pull = torch.zeros_like(w) if drift is None else w @ drift.to(w.dtype)  # -1/2 of the linear term's gradient
    ints = _integers(q, grid)
    for _ in range(rounds):
        grid = _refit(w, ints, grid, damped, pull)
        ints = _sweep(w, ints, grid, damped, pull, blocksize)
    return _values(ints, grid, w.dtype), grid


def _integers(q: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[out, in], the integers less the zeros, in the precision of `q`."""
    return (q / _wide(grid.scale, q)).round_()


def _values(ints: torch.Tensor, grid: Grid, precision: torch.dtype) -> torch.Tensor:
    return (ints * _wide(grid.scale, ints)).to(grid.scale.dtype).to(precision)


def _wide(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[out, groups] as [out, in]."""
    return values.to(like.dtype).repeat_interleave(like.shape[1] // values.shape[1], 1)


def _cost(w: torch.Tensor, q: torch.Tensor, h: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """[out]: the error of every row."""
    off = w - q
    return ((off @ h + 2 * pull) * off).sum(1)


def _refit(w: torch.Tensor, ints: torch.Tensor, grid: Grid, h: torch.Tensor, pull: torch.Tensor) -> Grid:
    """The scales with the least error for these integers, row by row; a row that rounding makes worse keeps its own."""
    out, groups = grid.scale.shape
    size = w.shape[1] // groups
    parts = ints.reshape(out, groups, size)
    normal = torch.empty(out, groups, groups, dtype=w.dtype, device=w.device)
    for g in range(groups):
        rows = parts[:, g] @ h[g * size : (g + 1) * size]
        normal[:, g] = (rows.reshape(out, groups, size) * parts).sum(-1)
    wanted = ((w @ h + pull).reshape(out, groups, size) * parts).sum(-1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + (diagonal <= 0)  # groups of zeros: any scale will do
    solution, info = torch.linalg.solve_ex(normal.double(), wanted.double())
    scale = solution.to(grid.scale.dtype)
    tiny = torch.finfo(grid.scale.dtype).tiny
    unusable = ~scale.isfinite() | (scale.abs() < tiny) | (info != 0)[:, None] | (parts == 0).all(-1)
    trial = Grid(grid.bits, grid.group, grid.symmetric, torch.where(unusable, grid.scale, scale), grid.zero)
    before, after = (_cost(w, _values(ints, g, w.dtype), h, pull) for g in (grid, trial))
    trial.scale = torch.where((after < before)[:, None], trial.scale, grid.scale)
    return trial


def _sweep(
    w: torch.Tensor, ints: torch.Tensor, grid: Grid, h: torch.Tensor, pull: torch.Tensor, blocksize: int
) -> torch.Tensor:
    """Every column in turn takes its best integers for what the others now are.

    With ``R = (W - Q) H + W D`` the best value of column j is ``q_j + R_j / H_jj``. Inside a block of columns R is kept
    exact; the columns outside hear of it when the block is done.
    """
    groups = grid.scale.shape[1]
    size = w.shape[1] // groups
    scales = grid.scale.T.to(w.dtype).contiguous()
    low = torch.full_like(scales, grid.low)
    high = torch.full_like(scales, grid.high)
    if grid.zero is not None:
        zero = grid.zero.T.to(w.dtype)
        low, high = low - zero, high - zero
    values = _values(ints, grid, w.dtype).T.contiguous()  # [in, out]
    ints = ints.T.contiguous()
    residual = ((w - values.T) @ h + pull).T.contiguous()
    diagonal = h.diagonal().tolist()
    for start in range(0, w.shape[1], blocksize):
        stop = min(start + blocksize, w.shape[1])
        block, local = residual[start:stop].clone(), h[start:stop, start:stop]
        changes = torch.empty_like(block)
        for i in range(stop - start):
            column = start + i
            g = column // size
            best = (block[i] / diagonal[column] + values[column]).div_(scales[g]).round_()
            ints[column] = torch.maximum(torch.minimum(best, high[g]), low[g])
            value = (ints[column] * scales[g]).to(grid.scale.dtype).to(w.dtype)
            changes[i] = value - values[column]
            values[column] = value
            block.addr_(local[i], changes[i], alpha=-1)
        residual.addmm_(h[start:stop].T, changes, alpha=-1)
    return ints.T.contiguous()
