"""Refining a rounded weight under its Hessian: scales by least squares, integers by coordinate descent, in turns.

The layer's error ``tr((W - Q) H (W - Q)^T)`` is quadratic in the scales while the integers stand, and in one integer
while all else stands; each step takes the exact minimum (coordinate descent on integers: QuantEase, arXiv 2309.01885;
CDQuant, arXiv 2406.17542) and can only lower it. H is damped as in GPTQ. Pure: tensors in, tensors out.
"""

from __future__ import annotations

from typing import Any

import torch

from ...compress.runtime.grid import Grid
from ._threads import one_thread

PANEL = 128  # columns between two updates of the rest
STRIP = 16  # columns between two updates of the rest of a panel: they stay in a core's cache


def descend(
    w: torch.Tensor,
    q: torch.Tensor,
    grid: Grid,
    h: torch.Tensor,
    damping: float,
    rounds: int,
    drift: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Grid]:
    """`q` [out, in], on `grid`, after `rounds` turns of new scales and one sweep over the integers: (weight, grid).

    Args:
        w: [out, in], the weight to be near to, in the precision to compute in. h: [in, in], undamped.
        damping: what is added to the diagonal of h; columns without input get 1 besides.
        drift: as in `gptq`; the error is then ``tr((W - Q) H (W - Q)^T) + 2 tr((W - Q) (W D)^T)``.
        mask: [out, in] bool, which weights of `q` are zero and stay so.
    """
    damped = h.to(w.dtype).clone()
    diagonal = damped.diagonal()
    diagonal += torch.where(diagonal == 0, 1.0, 0.0) + damping
    state = Descent(w, q, grid, damped, None if drift is None else w @ drift.to(w.dtype), mask)
    for left in reversed(range(rounds)):
        state.refit()
        state.sweep(last=left == 0)
    return state.values.T.contiguous(), state.grid


