"""What merging needs to know of a vision tower: what is inside its blocks, and which of its tokens are patches."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...compress.anatomy import ModelView, Unit
from ...compress.base import evaluating
from ...compress.errors import Unmet
from ...compress.runtime.merge import Inside


class _Reached(BaseException):
    """Stops a forward when what was wanted is there."""


def inside(unit: Unit) -> Inside:
    """Where attention, MLP and keys are in a block that has no `obstacle`."""
    attention, mlp = unit.attention, unit.mlp
    assert attention is not None and mlp is not None
    keys = attention.k or attention.qkv
    assert keys is not None
    start = len(unit.path) + 1
    return Inside(
        attention.module[start:],
        mlp.down.rpartition(".")[0][start:],
        keys[start:],
        attention.head_dim,
        fused=attention.k is None,
    )


def obstacle(unit: Unit, proportional: bool) -> str:
    """Why the tokens of this block cannot be merged; the empty string where they can."""
    kind, attention, mlp = type(unit.module).__name__, unit.attention, unit.mlp
    if attention is None or mlp is None:
        return f"its {kind} has no attention over tokens with an MLP after it"
    if attention.rotary:
        return (
            f"its {kind} rotates queries and keys by the place of their patch, of pictures packed in one row without a "
            "mask: a merged token has no place of its own there, nor more weight than a single one"
        )
    if any(ref.norm is None for ref in unit.linears if ref.path in (attention.k, attention.qkv, mlp.up)):
        return f"its {kind} cuts windows, or has its norms after the residual: it does not fall into two halves"
    if not mlp.down.rpartition(".")[0].startswith(f"{unit.path}."):
        return f"the MLP of its {kind} is no module of its own"
    module = unit.module.get_submodule(attention.module[len(unit.path) + 1 :])
    if proportional and "attention_mask" not in inspect.signature(type(module).forward).parameters:
        return f"its {type(module).__name__} takes no attention mask, so that a merged token cannot weigh more"
    return ""


def tokens_and_patches(model: ModelView, block: nn.Module, batch: Mapping[str, Any]) -> tuple[int, int]:
    """How long the sequence is that enters the tower's `block`, and how many patches the tower's convolution made.

    Raises:
        Unmet: the forward does not reach the block, or no convolution runs before it.
    """
    tokens: list[int] = []
    places: list[int] = []

    def arrived(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens.append(args[0].shape[1])
        raise _Reached

    convolutions = [module for module in model.tower.modules() if isinstance(module, nn.Conv2d)]
    handles: list[Any] = [
        module.register_forward_hook(lambda _, args, out: places.append(out.shape[-2] * out.shape[-1]))
        for module in convolutions
    ]
    handles.append(block.register_forward_pre_hook(arrived))
    device = model.model.device
    given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    try:
        with evaluating(model.model):
            model.model(**given)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not tokens or not places or not 0 < places[-1] <= tokens[0]:
        raise Unmet(
            "which tokens of the vision tower are patches cannot be told",
            where=f"family {model.family.name}",
            found=f"{tokens[:1] or 'no'} tokens in its blocks, {places[-1:] or 'no'} places of a convolution",
        )
    return tokens[0], places[-1]
