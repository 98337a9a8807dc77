"""Two streams of inputs to the same linear: what the untouched model feeds it, and what the rounded prefix feeds it.

GPTAQ (Li et al., arXiv 2504.02692) wants ``D = 2 E[(x_original - x) x^T]`` over the same tokens. `Kept` holds the
original inputs of a stage, `Drift` pairs them with the others as they come by.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from ...calib.stats import Hessian
from ...calib.walk import Walk, WalkUnit
from ...compress.anatomy import LinearRef, ModelView, view_of
from ...compress.base import Context


class Kept:
    """The inputs of a linear, one [tokens, channels] a call, padding included."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        del weights
        self.rows.append(x.detach().clone())


class Drift(Hessian):
    """The Hessian of the inputs, and how far the original inputs lie from them.

    Attributes:
        cross: [channels, channels], weighted mean of ``2 (x_original - x) x^T``; None where the calls cannot be paired
            (an expert that other tokens visit now).
    """

    def __init__(self, originals: Kept) -> None:
        super().__init__()
        self.cross: torch.Tensor | None = torch.zeros(0, 0)
        self._left = iter(originals.rows)

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        before = self.weight
        super().update(x, weights)
        original = next(self._left, None)
        if self.cross is None or original is None or original.shape != x.shape:
            self.cross = None
            return
        if self.cross.numel() == 0:
            self.cross = torch.zeros_like(self.matrix)
        if self.weight == before:
            return
        scaled = x.detach().to(self.dtype) * (weights.to(self.dtype) * (2 / self.weight))[:, None]
        apart = original.to(self.dtype) - x.detach().to(self.dtype)
        self.cross.mul_(before / self.weight).addmm_(apart.T, scaled)


class Twin:
    """The model as it is before the pass, walked in step with it."""

    def __init__(self, model: ModelView, ctx: Context, where: tuple[str, ...] | str) -> None:
        view = view_of(copy.deepcopy(model.model), rows=[model.family])
        view.storage_dtype = model.storage_dtype
        self._units: Iterator[WalkUnit] = iter(Walk(view, ctx.fit, where, name="twin"))
        self._unit: WalkUnit | None = None

    def follow(self, name: str) -> None:
        """Go on to the unit `name`. Units that a resumed walk restored are run through, so that nothing differs."""
        self._unit = next(unit for unit in self._units if unit.name == name)

    def inputs(self, stage: tuple[LinearRef, ...]) -> dict[str, Kept]:
        """The original inputs of the linears of this unit at the same places as `stage`, by path."""
        assert self._unit is not None
        paths = {ref.path for ref in stage}
        same = [ref for ref in self._unit.linears if ref.path in paths]
        return {ref.path: kept for ref, kept in self._unit.observe(Kept, same, "uniform").items()}
