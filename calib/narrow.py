"""Calibration in the 16 bits that a model is stored in, where the processor multiplies in them many times faster.

Weights lie in memory as float32 and are bfloat16 numbers all the same where the model is saved as such: handing them to
a matrix unit loses nothing. What they are multiplied with is rounded to bfloat16 inside a unit; sums, norms, and what
goes from unit to unit stay float32. Only what runs to take statistics is computed so: what is judged, compared or
learned from is not, nor is the head.

The processor's features decide, not a clock: a run that is resumed on the same machine computes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..compress.anatomy import ModelView, Unit
from ..compress.mapped import LARGE, all_away, is_mapped, release
from ..compress.runtime.merge import carried
from .replay import patched, swapped


def has_matrix_unit(device: torch.device) -> bool:
    """Whether bfloat16 products are much faster than float32 ones there: a CPU with AMX."""
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def narrow_dtype(view: ModelView) -> torch.dtype | None:
    """What the units of this model multiply in while statistics are taken; None: in float32."""
    narrow = view.storage_dtype is torch.bfloat16 and has_matrix_unit(view.model.device)
    return torch.bfloat16 if narrow else None


def narrowed(forward: Callable[..., Any], unit: Unit, dtype: torch.dtype | None) -> Callable[..., Any]:
    """The unit's `forward` with products in `dtype`; what it returns is float32 as ever."""
    if dtype is None or unit.part == "head":
        return forward

    def narrow(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(_in_one_piece, (args, kwargs))
        with torch.autocast(_device(unit), dtype, cache_enabled=False):
            out = forward(*args, **kwargs)
        return tree_map(lambda leaf: _wide(leaf, dtype), out)

    return narrow


@contextmanager
def narrowing(units: Iterable[Unit], dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, the forwards of these units are `narrowed`."""
    own = {unit: unit.module.forward for unit in units}
    made = {unit: narrowed(forward, unit, dtype) for unit, forward in own.items()}
    with patched({unit.module: made[unit] for unit in own if made[unit] is not own[unit]}):
        yield


@contextmanager
def narrow_weights(units: Iterable[Unit], dtype: torch.dtype | None, away: bool = False) -> Iterator[None]:
    """Inside, the units' linears hold their weights in `dtype`: made so once, and not at every call.

    Args:
        away: those of a model whose own weights lie in a file lie in one too; where there is no room for it, they are
            made at every call.
    """
    held: dict[Any, torch.Tensor] = {}
    for unit in units if dtype is not None else ():
        modules = [ref.module for ref in unit.linears if unit.part != "head"]
        made = []
        for module in modules:
            made.append(module.weight.detach().to(dtype))
            release(module.weight)
        if away and any(is_mapped(module.weight) for module in modules):
            made = all_away(made)
            if sum(weight.nbytes for weight in made) >= LARGE and not all(map(is_mapped, made)):
                continue
        held |= zip(modules, made)
    with swapped(held):
        yield


def _wide(leaf: Any, dtype: torch.dtype) -> Any:
    return carried(leaf.float(), leaf) if isinstance(leaf, torch.Tensor) and leaf.dtype is dtype else leaf


def _in_one_piece(leaf: Any) -> Any:
    """Patches that a convolution left channel by channel would stay so from block to block: each norm copies them."""
    whole = not isinstance(leaf, torch.Tensor) or leaf.is_contiguous() or 0 in leaf.stride()
    return leaf if whole else carried(leaf.contiguous(), leaf)


def _device(unit: Unit) -> str:
    return next(unit.module.parameters()).device.type
