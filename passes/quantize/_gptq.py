"""GPTQ (Frantar et al., arXiv 2210.17323): rounding column by column, each column's error spread over those to come.

Pure: tensors in, tensors out. With ``H = 2 E[x x^T]`` and ``U`` the upper Cholesky factor of ``H^-1``, column i is
rounded and ``(w_i - q_i) / U_ii`` times row i of U is taken from the columns after it (Algorithm 1), in blocks.

``1 / U_ii^2`` is what an error in column i costs once the columns after it have done what they can, so that the sum of
``(w_i - q_i)^2 / U_ii^2`` IS the layer's error. It therefore weighs the search for the scales, where diag(H), which
knows of no compensation, would clip too much. Afterwards `_descent` refines scales and integers by turns.

With `drift` the term of GPTAQ (Li et al., arXiv 2504.02692) is added: the linear should answer to the inputs that it
really gets as the original answered to the inputs that the original got.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch

from ...compress.runtime.grid import Grid, dequantize, quantize
from ._descent import STRIP, descend
from ._rtn import absmax_grid, searched_grid
from ._threads import one_thread

MOST_RETRIES = 8
LEAF = 128  # columns that are factorised as one
ActOrder = Literal["static", "none"]


@dataclass
class Factor:
    """What GPTQ needs of a Hessian; linears that share their input share it.

    Attributes:
        order: [in], the columns in the order in which they are rounded.
        upper: [in, in], the upper Cholesky factor of the inverse of the damped, ordered H, computed in float64 and kept
            in the precision of H; None if H is zero or never became positive definite.
        importance: [in] float64, ``1 / U_ii^2`` by column of the weight, 0 where there is no input.
        damping: what was added to the diagonal.
        retries: how often the damping was raised. dead: [in] bool, columns without input.
    """

    order: torch.Tensor
    upper: torch.Tensor | None
    importance: torch.Tensor
    damping: float
    retries: int
    dead: torch.Tensor


@dataclass
class Solved:
    """A rounded weight.

    Attributes:
        weight: [out, in] float32, on `grid`. errors, sizes: [out] float64, each row's share of
            ``tr((W - Q) H (W - Q)^T)`` and of ``tr(W H W^T)``, with the undamped H.
        retries: how often the damping was raised. dead: columns without input.
        fallback: H was zero or never became positive definite; the weight was rounded to nearest.
    """

    weight: torch.Tensor
    grid: Grid
    errors: torch.Tensor
    sizes: torch.Tensor
    retries: int = 0
    dead: int = 0
    fallback: bool = False

    @property
    def error(self) -> float:
        return float(self.errors.sum())

    @property
    def relative(self) -> float:
        """`error` over ``tr(W H W^T)``."""
        whole = float(self.sizes.sum())
        return self.error / whole if whole > 0 else 0.0

    def split(self, rows: list[int]) -> list[Solved]:
        """The answer to several weights that were rounded as one, `rows` [out] of each."""
        grid, stops = self.grid, list(accumulate(rows))
        parts = []
        for start, stop in zip([0, *stops], stops, strict=False):
            zero = None if grid.zero is None else grid.zero[start:stop].clone()
            own = Grid(grid.bits, grid.group, grid.symmetric, grid.scale[start:stop].clone(), zero)
            part = replace(self, weight=self.weight[start:stop], grid=own)
            parts.append(replace(part, errors=self.errors[start:stop], sizes=self.sizes[start:stop]))
        return parts


def factor_of(h: torch.Tensor, damp: float = 0.01, act_order: ActOrder = "static") -> Factor:
    """Order, damp and factorise `h` [in, in], ``2 E[x x^T]``.

    Args:
        damp: share of the mean diagonal added to the diagonal; multiplied by ten until H is positive definite.
        act_order: ``static`` takes the columns by falling diag(H), ``none`` from left to right.
    """
    diagonal = h.diagonal()
    dead = diagonal == 0
    if act_order == "static":
        order = torch.argsort(diagonal, descending=True, stable=True)
    else:
        order = torch.arange(len(h), device=h.device)
    importance = torch.zeros(len(order), dtype=torch.float64, device=h.device)
    if bool(dead.all()):
        return Factor(order, None, importance, 0.0, 0, dead)
    upper, retries = inverse_factor(h[order][:, order], damp)
    if upper is not None:
        importance[order] = upper.diagonal().square().reciprocal()
        importance[dead] = 0.0
        upper = upper.to(h.dtype)
    mean = float(torch.where(dead, 1.0, diagonal.double()).mean())
    return Factor(order, upper, importance, damp * 10**retries * mean, retries, dead)


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
    refine: int = 0,
    factor: Factor | None = None,
    drift: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Solved:
    """Round `w` so that the outputs on the inputs behind `h` change least.

    Args:
        w: [out, in]. h: [in, in], ``2 E[x x^T]``, undamped; a float64 `h` has everything computed in float64.
        dtype: of the scales.
        damp, act_order: see `factor_of`. With ``static`` the groups' scales are taken from the original weight
            beforehand (no group index at run time); with ``none`` a group's scale is taken when it is reached, from
            the weights as they then are.
        scale_search: choose scales by the least error weighted by ``1 / U_ii^2`` instead of the largest weight.
        refine: rounds of least-squares scales and coordinate descent on the integers afterwards, see `_descent`.
        factor: of this `h`, `damp` and `act_order`, where it is known already.
        drift: [in, in], ``2 alpha E[(x_original - x) x^T]``: GPTAQ's term.
        mask: [out, in] bool, which weights are zero and stay so. What the columns before move into such a place goes on
            to the columns after it: there the least error needs no more than what stays free.
    """
    precision = torch.float64 if h.dtype == torch.float64 else torch.float32
    original = w.detach().to(precision)
    found = factor_of(h, damp, act_order) if factor is None else factor
    retries, dead = found.retries, int(found.dead.sum())
    if found.upper is None:
        grid = absmax_grid(original, bits, group, symmetric, dtype)
        rounded = dequantize(quantize(original, grid), grid)
        return Solved(rounded, grid, *row_errors(original, rounded, h), retries, dead, True)
    alive = original.masked_fill(found.dead, 0.0)

    def grid_of(part: torch.Tensor, size: int, importance: torch.Tensor) -> Grid:
        if scale_search:
            return searched_grid(part, importance, bits, size, symmetric, dtype)
        return absmax_grid(part, bits, size, symmetric, dtype)

    importance, size = found.importance, w.shape[1] if group == -1 else group
    static = act_order == "static"
    grids = [] if not static else [grid_of(alive, group, importance)]
    columns, order, places = w.shape[1], found.order, found.order.tolist()
    factored = found.upper.to(precision)
    diagonal = factored.diagonal()
    slope = None if drift is None else _slope(drift[order][:, order], found.upper).to(precision)
    rest = alive.T.contiguous()[order]  # [in, out]: a column of the weight lies in one piece
    rounded = torch.empty_like(rest, dtype=dtype)
    fixed = None if mask is None else mask[:, order].T.contiguous()
    scales, zeros = _spread(grids[0], precision) if static else (None, None)
    with one_thread():
        for start in range(0, columns, blocksize):
            stop, first = min(start + blocksize, columns), start
            block, errors = rest[start:stop], torch.empty_like(rest[start:stop])
            while first < stop:  # strips, in which rank-one updates stay in a core's cache; a group begins with one
                begun = first - start
                if not static and first % size == 0:
                    later = rest[stop:] - factored[start:first, stop:].T @ errors[:begun]
                    if slope is not None:
                        later += slope[start:first, stop:].T @ block[:begun]
                    now = torch.cat([block[begun:], later])[:size].T
                    now = now if fixed is None else now.masked_fill(fixed[first : first + size].T, 0.0)
                    grids.append(grid_of(now, -1, importance[first : first + size]))
                    scales, zeros = _spread(grids[-1], precision)
                assert scales is not None
                end = min(first + STRIP, stop, columns if static else (first // size + 1) * size)
                strip, local = rest[first:end], factored[first:end, first:end] / diagonal[first:end, None]
                off = errors[begun : end - start]
                values, slips, points = strip.unbind(), off.unbind(), rounded[first:end].unbind()
                for i, value in enumerate(values):
                    column = first + i
                    place = places[column] // size if static else 0
                    q = _nearest(value, scales[place], None if zeros is None else zeros[place], bits)
                    points[i].copy_(q if fixed is None else q.masked_fill_(fixed[column], 0.0))
                    torch.sub(value, points[i], out=slips[i])
                    strip[i + 1 :].addr_(local[i, i + 1 :], slips[i], alpha=-1)
                    if slope is not None:
                        strip[i + 1 :].addr_(slope[column, column + 1 : end], value)
                off.div_(diagonal[first:end, None])
                rest[end:stop].addmm_(factored[first:end, end:stop].T, off, alpha=-1)
                if slope is not None:
                    rest[end:stop].addmm_(slope[first:end, end:stop].T, strip)
                first = end
            rest[stop:].addmm_(factored[start:stop, stop:].T, errors, alpha=-1)
            if slope is not None:
                rest[stop:].addmm_(slope[start:stop, stop:].T, block)
    back = rounded[order.argsort()].T.to(precision, memory_format=torch.contiguous_format)
    if static:
        (grid,) = grids
    else:
        zero = None if symmetric else torch.cat([g.zero for g in grids if g.zero is not None], 1)
        grid = Grid(bits, group, symmetric, torch.cat([g.scale for g in grids], 1), zero)
    if refine:
        back, grid = descend(alive, back, grid, h, found.damping, refine, drift, mask)
    return Solved(back.float(), grid, *row_errors(original, back, h), retries, dead)


def _nearest(value: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> torch.Tensor:
    """The nearest points of a grid, not yet rounded to its dtype; all [out] (or broadcast to it)."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    q = (value / scale).round_()
    q = q.clamp_(low, high) if zero is None else q.add_(zero).clamp_(low, high).sub_(zero)
    return q.mul_(scale)