class Descent:
    """A rounded weight on its way down. All matrices lie transposed, so that a column of the weight is in one piece.

    With ``R = (W - Q) H + P``, P = W D the drift's pull, the error of a row is ``(R + P) . (W - Q)``: whoever keeps R
    up to date needs no product with H to know it.

    Attributes:
        ints: [in, out], the integers less the zeros, in the precision of the weight. values: [in, out], Q.
        residual: [in, out], R. grid: the grid as it now is.
    """

    def __init__(
        self,
        w: torch.Tensor,
        q: torch.Tensor,
        grid: Grid,
        h: torch.Tensor,
        pull: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """`w`, `q`, `pull`, `mask`: [out, in]. `h`: [in, in], damped."""
        self.fixed = None if mask is None else mask.T.contiguous()
        self.w, self.h, self.grid = w.T.contiguous(), h, grid
        self.pull = None if pull is None else pull.T.contiguous()
        self.groups = grid.scale.shape[1]
        self.values = q.T.contiguous()
        self.ints = (self._grouped(self.values) / self._scales(grid)[:, None]).round_().reshape(self.w.shape)
        self.target = h @ self.w if self.pull is None else torch.addmm(self.pull, h, self.w)
        self.residual = torch.addmm(self.target, h, self.values, alpha=-1)

    def refit(self) -> None:
        """The scales with the least error for these integers; a row that rounding makes worse keeps its own."""
        size = len(self.w) // self.groups
        parts = self._grouped(self.ints)
        normal = torch.empty(self.w.shape[1], self.groups, self.groups, dtype=self.w.dtype, device=self.w.device)
        for g in range(self.groups):
            rows = self.h[g * size :, g * size : (g + 1) * size] @ parts[g]
            upper = rows.mul_(self.ints[g * size :]).reshape(-1, size, rows.shape[1]).sum(1)
            normal[:, g, g:] = normal[:, g:, g] = upper.T
        wanted = (self._grouped(self.target) * parts).sum(1).T
        diagonal = normal.diagonal(dim1=1, dim2=2)
        diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + (diagonal <= 0)  # groups of zeros: any scale will do
        solution, info = torch.linalg.solve_ex(normal.double(), wanted.double())
        kept, dtype = self.grid, self.grid.scale.dtype
        scale = solution.to(dtype)
        unusable = ~scale.isfinite() | (scale.abs() < torch.finfo(dtype).tiny) | (info != 0)[:, None]
        unusable |= (parts == 0).all(1).T
        trial = Grid(kept.bits, kept.group, kept.symmetric, torch.where(unusable, kept.scale, scale), kept.zero)
        values = (parts * self._scales(trial)[:, None]).to(dtype).to(self.w.dtype).reshape(self.w.shape)
        residual = torch.addmm(self.target, self.h, values, alpha=-1)
        better = self._cost(values, residual) < self._cost(self.values, self.residual)
        trial.scale = torch.where(better[:, None], trial.scale, kept.scale)
        self.grid = trial
        self.values = torch.where(better, values, self.values)
        self.residual = torch.where(better, residual, self.residual)

    @one_thread()
    def sweep(self, panel: int = PANEL, last: bool = False) -> None:
        """Every column in turn takes its best integers for what the others now are: ``q_j + R_j / H_jj``, rounded.

        Inside a panel of columns R is kept exact; the columns outside hear of it when the panel is done. So it is with
        the strips inside a panel, where values are not yet rounded to the dtype of the scales.

        Args:
            last: nobody will ask for R of columns that are done, so that it is left as it is.
        """
        columns, size, dtype = len(self.w), len(self.w) // self.groups, self.grid.scale.dtype
        scales = self._scales(self.grid)
        each, finer = scales.unbind(), scales.reciprocal().unbind()
        low: Any = [self.grid.low] * self.groups
        high: Any = [self.grid.high] * self.groups
        if self.grid.zero is not None:
            zero = self.grid.zero.T.to(self.w.dtype)
            low, high = (self.grid.low - zero).unbind(), (self.grid.high - zero).unbind()
        steps = self.h.diagonal().reciprocal().tolist()
        places = torch.arange(columns, device=self.w.device) // size
        for start in range(0, columns, panel):
            stop = min(start + panel, columns)
            block, before = self.residual[start:stop].clone(), self.values[start:stop].clone()
            for first in range(start, stop, STRIP):
                end = min(first + STRIP, stop)
                strip, local = block[first - start : end - start], self.h[first:end, first:end]
                wanted, values, changes = strip.unbind(), self.values[first:end], torch.empty_like(strip)
                ints, olds, moves = self.ints[first:end].unbind(), values.unbind(), changes.unbind()
                for i in range(end - first):
                    column, g = first + i, (first + i) // size
                    best = torch.add(olds[i], wanted[i], alpha=steps[column], out=ints[i])
                    best.mul_(finer[g]).round_().clamp_(low[g], high[g])
                    if self.fixed is not None:
                        best.masked_fill_(self.fixed[column], 0.0)
                    torch.mul(best, each[g], out=moves[i]).sub_(olds[i])
                    strip[i + 1 :].addr_(local[i, i + 1 :], moves[i], alpha=-1)
                new = (self.ints[first:end] * scales[places[first:end]]).to(dtype).to(self.w.dtype)
                torch.sub(new, values, out=changes)
                values.copy_(new)
                block[end - start :].addmm_(self.h[end:stop, first:end], changes, alpha=-1)
            begin = stop if last else 0
            self.residual[begin:].addmm_(self.h[begin:, start:stop], self.values[start:stop] - before, alpha=-1)

    def _cost(self, values: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[out]: the error of every row."""
        off = self.w - values
        return (off * (residual if self.pull is None else residual + self.pull)).sum(0)

    def _grouped(self, matrix: torch.Tensor) -> torch.Tensor:
        """[in, out] as [groups, columns of a group, out]."""
        return matrix.reshape(self.groups, -1, matrix.shape[1])

    def _scales(self, grid: Grid) -> torch.Tensor:
        """[groups, out], in the precision of the weight."""
        return grid.scale.T.to(self.w.dtype).contiguous()
