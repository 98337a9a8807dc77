"""The layouts of bitsandbytes, as stock transformers loads them: svlm's codes and integers, never quantized again.

For a linear `X` of [out, in] on a `Codebook` (`quantize.bnb` with 4 bits; svlm saves such linears this way itself)::

    X.weight                               uint8 [ceil(out * in / 2), 1]   two codes a byte, the first in the high half
    X.weight.absmax                        float32 [blocks], or uint8 codes of it
    X.weight.quant_map                     float32 [16]                    the levels
    X.weight.nested_absmax                 float32 [runs]                  where absmax is quantized too
    X.weight.nested_quant_map              float32 [256]                   likewise
    X.weight.quant_state.bitsandbytes__nf4 uint8, a JSON text              block size, shape, dtype, nested_offset

and for one on a symmetric 8-bit grid with a scale a row, whatever pass made it (LLM.int8, arXiv 2208.07339)::

    X.weight         int8 [out, in]    integers
    X.SCB            float32 [out]     127 times the scale: the absmax of the row
    X.weight_format  uint8 []          0: row after row

What bitsandbytes does with the inputs of 8-bit linears is a fact of its runtime, not of the weight: it rounds every
token to 8 bits but for the channels in which a value reaches `llm_int8_threshold` of config.json, 6 as in the paper.
`svlm.load` does not round them.

transformers replaces every nn.Linear that `llm_int8_skip_modules` and the class's `_keep_in_fp32_modules` do not name,
in one of the two layouts. bitsandbytes 0.50 writes wrong scales, silently, where a model that it has run on a CPU is
saved again without quantized absmax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..anatomy import ModelView
from ..base import Json
from ..errors import ModelError, UsageError, WorkFailed
from ..runtime.codebook import BLOCK, RUN, Codebook, codebooks, dynamic_map, pack, table, unpack
from ..runtime.grid import Grid
from .awq import skipped, unpacked_modules
from .common import INPUT_ROUNDED, dense_notes, integers, kind_of, settle

THRESHOLD = 6.0
STATE = "weight.quant_state.bitsandbytes__"


def packed_codebooks(view: ModelView, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with the weight of everything on a codebook replaced by its codes.

    Raises:
        WorkFailed: a weight is off its codebook; packing it would change the model.
    """
    packed = dict(state)
    for path, book in codebooks(view.grids).items():
        whole = state[f"{path}.weight"]
        packed = {name: tensor for name, tensor in packed.items() if tensor is not whole}  # a tied head goes with it
        packed |= _four_bits(path, whole.float(), book)
    return packed


def _four_bits(path: str, weight: torch.Tensor, book: Codebook) -> dict[str, torch.Tensor]:
    if share := book.off_grid(weight):
        raise WorkFailed(
            "a quantized weight is off its codebook", where=path, found=f"{100 * share:.2f} % of its values"
        )
    facts: dict[str, Json] = {"quant_type": book.levels, "blocksize": BLOCK, "dtype": book.dtype}
    facts["shape"] = list(weight.shape)
    tensors = {"weight": pack(book.quantize(weight)), "weight.absmax": book.absmax.contiguous()}
    tensors["weight.quant_map"] = table(book.levels)
    if book.nested is not None and book.offset is not None:
        facts |= {"nested_blocksize": RUN, "nested_dtype": "float32", "nested_offset": float(book.offset)}
        tensors |= {"weight.nested_absmax": book.nested, "weight.nested_quant_map": dynamic_map().clone()}
    tensors[STATE + book.levels] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def unpack_codebooks(
    tensors: Mapping[str, torch.Tensor], rows: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, torch.Tensor], dict[str, Codebook]]:
    """The inverse: ordinary weights in the dtype that they are saved in, and the codebooks by saved name.

    Args:
        rows: saved name -> `levels`.

    Raises:
        ModelError: a tensor is missing.
    """
    state, books = dict(tensors), {}
    for name, row in rows.items():
        try:
            levels = row["levels"]
            facts = json.loads(bytes(state.pop(f"{name}.{STATE}{levels}").tolist()))
            state.pop(f"{name}.weight.quant_map")
            absmax, nested, offset = state.pop(f"{name}.weight.absmax"), None, None
            if "nested_offset" in facts:
                state.pop(f"{name}.weight.nested_quant_map")
                nested = state.pop(f"{name}.weight.nested_absmax")
                offset = torch.tensor(facts["nested_offset"], dtype=torch.float32)
            out, columns = facts["shape"]
            book = Codebook(levels, facts["dtype"], absmax, nested, offset)
            codes = unpack(state[f"{name}.weight"], (out, columns))
        except KeyError as error:
            raise ModelError("the packed checkpoint lacks a tensor", where=name, found=str(error)) from error
        state[f"{name}.weight"] = book.dequantize(codes).to(getattr(torch, book.dtype))
        books[name] = book
    return state, books


