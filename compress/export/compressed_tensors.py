"""The compressed-tensors layouts `pack-quantized` and `int-quantized`: what stock transformers loads.

For a linear `X` of [out, in]::

    X.weight_packed      int32 [out, ceil(in * bits / 32)]     integers + 2^(bits-1), dense along the inputs
    X.weight_scale       [out, groups]                         in the dtype of the checkpoint
    X.weight_zero_point  int32 [ceil(out * bits / 32), groups] asymmetric only, packed along the outputs
    X.weight_shape       int64 [2]

and where the linear rounds its input as well (`int-quantized`; `runtime/activations.py` has the arithmetic)::

    X.weight             int8 [out, in]                        integers
    X.weight_scale       [out, 1]                              in the dtype of the checkpoint
    X.input_scale        [1]                                   calibrated ranges only, in the dtype of the checkpoint
    X.input_zero_point   int8 [1]                              calibrated ranges only

transformers saves some families under older key names (`language_model.model...`) than their modules have. A target is
therefore a pattern of one linear that holds for both names.

`dequantize` makes transformers unpack while it loads, which it would do at the first forward anyway. The values come
out exactly, zero points have the shape that they have on disk (the other way takes them for unpacked and fails), and
towers that are initialised through `weight` (SigLIP) load too. transformers 5.23 reads ONE kind of grid this way (it
would take the first for all); a model with several goes the other way, which loads neither zero points nor a packed
SigLIP, nor a packed embedding. Where that would fail and the kinds differ in nothing but the group (a width that the
group does not divide), the kind with the most weights is packed and the few other linears are saved as they are, in 16
bits, their scales apart in `PLAIN_FILE`, which transformers does not read. `svlm.load` reads all of them;
`stock_obstacle` says what stock transformers does not read.

A token embedding is packed like a linear. A head that shares its weight has no tensors of its own: it is tied again
when the embedding is there.

A model that rounds inputs goes the other way, too: transformers leaves the rounding out of what it unpacks while it
loads. 8-bit linears load that way in every family, and their inputs are rounded; symmetric packed ones beside them
load unless transformers initialises them through their weight (SigLIP, T5). Such a mixture, and one with zero points,
is for `svlm.load` alone. A scale a token is one for the first two dimensions in compressed-tensors, which is a token
where inputs are [batch, tokens, channels]; what works on [tokens, channels] (Qwen's towers, OPT) gets a coarser scale
there than svlm has measured.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..anatomy import ModelView
from ..base import Json
from ..errors import ModelError, WorkFailed
from ..runtime.codebook import integer_grids
from ..runtime.grid import Grid, dequantize, off_grid, pack, quantize, unpack
from . import bnb

METHOD = "compressed-tensors"
PACKED, INT = "pack-quantized", "int-quantized"
PLAIN_FILE = "svlm_plain_grids.safetensors"  # scales and zero points of linears on a grid that are not packed


def plain_paths(view: ModelView) -> set[str]:
    """The linears on a grid that are saved unpacked, so that stock transformers loads the rest: see above."""
    if view.activations:
        return set()
    grids = integer_grids(view.grids)
    kinds = {(grid.bits, grid.group, grid.symmetric) for grid in grids.values()}
    if len(kinds) < 2 or len({(bits, symmetric) for bits, _, symmetric in kinds}) > 1:
        return set()
    if all(symmetric for _, _, symmetric in kinds) and not _initialised_through_weight(view, grids):
        return set()
    weights = dict.fromkeys(sorted(kinds), 0)
    for path, grid in grids.items():
        weights[grid.bits, grid.group, grid.symmetric] += view.weight(path).numel()
    most = max(weights, key=lambda kind: weights[kind])
    return {path for path, grid in grids.items() if (grid.bits, grid.group, grid.symmetric) != most}


def stock_obstacle(view: ModelView) -> str:
    """Why stock transformers cannot load what is saved of `view`, where svlm.load can; "" where it can, too."""
    if why := bnb.stock_obstacle(view):
        return why
    packed = {path: grid for path, grid in integer_grids(view.grids).items() if path not in plain_paths(view)}
    if len({(grid.bits, grid.group, grid.symmetric) for grid in packed.values()}) < 2:
        return ""
    if not all(grid.symmetric for grid in packed.values()):
        return "it reads no zero points where a model has several kinds of grids"
    if _initialised_through_weight(view, packed):
        return (
            "where a model has several kinds of grids, it initialises modules through weights that are packed "
            "(embeddings, SigLIP's and T5's attention)"
        )
    return ""


def _initialised_through_weight(view: ModelView, paths: Iterable[str]) -> bool:
    """Whether transformers' own initialisation, which runs while it loads, fails where these linears have no weight."""
    with torch.device("meta"):
        blank = type(view.model)(copy.deepcopy(view.model.config))
    for path in paths:
        blank.get_submodule(path)._parameters.pop("weight")
    for module in blank.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    try:
        blank.initialize_weights()
    except AttributeError:
        return True
    return False


