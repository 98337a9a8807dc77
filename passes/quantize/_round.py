"""Learned rounding (SignRound, arXiv 2309.05516): where each weight goes, and how far each group reaches, by descent.

Pure: tensors in, tensors out. A weight is ``s * (clip(round(c / s + z + V)) - z)`` with V in [-0.5, 0.5] for every
weight and factors alpha, beta on the upper and lower end of every group's range. `round` passes gradients straight
through, `clip` where it does nothing, and every parameter moves by the sign of its gradient alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ...compress.runtime.grid import Grid
from ._rtn import groups_of

REACH = (0.5, 1.5)  # alpha and beta: shares of the range that the search starts with
CHECKS = 5  # how often a descent is judged on all of its data


class Rounding:
    """A weight [out, in] whose rounding is learned.

    Attributes:
        centre: [out, groups, columns] float32, what is rounded while V is 0.
        shift: V, like `centre`. upper, lower: alpha and beta, [out, groups]; symmetric grids have alpha alone.

    Args:
        centre: [out, in]. grid: what the search starts from; its dtype is that of the scales.
    """

    def __init__(self, centre: torch.Tensor, grid: Grid) -> None:
        self.start = grid
        self.shape = centre.shape
        self.centre = groups_of(centre.detach().float(), grid.group)
        self.shift = torch.zeros_like(self.centre)
        scale = grid.scale.float()
        self.upper, self.lower = torch.ones_like(scale), torch.ones_like(scale)
        if grid.zero is not None:
            self._top, self._bottom = ((end - grid.zero.float()) * scale for end in (grid.high, grid.low))

    def grid(self) -> Grid:
        """The grid as it now is."""
        start, dtype = self.start, self.start.scale.dtype
        if start.zero is None:
            return Grid(start.bits, start.group, True, _nonzero(self.upper * start.scale.float(), dtype))
        scale = _nonzero((self.upper * self._top - self.lower * self._bottom) / (start.high - start.low), dtype)
        zero = self._wanted_zero(scale).clamp(start.low, start.high)
        return Grid(start.bits, start.group, False, scale, zero.to(torch.int8))

    def _wanted_zero(self, scale: torch.Tensor) -> torch.Tensor:
        """The zero points that put the lower end of the range where beta says, before they are clipped."""
        return (self.start.low - self.lower * self._bottom / scale.float()).round()

    def value(self) -> torch.Tensor:
        """The rounded weight [out, in], float32: a point of `grid()`, bit for bit."""
        _, scale, zero, q, _ = self._parts()
        return ((q - zero) * scale).to(self.start.scale.dtype).float().reshape(self.shape)

    def gradients(self, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The gradients of V, alpha and beta (None where symmetric) from that of the value, `slope` [out, in]."""
        grid, scale, zero, q, inside = self._parts()
        slope = slope.float().reshape(self.centre.shape)
        passed = slope * inside
        of_shift = passed * scale
        of_scale = (slope * (q - zero) - passed * (self.centre / scale)).sum(-1)
        if grid.zero is None:
            return of_shift, of_scale * self.start.scale.float(), None
        reach, scale = grid.high - grid.low, scale.squeeze(-1)
        wanted = self._wanted_zero(grid.scale)
        free = ((wanted >= grid.low) & (wanted <= grid.high)).float()
        of_zero = free * ((passed - slope).sum(-1) * scale)  # a zero point moves what is clipped, and nothing else
        of_scale = of_scale + of_zero * self.lower * self._bottom / scale.square()
        return of_shift, of_scale * self._top / reach, -self._bottom * (of_scale / reach + of_zero / scale)

    def move(
        self, gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], rate: float, clip_rate: float
    ) -> None:
        """One step against the signs of the gradients: V by `rate`, alpha and beta by `clip_rate`."""
        shift, upper, lower = gradients
        self.shift.sub_(rate * shift.sign()).clamp_(-0.5, 0.5)
        self.upper.sub_(clip_rate * upper.sign()).clamp_(*REACH)
        if lower is not None:
            self.lower.sub_(clip_rate * lower.sign()).clamp_(*REACH)

    def state(self) -> tuple[torch.Tensor, ...]:
        """A copy of what is learned; `restore` takes it."""
        return self.shift.clone(), self.upper.clone(), self.lower.clone()

    def restore(self, state: tuple[torch.Tensor, ...]) -> None:
        self.shift, self.upper, self.lower = (part.clone() for part in state)

    def _parts(self) -> tuple[Grid, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The grid; its scale and zero by group; the integers and which of them are not clipped, by column."""
        grid = self.grid()
        scale = grid.scale.float()[..., None]
        zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.float()[..., None]
        free = (self.centre / scale + self.shift).round() + zero
        return grid, scale, zero, free.clamp(grid.low, grid.high), (free >= grid.low) & (free <= grid.high)


@dataclass
class Course:
    """How a descent went.

    Attributes:
        start, best: the loss on all data before it, and with what was kept. kept: the step that this was, 0 the start.
        skipped: steps whose loss or gradient was not finite.
    """

    start: float
    best: float
    kept: int = 0
    skipped: int = 0


def descend(
    roundings: Sequence[Rounding],
    slopes: Callable[[list[torch.Tensor]], tuple[float, list[torch.Tensor | None]]],
    loss: Callable[[list[torch.Tensor]], float],
    steps: int,
    rate: float = 1.0,
    clip_rate: float = 1.0,
) -> Course:
    """Learn `roundings` in place by sign descent, at a rate that falls to 0 in a straight line.

    What is kept is what had the least `loss` of `CHECKS` + 1 states, the start among them: never worse than that.

    Args:
        rate: of V at the first step, times `steps` (the paper's is 1). clip_rate: the same of alpha and beta.
        slopes: the loss of the next draw of data and its gradients, from the values of all roundings; None is 0.
        loss: the loss on all data.
    """
    values = [rounding.value() for rounding in roundings]
    start = loss(values)
    course = Course(start, start)
    if not math.isfinite(course.start):
        return course
    best = [rounding.state() for rounding in roundings]
    checks = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    for step in range(steps):
        value, found = slopes(values)
        if math.isfinite(value) and all(g is None or bool(torch.isfinite(g).all()) for g in found):
            for rounding, slope in zip(roundings, found, strict=True):
                if slope is not None:
                    now = (1 - step / steps) / steps
                    rounding.move(rounding.gradients(slope), rate * now, clip_rate * now)
            values = [rounding.value() for rounding in roundings]
        else:
            course.skipped += 1
        if step + 1 in checks:
            judged = loss(values)
            if judged < course.best:
                course.best, course.kept = judged, step + 1
                best = [rounding.state() for rounding in roundings]
    for rounding, state in zip(roundings, best, strict=True):
        rounding.restore(state)
    return course


def compensated(w: torch.Tensor, rounded: torch.Tensor, factor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """What GPTQ had in every column when it came to round it: the weight after the errors of the columns before.

    With ``W - Q = E U`` (U upper triangular, columns in the order that they were taken), column i was
    ``q_i + E_i U_ii``.

    Args:
        w: [out, in], the weight. rounded: [out, in], GPTQ's result. factor: U [in, in]. order: [in].
    """
    difference = (w - rounded)[:, order].to(factor.dtype)
    errors = torch.linalg.solve_triangular(factor, difference, upper=True, left=False)
    before = torch.empty_like(difference)
    before[:, order] = rounded[:, order].to(factor.dtype) + errors * factor.diagonal()
    return before.float()


def draws(parts: int, each: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Without end: `each` of the numbers below `parts`, every one once before any comes again."""
    left: list[int] = []
    while True:
        taken: list[int] = []
        while len(taken) < each:
            left = left or torch.randperm(parts, generator=generator).tolist()
            taken.append(left.pop())
        yield taken


def _nonzero(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` in `dtype`, with its sign, and not smaller than the smallest normal number."""
    size = scale.to(dtype).abs().clamp(min=torch.finfo(dtype).tiny)
    return torch.where(scale < 0, -size, size)