def _spread(grid: Grid, precision: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zeros as [groups, out]."""
    zero = None if grid.zero is None else grid.zero.T.to(precision).contiguous()
    return grid.scale.T.to(precision).contiguous(), zero


def _slope(drift: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """GPTAQ's P [in, in]: what the columns after i take of column i's drift, ``triu(D U^T, 1) U``, strictly upper."""
    upper = upper.double()
    return torch.triu(torch.triu(drift.double() @ upper.T, 1) @ upper, 1)


def inverse_factor(h: torch.Tensor, damp: float) -> tuple[torch.Tensor | None, int]:
    """The upper Cholesky factor of the inverse of `h` with damping, [in, in], and how often damping was raised.

    Float64; columns without input get a 1 on the diagonal. None if H never becomes positive definite.
    """
    diagonal = h.diagonal().double()
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    if mean <= 0 or not bool(h.sum(dtype=torch.float64).isfinite()):
        return None, 0
    for retry in range(MOST_RETRIES + 1):
        upper = h.to(torch.float64, copy=True)
        upper.diagonal().copy_(diagonal + damp * 10**retry * mean)
        if _invert_to_root(upper) and bool(upper.sum().isfinite()):
            return upper, retry
    return None, MOST_RETRIES


def _invert_to_root(h: torch.Tensor) -> bool:
    """Make of `h` the upper triangular U with ``U^T U = h^-1``, by halves, so that most of it is products.

    ``h = V V^T`` with V upper triangular and ``U = V^-1``. By halves of V: what lies across is known as soon as the
    right half is, and the left half is that of what is left of h. False where there is none; `h` is then of no use.
    """
    size = len(h)
    if size <= LEAF:
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if int(info):
            return False
        one = torch.eye(size, dtype=h.dtype, device=h.device)
        h.copy_(torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True))
        return True
    half = size // 2
    left, right, corner = h[:half, :half], h[half:, half:], h[:half, half:]
    if not _invert_to_root(right):
        return False
    across = corner @ right.T
    left.addmm_(across, across.T, alpha=-1)
    if not _invert_to_root(left):
        return False
    torch.mm(left, across @ right, out=corner)
    corner.neg_()
    h[half:, :half] = 0.0
    return True


def row_errors(w: torch.Tensor, q: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out] float64: the diagonals of ``(W - Q) H (W - Q)^T`` and of ``W H W^T``. Computed in the precision of `h`."""
    off, w = (w - q).to(h.dtype), w.to(h.dtype)
    return tuple((part @ h).mul_(part).sum(1, dtype=torch.float64) for part in (off, w))  # type: ignore[return-value]


def layer_error(w: torch.Tensor, q: torch.Tensor, h: torch.Tensor) -> tuple[float, float]:
    """``tr((W - Q) H (W - Q)^T)``, and its share of ``tr(W H W^T)``."""
    error, whole = (float(rows.sum()) for rows in row_errors(w, q, h))
    return error, error / whole if whole > 0 else 0.0
