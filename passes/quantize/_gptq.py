"""GPTQ (Frantar et al., arXiv 2210.17323): rounding column by column, each column's error spread over those to come.

Pure: tensors in, tensors out. With ``H = 2 E[x x^T]`` and ``U`` the upper Cholesky factor of ``H^-1``, column i is
rounded and ``(w_i - q_i) / U_ii`` times row i of U is taken from the columns after it (Algorithm 1), in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...compress.runtime.grid import Grid, dequantize, quantize
from ._rtn import absmax_grid, searched_grid

MOST_RETRIES = 8
ActOrder = Literal["static", "none"]


@dataclass
class Solved:
    """A rounded weight.

    Attributes:
        weight: [out, in] float32, on `grid`. error: ``tr((W - Q) H (W - Q)^T)`` with the undamped H.
        relative: `error` over ``tr(W H W^T)``. retries: how often the damping was raised. dead: columns without input.
        fallback: H was zero or never became positive definite; the weight was rounded to nearest.
    """

    weight: torch.Tensor
    grid: Grid
    error: float
    relative: float
    retries: int = 0
    dead: int = 0
    fallback: bool = False


def gptq(
    w: torch.Tensor,
    h: torch.Tensor,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    dtype: torch.dtype,
    damp: float = 0.01,
    act_order: ActOrder = "static",
    blocksize: int = 128,
    scale_search: bool = False,
) -> Solved:
    """Round `w` so that the outputs on the inputs behind `h` change least.

    Args:
        w: [out, in]. h: [in, in], ``2 E[x x^T]``, undamped; a float64 `h` has everything computed in float64.
        dtype: of the scales.
        damp: share of the mean diagonal added to the diagonal; multiplied by ten until H is positive definite.
        act_order: ``static`` works through the columns by falling diag(H), with the groups' scales taken from the
            original weight beforehand (no group index at run time); ``none`` goes left to right and takes a group's
            scale when it is reached, from the weights as they then are.
        scale_search: choose scales by the least diag(H)-weighted error instead of the largest weight.
    """
    precision = torch.float64 if h.dtype == torch.float64 else torch.float32
    original = w.detach().to(precision)
    w = original.clone()
    diagonal = h.diagonal()
    dead = diagonal == 0

    def grid_of(part: torch.Tensor, size: int, importance: torch.Tensor) -> Grid:
        if scale_search:
            return searched_grid(part, importance, bits, size, symmetric, dtype)
        return absmax_grid(part, bits, size, symmetric, dtype)

    factor, retries = None, 0
    if not bool(dead.all()):
        w[:, dead] = 0
        factor, retries = inverse_factor(h, damp)
    if factor is None:
        grid = absmax_grid(original, bits, group, symmetric, dtype)
        rounded = dequantize(quantize(original, grid), grid)
        return Solved(rounded, grid, *layer_error(original, rounded, h), retries, int(dead.sum()), True)

    columns, size = w.shape[1], w.shape[1] if group == -1 else group
    static = act_order == "static"
    if static:
        order = torch.argsort(diagonal, descending=True, stable=True)
        permuted = h[order][:, order]
        factor, more = inverse_factor(permuted, damp)
        retries = max(retries, more)
        assert factor is not None
        grid = grid_of(w, group, diagonal)
    else:
        order = torch.arange(columns, device=w.device)
        grids: list[Grid] = []
    factor = factor.to(precision)
    rest = w[:, order]
    rounded = torch.empty_like(rest)
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        block, errors = rest[:, start:stop].clone(), torch.empty_like(rest[:, start:stop])
        local = factor[start:stop, start:stop]
        for i in range(stop - start):
            column = start + i
            if static:
                here = grid.column(int(order[column]) // size)
            else:
                if column % size == 0:
                    later = rest[:, stop:] - errors[:, :i] @ factor[start:column, stop:]
                    now = torch.cat([block[:, i:], later], 1)[:, :size]
                    grids.append(grid_of(now, -1, diagonal[column : column + size]))
                here = grids[-1]
            value = block[:, i : i + 1]
            q = dequantize(quantize(value, here), here).to(precision)
            rounded[:, column : column + 1] = q
            error = (value - q) / local[i, i]
            block[:, i:] -= error * local[i : i + 1, i:]
            errors[:, i : i + 1] = error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    if static:
        back = torch.empty_like(rounded)
        back[:, order] = rounded
        rounded = back
    else:
        zero = None if symmetric else torch.cat([g.zero for g in grids if g.zero is not None], 1)
        grid = Grid(bits, group, symmetric, torch.cat([g.scale for g in grids], 1), zero)
    return Solved(rounded.float(), grid, *layer_error(original, rounded, h), retries, int(dead.sum()))


def inverse_factor(h: torch.Tensor, damp: float) -> tuple[torch.Tensor | None, int]:
    """The upper Cholesky factor of the inverse of `h` with damping, [in, in], and how often damping was raised.

    Float64; columns without input get a 1 on the diagonal. None if H never becomes positive definite.
    """
    full = h.double().clone()
    diagonal = full.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    if not torch.isfinite(full).all():
        return None, 0
    for retry in range(MOST_RETRIES + 1):
        damped = full + torch.eye(len(full), dtype=full.dtype, device=full.device) * (damp * 10**retry * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0 and torch.isfinite(upper).all():
                return upper, retry
    return None, MOST_RETRIES


def layer_error(w: torch.Tensor, q: torch.Tensor, h: torch.Tensor) -> tuple[float, float]:
    """``tr((W - Q) H (W - Q)^T)``, and its share of ``tr(W H W^T)``."""
    wide = h.double()
    difference = (w - q).double()
    error = float(((difference @ wide) * difference).sum())
    whole = float(((w.double() @ wide) * w.double()).sum())
    return error, error / whole if whole > 0 else 0.0
