"""LoRA on nn.Linear (arXiv 2106.09685): a low-rank update beside each frozen weight, merged at the end."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALE = 2.0  # alpha / rank, with alpha = 2 * rank as usual


@dataclass
class Adapter:
    """``y = linear(x) + SCALE * (x @ down^T) @ up^T``; `up` [out, rank] starts at zero, `down` [rank, in] at random."""

    linear: nn.Linear
    down: nn.Parameter
    up: nn.Parameter

    @property
    def update(self) -> Tensor:
        """What the adapter adds to the weight [out, in]."""
        return SCALE * (self.up @ self.down)


@contextmanager
def adapted(linears: Sequence[nn.Linear], rank: int, generator: torch.Generator) -> Iterator[list[Adapter]]:
    """Linears run their adapters as well inside the `with`, not afterwards. `merge` makes the update stay."""
    adapters = []
    for linear in linears:
        out, into = linear.weight.shape
        bound = 1 / math.sqrt(into)
        down = (torch.rand(rank, into, generator=generator) * 2 - 1) * bound
        device, dtype = linear.weight.device, linear.weight.dtype
        up = torch.zeros(out, rank, device=device, dtype=dtype)
        adapters.append(Adapter(linear, nn.Parameter(down.to(device, dtype)), nn.Parameter(up)))
    try:
        for adapter in adapters:
            adapter.linear.forward = functools.partial(_forward, adapter)  # type: ignore[method-assign]
        yield adapters
    finally:
        for adapter in adapters:
            adapter.linear.__dict__.pop("forward", None)


def _forward(adapter: Adapter, x: Tensor) -> Tensor:
    plain = F.linear(x, adapter.linear.weight, adapter.linear.bias)
    return plain + F.linear(F.linear(x, adapter.down), adapter.up) * SCALE


@torch.no_grad()
def merge(adapters: Sequence[Adapter]) -> None:
    """Add every adapter's update to its linear's weight."""
    for adapter in adapters:
        adapter.linear.weight.add_(adapter.update)
