"""A model whose residual stream is narrower, the slow way: the whole model, its gone channels silent everywhere.

Written without svlm's groups: nothing is cut. Every norm of the stream looks at the channels that stay and returns
zeros for the others, and what a block returns is zero there, so no reader ever sees a channel that is gone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def silence(model: nn.Module, blocks: Sequence[nn.Module], width: int, stay: Sequence[int], skip: str = "") -> None:
    """Hook `model` so that it behaves as if its stream of `width` channels had those of `stay` alone.

    Args:
        blocks: the blocks that the stream runs through. skip: modules with this in their name are let be.
    """
    for name, module in model.named_modules():
        if not type(module).__name__.endswith(("Norm", "RMSNorm", "LayerNorm")) or (skip and skip in name):
            continue
        size = next(module.parameters()).numel()
        if size in (width, 4 * width):  # of one token, or of four that a merger joins
            places = torch.cat([torch.tensor(list(stay)) + start for start in range(0, size, width)])
            module.forward = _narrow_norm(module, places)  # type: ignore[method-assign]
    mask = torch.zeros(width)
    mask[list(stay)] = 1
    for block in blocks:
        block.register_forward_hook(_masked(mask))


def _narrow_norm(norm: nn.Module, places: Tensor) -> Callable[[Tensor], Tensor]:
    small = copy.deepcopy(norm)
    for key, parameter in list(small.named_parameters(recurse=False)):
        setattr(small, key, nn.Parameter(parameter.detach()[places]))
    if isinstance(small, nn.LayerNorm):
        small.normalized_shape = (len(places),)

    def forward(x: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=x.dtype)
        out[..., places] = small(x[..., places])
        return out

    return forward


def _masked(mask: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (out[0] * mask, *out[1:])
        return out * mask

    return hook
