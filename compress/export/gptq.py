"""The layout that AutoGPTQ introduced, as transformers + optimum + gptqmodel load it. svlm's integers, packed anew.

For a linear `X` of [out, in] with `groups` scales a row::

    X.qweight  int32 [in * bits / 32, out]        integers + 2^(bits-1), dense along the inputs
    X.qzeros   int32 [groups, out * bits / 32]    zero points + 2^(bits-1), dense along the outputs; v1 stores one less
    X.scales   fp16  [groups, out]
    X.g_idx    int32 [in]                         the group of each input

checkpoint_format `gptq` (v1) cannot store a zero point of 0 (one less does not fit its field, and loaders add the one
back to whole words, so that it would spill into the neighbour): such a model needs `gptq_v2`.

optimum replaces the linears (and convolutions) whose path begins with `block_name_to_quantize` and ends with one of
`modules_in_block_to_quantize`. Whole paths serve as endings, so that vision tower and connector can be packed as well.
"""

from __future__ import annotations

import torch
from torch import nn

from .. import __version__
from ..anatomy import ModelView
from ..base import Json
from ..errors import UsageError
from ..runtime.grid import Grid, pack
from .common import Choice, Rounded, choose, dense_notes, half_scales, integers, spell_kind, zeros_of
from .table import FORMATS, spell


def pack_linear(q: torch.Tensor, zero: torch.Tensor, bits: int, *, v2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`qweight` [in * bits / 32, out] and `qzeros` [groups, out * bits / 32] of signed integers.

    Args:
        q: [out, in] int8. zero: [out, groups] int8. bits: 2, 3, 4 or 8.
        v2: zero points as they are; else one less, for which none may be the lowest integer.
    """
    qweight = pack(q.t().contiguous(), bits, dim=0)
    stored = zero if v2 else zero - 1
    return qweight.contiguous(), pack(stored.t().contiguous(), bits).contiguous()


def pack_model(
    view: ModelView, state: dict[str, torch.Tensor], name: str, *, dense: bool
) -> tuple[dict[str, torch.Tensor], Json, dict[str, str], list[str]]:
    """`state` with the quantized linears packed, config.json's `quantization_config`, what is left dense, and notes.

    Raises:
        UsageError: something cannot be expressed (see `choose`), or the loader does not take this kind of model.
    """
    kind = type(view.model)
    if kind.main_input_name != "input_ids":
        first = next(iter(view.grids), "")
        raise UsageError(
            f"{name}: transformers loads this format only into models whose main input is input_ids",
            where=first or str(view.source),
            found=f"{kind.__name__}, whose main input is {kind.main_input_name}",
            change="--format awq or --format compressed-tensors",
        )
    v2 = name == "gptq_v2"
    choice = choose(view, name, lambda path, module, grid: _obstacle(path, module, grid, v2), dense=dense, stub=True)
    packed, books = dict(state), Rounded()
    for path, grid in choice.packed.items():
        q = integers(path, packed.pop(f"{path}.weight"), grid)
        packed[f"{path}.qweight"], packed[f"{path}.qzeros"] = pack_linear(q, zeros_of(grid), grid.bits, v2=v2)
        packed[f"{path}.scales"] = half_scales(path, grid, q, books).t().contiguous()
        size = q.shape[1] // grid.scale.shape[1]
        packed[f"{path}.g_idx"] = torch.arange(q.shape[1], dtype=torch.int32) // size
    return packed, _config(view, choice, name), choice.dense, [books.sentence(), *dense_notes(choice.dense)]


def _obstacle(path: str, module: nn.Linear, grid: Grid, v2: bool) -> str:
    groups = FORMATS["gptq"].groups or ()
    multiple = 32 if grid.bits == 3 else 32 // grid.bits
    if grid.group not in groups:
        return f"it has groups of {grid.group}, and the loader reads {spell(groups)}"
    if module.in_features % multiple or module.out_features % multiple:
        sizes = f"{module.in_features} inputs and {module.out_features} outputs"
        return f"it has {sizes}, and {grid.bits} bits are packed by {multiple}"
    if path.rpartition(".")[2].isdigit():
        return "it is an item of a Sequential or ModuleList, which optimum does not replace"
    if not v2 and grid.zero is not None and int(grid.zero.min()) == grid.low:
        return "it has a zero point of 0, which v1 of the layout cannot store (gptq_v2 can)"
    return ""


def _config(view: ModelView, choice: Choice, name: str) -> Json:
    bits, group, symmetric = choice.kind
    prefix = _common_prefix(list(choice.packed))
    layers = [n for n, m in view.model.named_modules() if type(m) is nn.Linear or isinstance(m, nn.Conv2d)]
    every = {name for name in layers if name.startswith(prefix)} == set(choice.packed)
    return {
        "quant_method": "gptq",
        "checkpoint_format": name,
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": False,
        "damp_percent": 0.01,
        "true_sequential": True,
        "block_name_to_quantize": prefix,
        "modules_in_block_to_quantize": None if every else [sorted(choice.packed)],
        "meta": {"quantizer": [f"svlm:{__version__}"], "grid": spell_kind(choice.kind)},
    }


def _common_prefix(paths: list[str]) -> str:
    """The longest dotted path above all of `paths`; of one model's blocks, the list that holds them."""
    parents = [path.split(".")[:-1] for path in paths]
    shared: list[str] = []
    for words in zip(*parents):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return ".".join(shared)