def config_of(view: ModelView, packed: Mapping[str, Grid | Codebook]) -> Json:
    """config.json's `quantization_config` where exactly the linears in `packed`, all of one layout, are packed."""
    first = next(iter(packed.values()))
    four = isinstance(first, Codebook)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": first.levels if isinstance(first, Codebook) else "nf4",
        "bnb_4bit_use_double_quant": isinstance(first, Codebook) and first.double,
        "bnb_4bit_compute_dtype": str(view.storage_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": THRESHOLD,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": unpacked_modules(view.model, set(packed)),
    }


def stock_obstacle(view: ModelView) -> str:
    """Why stock transformers cannot load the codebooks that are saved of `view`; "" where it can, or has none."""
    books = codebooks(view.grids)
    if not books:
        return ""
    if len(books) < len(view.grids):
        return "it reads integers with scales or bitsandbytes' codes, not both in one model"
    left = (_obstacle(view, path) for path in books)
    return next((f"{path}: {why}" for path, why in zip(books, left) if why), "")


def _obstacle(view: ModelView, path: str) -> str:
    module, kept = view.model.get_submodule(path), list(view.model._keep_in_fp32_modules or ())
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, and the loader packs nn.Linear only"
    if skipped(path, kept):
        return f"the loader keeps it dense (this class always skips {', '.join(kept)})"
    return ""


def pack_model(
    view: ModelView, state: dict[str, torch.Tensor], name: str, *, dense: bool
) -> tuple[dict[str, torch.Tensor], Json, dict[str, str], list[str]]:
    """`state` with the quantized linears packed, config.json's `quantization_config`, what is left dense, and notes.

    Raises:
        UsageError: nothing is quantized, or something cannot be expressed (see `settle`).
    """
    if not view.grids:
        raise UsageError(
            f"{name} holds quantized linears, and this model has none",
            where=str(view.source),
            change="run a recipe with quantize.bnb first",
        )

    def reason(path: str, grid: Grid | Codebook) -> str:
        if why := _obstacle(view, path):
            return why
        if isinstance(grid, Grid) and kind_of(grid) != (8, -1, True):
            return "it is on a grid that bitsandbytes has not: it reads 4-bit codes, and 8 bits with one scale a row"
        return INPUT_ROUNDED if path in view.activations else ""

    left = {path: why for path, grid in view.grids.items() if (why := reason(path, grid))}
    sizes = dict.fromkeys((Codebook, Grid), 0)
    for path, grid in view.grids.items():
        if path not in left:
            sizes[type(grid)] += view.weight(path).numel()
    chosen = max(sizes, key=lambda layout: sizes[layout])
    for path, grid in view.grids.items():
        if path not in left and type(grid) is not chosen:
            left[path] = f"it has {grid.bits} bits, and transformers loads 4 or 8 bits in a model, not both"
    settle(view, name, left, dense=dense)
    packed = {path: grid for path, grid in view.grids.items() if path not in left}
    result = dict(state)
    for path, grid in packed.items():
        weight = result.pop(f"{path}.weight")
        if isinstance(grid, Codebook):
            result |= _four_bits(path, weight.float(), grid)
        else:
            result[f"{path}.weight"] = integers(path, weight, grid)
            result[f"{path}.SCB"] = grid.scale.float().flatten() * 127
            result[f"{path}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    notes = dense_notes(left)
    if chosen is Grid:
        notes.append(
            f"bitsandbytes rounds the inputs of these linears to 8 bits, but for channels with values of {THRESHOLD:g} "
            "and more (llm_int8_threshold in config.json); svlm has not measured that"
        )
    return result, config_of(view, packed), left, notes
