"""Round-to-nearest: choosing the scales of a grid. Pure: tensors in, tensors out."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...compress.runtime.grid import Grid
from ._threads import one_thread

CLIPS = [1.0 - 0.1 * k for k in range(7)]  # shares of the range that the scale search tries: 1.0 to 0.4
NEAR = (0.06, 0.03, -0.03, -0.06)  # then this beside the best of them
POLISH = 2  # rounds of least squares after that
CHUNK = 1 << 17  # weights that are searched at a time: what a core's cache holds


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


@torch.no_grad()
@one_thread()
def searched_grid(
    w: torch.Tensor, importance: torch.Tensor | None, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> Grid:
    """The grid with the least ``sum_j importance_j (w_j - w^_j)^2`` of every group (after AutoRound's opt-RTN).

    Symmetric grids use all 2^b levels: the scale may be negative, which puts the extra level, -2^(b-1), on the side of
    the larger weights. Clipped ranges of either sign are tried, some at first and then more near the best of them. That
    is polished by turns: the integers nearest for this scale, and the scale of least squares for these integers,
    ``sum c w q / sum c q^2``. The plain grid is among the candidates: no group is worse than with `absmax_grid`.

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
    """`searched_grid` of a few rows. All that is tried at a time lies one behind the other, [tried, groups, out]."""
    plain = absmax_grid(w, bits, group, symmetric, dtype)
    rows = _Rows(groups_of(w, group).permute(1, 2, 0), groups_of(c[None], group)[0], plain.low, plain.high)
    bottom, top = rows.parts.amin(1).clamp(max=0), rows.parts.amax(1).clamp(min=0)
    largest = torch.maximum(-bottom, top)
    largest = torch.where(largest > 0, largest, 1.0)

    def clipped(clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zeros of parts of the range, the zeros of symmetric grids None."""
        if symmetric:
            return _positive((largest * (clips / plain.high)).to(dtype)).float(), None
        scale = (top - bottom) * (clips / (plain.high - plain.low))
        scale = _positive(torch.where(scale > 0, scale, 1.0).to(dtype)).float()
        return scale, (plain.low - bottom * clips / scale).round_().clamp_(plain.low, plain.high)

    def or_clipped(best: _Tried, clips: torch.Tensor) -> _Tried:
        scale, zero = clipped(clips)
        both = rows.errors(scale, zero, turned=symmetric)
        best = best.or_better(both[: len(scale)], scale, zero, clips)
        return best.or_better(both[len(scale) :], -scale, None, clips) if symmetric else best

    scale, zero = plain.scale.T.float()[None], None if plain.zero is None else plain.zero.T.float()[None]
    best = _Tried(rows.errors(scale, zero), scale, zero, torch.ones_like(scale))
    best = or_clipped(best, torch.tensor(CLIPS, device=w.device)[:, None, None].expand(-1, *largest.shape))
    best = or_clipped(best, torch.cat([best.clip + step for step in NEAR]))
    for _ in range(POLISH):
        fitted = rows.least_squares(best.scale, best.zero).to(dtype)
        usable = fitted.isfinite() & (fitted.abs() >= torch.finfo(dtype).tiny)
        scale = torch.where(usable, fitted.float(), best.scale)
        best = best.or_better(rows.errors(scale, best.zero), scale, best.zero, best.clip)
    zero = None if best.zero is None else best.zero[0].T.to(torch.int8).contiguous()
    return Grid(bits, group, symmetric, best.scale[0].T.to(dtype).contiguous(), zero)


class _Tried(NamedTuple):
    """What the groups' scales and zeros cost, and the share of the range that they were made of: [1, groups, out]."""

    error: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    clip: torch.Tensor

    def or_better(
        self, errors: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, clips: torch.Tensor
    ) -> _Tried:
        """Of each group the best of these [tried, groups, out] where it is better than this."""
        error, which = errors.min(0, keepdim=True)
        better = error < self.error

        def taken(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
            return torch.where(better, new.gather(0, which), old)

        zero = None if zeros is None or self.zero is None else taken(zeros, self.zero)
        return _Tried(torch.where(better, error, self.error), taken(scales, self.scale), zero, taken(clips, self.clip))


class _Rows:
    """Rows of a weight, and room for what is computed of them again and again.

    Attributes:
        parts: [groups, columns of a group, out]; so laid, a weighted sum over a group is a product.
        c: [groups, 1, columns of a group], what an error in a column counts.
    """

    def __init__(self, parts: torch.Tensor, c: torch.Tensor, low: int, high: int) -> None:
        self.parts, self.c, self.low, self.high = parts.contiguous(), c.unsqueeze(1), low, high
        self._points, self._free, self._whole = (torch.empty_like(self.parts) for _ in range(3))

    def errors(self, scales: torch.Tensor, zeros: torch.Tensor | None, turned: bool = False) -> torch.Tensor:
        """The weighted squared errors of the groups with these scales and zeros, [tried, groups, out].

        Args:
            turned: with the negative of these scales as well, [2 tried, groups, out].
        """
        tried = len(scales)
        found = scales.new_empty((2 if turned else 1) * tried, *scales.shape[1:])
        for number, finer in enumerate(scales.reciprocal()):
            nearest = self._nearest(finer)
            q = self._clamped(nearest, None if zeros is None else zeros[number], self._whole)
            torch.bmm(self.c, q.sub_(self._points).square_(), out=found[number].unsqueeze(1))
            if turned:
                q = nearest.clamp_(-self.high, -self.low)
                torch.bmm(self.c, q.sub_(self._points).square_(), out=found[tried + number].unsqueeze(1))
        return found.view(-1, *scales.shape).mul_(scales.square()).view_as(found)

    def least_squares(self, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """The best scales, ``sum c w q / sum c q^2``, for the integers that `scale` [1, groups, out] gives.

        NaN where all of them are 0.
        """
        nearest = self._nearest(scale[0].reciprocal())
        q = self._clamped(nearest, None if zero is None else zero[0], self._whole)
        square = torch.bmm(self.c, torch.mul(q, q, out=self._points))
        return torch.bmm(self.c, q.mul_(self.parts)).div_(square).transpose(0, 1)

    def _nearest(self, finer: torch.Tensor) -> torch.Tensor:
        """The nearest whole numbers for scales of which `finer` [groups, out] is the reciprocal."""
        return torch.round(torch.mul(self.parts, finer.unsqueeze(1), out=self._points), out=self._free)

    def _clamped(self, nearest: torch.Tensor, zero: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        """The nearest integers of the grid, less its zeros [groups, out]."""
        if zero is None:
            return torch.clamp(nearest, self.low, self.high, out=out)
        return torch.clamp(nearest, (self.low - zero).unsqueeze(1), (self.high - zero).unsqueeze(1), out=out)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """A scale that underflowed in its dtype becomes the smallest normal number of it."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)