def plain_grids(view: ModelView, saved: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """What `PLAIN_FILE` holds, by saved name."""
    tensors = {}
    for path in sorted(plain_paths(view)):
        grid = integer_grids(view.grids)[path]
        tensors[f"{saved[path]}.weight_scale"] = grid.scale.contiguous()
        if grid.zero is not None:
            tensors[f"{saved[path]}.weight_zero_point"] = grid.zero.to(torch.int8).contiguous()
    return tensors


def quantization_config(view: ModelView, saved: Mapping[str, str]) -> dict[str, Json]:
    """config.json's `quantization_config`. `saved`: module path -> the name that the checkpoint gives it."""
    kinds: dict[tuple[int, int, bool, str], list[str]] = {}
    plain, activations = plain_paths(view), view.activations
    for path, grid in integer_grids(view.grids).items():
        if path in plain:
            continue
        rounding: str = activations[path].kind if path in activations else ""
        kinds.setdefault((grid.bits, grid.group, grid.symmetric, rounding), []).append(path)
    groups: dict[str, Json] = {}
    for number, ((bits, group, symmetric, rounding), paths) in enumerate(sorted(kinds.items())):
        names = [_pattern({path, saved[path]}) for path in sorted(paths)]
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if group == -1 else "group",
            "group_size": None if group == -1 else group,
            "dynamic": False,
        }
        groups[f"group_{number}"] = {"targets": names, "weights": weights, "format": INT if rounding else PACKED}
        if rounding:
            groups[f"group_{number}"]["input_activations"] = {
                "num_bits": 8,
                "type": "int",
                "symmetric": rounding == "token",
                "strategy": rounding,
                "dynamic": rounding == "token",
            }
    formats = {group["format"] for group in groups.values()}
    rest = {name for name, module in view.model.named_modules() if isinstance(module, nn.Linear)}
    rest -= set(integer_grids(view.grids)) - plain
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(rest),
        "dequantize": len(groups) == 1 and not activations,
    }


def _pattern(names: set[str]) -> str:
    """A target that matches exactly these names of one module."""
    if len(names) == 1:
        return next(iter(names))
    return f"re:^(?:{'|'.join(re.escape(name) for name in sorted(names))})$"


def packed_state(view: ModelView, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with the weight of every linear on a grid of integers replaced by these, scales and (where packed) shape.

    Raises:
        WorkFailed: a weight that should lie on its grid does not; packing it would change the model.
    """
    packed = dict(state)
    plain, activations = plain_paths(view), view.activations
    for path, grid in integer_grids(view.grids).items():
        weight = packed[f"{path}.weight"].float()
        share = off_grid(weight, grid)
        if share > 0:
            raise WorkFailed(
                "a quantized weight is off its grid", where=path, found=f"{100 * share:.2f} % of its values"
            )
        if path in plain:
            continue
        packed[f"{path}.weight_scale"] = grid.scale.contiguous()
        if path in activations:
            packed[f"{path}.weight"] = quantize(weight, grid)
            if activations[path].kind == "tensor":
                packed[f"{path}.input_scale"] = torch.tensor([activations[path].scale], dtype=grid.scale.dtype)
                packed[f"{path}.input_zero_point"] = torch.tensor([activations[path].zero], dtype=torch.int8)
            continue
        whole = state[f"{path}.weight"]
        packed = {name: tensor for name, tensor in packed.items() if tensor is not whole}  # a tied head goes with it
        packed[f"{path}.weight_packed"] = pack(quantize(weight, grid), grid.bits)
        packed[f"{path}.weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
        if grid.zero is not None:
            packed[f"{path}.weight_zero_point"] = pack(grid.zero.to(torch.int8), grid.bits, dim=0)
    return packed


def unpack_state(
    tensors: Mapping[str, torch.Tensor], rows: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, torch.Tensor], dict[str, Grid]]:
    """The inverse: ordinary weights in the dtype of the scales, and the grids by saved name.

    Args:
        rows: saved name -> bits, group, symmetric, and whether it is `plain` or of 8-bit integers (`int`), not packed.

    Raises:
        ModelError: a packed tensor is missing.
    """
    state, grids = dict(tensors), {}
    for name, row in rows.items():
        try:
            if row.get("plain"):
                scale, zero = state.pop(f"{name}.weight_scale"), state.pop(f"{name}.weight_zero_point", None)
                grids[name] = Grid(row["bits"], row["group"], row["symmetric"], scale, zero)
                continue
            if row.get("int"):
                grid = Grid(row["bits"], row["group"], row["symmetric"], state.pop(f"{name}.weight_scale"))
                state[f"{name}.weight"] = dequantize(state[f"{name}.weight"], grid).to(grid.scale.dtype)
                for more in ("input_scale", "input_zero_point"):  # the ledger has them
                    state.pop(f"{name}.{more}", None)
                grids[name] = grid
                continue
            words, scale = state.pop(f"{name}.weight_packed"), state.pop(f"{name}.weight_scale")
            out, columns = (int(n) for n in state.pop(f"{name}.weight_shape"))
            zero = None
            if not row["symmetric"]:
                stored = state.pop(f"{name}.weight_zero_point")
                zero = unpack(stored, row["bits"], (out, scale.shape[1]), dim=0)
        except KeyError as error:
            raise ModelError("the packed checkpoint lacks a tensor", where=name, found=str(error)) from error
        grid = Grid(row["bits"], row["group"], row["symmetric"], scale, zero)
        state[f"{name}.weight"] = dequantize(unpack(words, row["bits"], (out, columns)), grid).to(scale.dtype)
        grids[name] = grid
    return state, grids
