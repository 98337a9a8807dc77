"""Training the scales of quantized linears while their integers stand (EfficientQAT, arXiv 2407.11062, phase 2)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...compress.runtime.grid import Grid, quantize


@dataclass
class Loose:
    """A linear whose scales move: scale = (1 + `move`) * the grid's scale, rounded as they are saved.

    Attributes:
        grid: the linear's. ints: [out, in] float32, integers less zero points. move: [out, groups], starts at zero.
    """

    linear: nn.Linear
    grid: Grid
    ints: Tensor
    move: nn.Parameter

    @classmethod
    def of(cls, linear: nn.Linear, grid: Grid) -> Loose:
        ints = quantize(linear.weight.detach(), grid).float()
        if grid.zero is not None:
            ints -= grid.zero.float().repeat_interleave(ints.shape[1] // grid.zero.shape[1], 1)
        return cls(linear, grid, ints, nn.Parameter(torch.zeros_like(grid.scale, dtype=torch.float32)))

    @property
    def scale(self) -> Tensor:
        """[out, groups] float32, with the dtype's steps and, straight through them, a gradient."""
        return _rounded(self.grid.scale.float() * (1 + self.move), self.grid.scale.dtype)

    @property
    def weight(self) -> Tensor:
        """[out, in] float32: what the scales and integers make, as it would be loaded."""
        parts = self.ints.unflatten(1, (self.move.shape[1], -1))
        return _rounded((parts * self.scale.unsqueeze(-1)).flatten(1), self.grid.scale.dtype)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` rounded to `dtype`, its gradient as if it were not."""
    return value + (value.detach().to(dtype).to(value.dtype) - value.detach())


@contextmanager
def loosened(linears: Sequence[nn.Linear], grids: Sequence[Grid]) -> Iterator[list[Loose]]:
    """Linears run with the scales that are being trained inside the `with`. `settle` makes them stay."""
    loose = [Loose.of(linear, grid) for linear, grid in zip(linears, grids, strict=True)]
    try:
        for one in loose:
            one.linear.forward = functools.partial(_forward, one)  # type: ignore[method-assign]
        yield loose
    finally:
        for one in loose:
            one.linear.__dict__.pop("forward", None)


def _forward(loose: Loose, x: Tensor) -> Tensor:
    return F.linear(x, loose.weight.to(x.dtype), loose.linear.bias)


@torch.no_grad()
def settle(loose: Sequence[Loose]) -> None:
    """Give every linear and its grid the trained scales."""
    for one in loose:
        one.linear.weight.copy_(one.weight)
        one.grid.scale = one.scale.to(one.grid.scale.dtype)
