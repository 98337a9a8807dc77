"""What `svlm inspect` shows of a model: its parts, their size, its visual tokens. Works without processor and data."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import nn

from .anatomy import ModelView, Unit
from .base import Json
from .runtime.codebook import Codebook


def inspect_table(view: ModelView, batch: Mapping[str, Any] | None = None) -> dict[str, Json]:
    """The anatomy as plain JSON values.

    Args:
        batch: model-ready tensors; with them the visual tokens of its first sample are counted where the config alone
            does not tell.

    Returns:
        family, class, source, storage dtype; for every part its blocks, linears, heads, parameters and bytes
        (`part_sizes`); visual tokens of an image (None: depends on the image); tied embeddings; smoothing pairs; norms;
        linears that are ignored, with the reason.
    """
    sizes = part_sizes(view)
    parts = {}
    for part, (count, stored) in sizes.items():
        units = view.parts.get(part, ())
        parts[part] = {
            "blocks": sum(unit.index is not None for unit in units),
            "block": ", ".join(dict.fromkeys(type(unit.module).__name__ for unit in units)),
            "linears": sum(len(unit.linears) for unit in units),
            "parameters": count,
            "bytes": stored,
            "heads": _heads(units),
        }
    whole = view.per_image()
    visual = None if whole is None else view.left_of([whole])
    if visual is None and batch is not None:
        visual = view.visual_tokens(batch)[0]
    linears = [name for name, module in view.model.named_modules() if isinstance(module, nn.Linear)]
    return {
        "family": view.family.name,
        "class": type(view.model).__name__,
        "source": view.source,
        "dtype": str(view.storage_dtype).removeprefix("torch."),
        "parts": parts,
        "parameters": sum(count for count, _ in sizes.values()),
        "bytes": sum(stored for _, stored in sizes.values()),
        "visual_tokens": visual,
        "tied_embeddings": view.tied_embeddings,
        "smoothing_pairs": sum(len(view.smoothing_pairs(unit)) for unit in view.units),
        "norms": sum("norm" in type(m).__name__.lower() for m in view.model.modules()),
        "ignored": {pattern: why for pattern, why in view.family.ignored.items() if fnmatch.filter(linears, pattern)},
    }


def part_sizes(view: ModelView) -> dict[str, tuple[int, int]]:
    """Parameters and bytes on disk of each part, in forward order; the input embedding is a part of its own.

    A shared parameter counts once (a tied head has none of its own). Weights on a grid count as packed integers, scales
    and zero points, those on a codebook as codes, absmax and tables. "other" is what lies in no part.
    """
    found = {part: [unit.module for unit in units] for part, units in view.parts.items()}
    order: dict[str, list[nn.Module]] = {  # what may lie inside another part's tower is counted before that one
        "connector": found.get("connector", []),
        "embeddings": [view.model.get_input_embeddings()],
        "vision": [view.tower],
        "language": [*found.get("language", []), view.decoder],
        "head": found.get("head", []),
        "other": [view.model],
    }
    names = {id(parameter): name for name, parameter in view.model.named_parameters()}
    seen: set[int] = set()
    sizes = {}
    for part, modules in order.items():
        fresh = {id(p): p for module in modules for p in module.parameters() if id(p) not in seen}
        seen |= set(fresh)
        bytes_ = sum(_stored(view, names[key], p.numel()) for key, p in fresh.items())
        sizes[part] = (sum(p.numel() for p in fresh.values()), bytes_)
    shown = ("vision", "connector", "embeddings", "language", "head", "other")
    return {part: sizes[part] for part in shown if sizes[part][0] or part in found}


def _stored(view: ModelView, name: str, count: int) -> int:
    grid = view.grids.get(name.removesuffix(".weight"))
    width = view.storage_dtype.itemsize
    if grid is None or not name.endswith(".weight"):
        return count * width
    if isinstance(grid, Codebook):
        return -(-count // 2) + grid.bytes
    zeros = 0 if grid.zero is None else grid.zero.numel() * grid.bits // 8
    return count * grid.bits // 8 + grid.scale.numel() * width + zeros


def _heads(units: tuple[Unit, ...]) -> str:
    """``"8"``, or ``"8/4"`` with fewer key-value heads."""
    kinds = {(u.attention.n_heads, u.attention.n_kv_heads) for u in units if u.attention is not None}
    return ", ".join(f"{q}" if q == kv else f"{q}/{kv}" for q, kv in sorted(kinds))
