"""AutoAWQ's GEMM layout, as transformers + gptqmodel load it: 4 bits. svlm's integers, packed anew.

For a linear `X` of [out, in] with `groups` scales a row::

    X.qweight  int32 [in, out / 8]       integers + 8, eight outputs a word
    X.qzeros   int32 [groups, out / 8]   zero points + 8, in the same order
    X.scales   fp16  [groups, out]

Of eight neighbouring outputs, number 0, 2, 4, 6, 1, 3, 5, 7 lie at bits 0, 4, 8, ... of the word. Symmetric grids are
written with zero points of 8: the same values, and every loader of the layout reads zero points.

transformers replaces every nn.Linear that `modules_to_not_convert` does not name; that list names what is not packed.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..anatomy import ModelView
from ..base import Json
from ..errors import WorkFailed
from ..runtime.grid import Grid
from .common import Rounded, choose, dense_notes, half_scales, integers, zeros_of
from .table import FORMATS, spell

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4


def pack_outputs(q: torch.Tensor) -> torch.Tensor:
    """Signed 4-bit integers [rows, out] as int32 [rows, out / 8], eight outputs a word in `ORDER`."""
    nibbles = (q.to(torch.int64) + 8).view(q.shape[0], -1, 8)[..., list(ORDER)]
    words = (nibbles << torch.arange(0, 32, BITS)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def pack_model(
    view: ModelView, state: dict[str, torch.Tensor], name: str, *, dense: bool
) -> tuple[dict[str, torch.Tensor], Json, dict[str, str], list[str]]:
    """`state` with the quantized linears packed, config.json's `quantization_config`, what is left dense, and notes.

    Raises:
        UsageError: something cannot be expressed (see `choose`).
    """
    kept = _always_kept(view.model)

    def obstacle(path: str, module: nn.Linear, grid: Grid) -> str:
        if skipped(path, kept):
            return f"the loader keeps it dense (it always skips {', '.join(kept)})"
        return _obstacle(module, grid)

    choice = choose(view, name, obstacle, dense=dense)
    packed, books = dict(state), Rounded()
    for path, grid in choice.packed.items():
        q = integers(path, packed.pop(f"{path}.weight"), grid)
        packed[f"{path}.qweight"] = pack_outputs(q.t())
        packed[f"{path}.qzeros"] = pack_outputs(zeros_of(grid).t())
        packed[f"{path}.scales"] = half_scales(path, grid, q, books).t().contiguous()
    config = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": choice.kind[1],
        "zero_point": True,
        "modules_to_not_convert": unpacked_modules(view.model, set(choice.packed)),
        "meta": {"quantizer": [f"svlm:{__version__}"]},
    }
    return packed, config, choice.dense, [books.sentence(), *dense_notes(choice.dense)]


def _obstacle(module: nn.Linear, grid: Grid) -> str:
    groups = FORMATS["awq"].groups or ()
    if grid.bits != BITS:
        return f"it has {grid.bits} bits, and the layout {BITS}"
    if grid.group not in groups:
        return f"it has groups of {grid.group}, and the loader reads {spell(groups)}"
    if module.out_features % 8:
        return f"it has {module.out_features} outputs, and the layout packs them by 8"
    return ""


def unpacked_modules(model: nn.Module, packed: set[str]) -> list[str]:
    """The shortest list of module paths that covers every nn.Linear but those in `packed`.

    transformers skips a linear whose path begins with a name of the list (up to a dot) or ends with it.
    """
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left: list[str] = []
    for name in sorted(linears - packed):
        words = name.split(".")
        above = (".".join(words[:depth]) for depth in range(1, len(words) + 1))
        covering = next(path for path in above if not any(p == path or p.startswith(f"{path}.") for p in packed))
        if covering not in left:
            left.append(covering)
    wrong = [path for path in sorted(packed) if skipped(path, left)]
    if wrong:
        raise WorkFailed("the loader would take a packed linear for one that is not", where=wrong[0], found=str(left))
    return left


def skipped(path: str, keys: list[str]) -> bool:
    """transformers' rule: a key matches from the start up to a dot, or as the end."""
    return any(re.match(rf"(?:{key})(?:\.|$)", path) or path.endswith(key) for key in keys)


def _always_kept(model: Any) -> list[str]:
    """What transformers never converts: the last module, and what the class wants in 32 bits."""
    return [list(model.named_parameters())[-1][0].removesuffix(".weight"), *(model._keep_in_fp32_modules or ())]
