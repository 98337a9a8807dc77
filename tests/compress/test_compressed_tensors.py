"""The packed layout, read by compressed-tensors itself and by stock transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.utils import match_named_modules
from torch import nn

from svlm import passes
from svlm.compress import storage
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.errors import ModelError, WorkFailed
from svlm.compress.export.compressed_tensors import (
    PLAIN_FILE,
    packed_state,
    plain_paths,
    quantization_config,
    unpack_state,
)
from svlm.compress.runtime.grid import dequantize, packed_bytes, quantize
from svlm.passes.quantize._rtn import absmax_grid
from tests import zoo

BF16 = torch.bfloat16
WEIGHT_INITIALISED = ("llava-onevision", "paligemma", "gemma3", "blip-2-t5")  # SigLIP towers and T5
KINDS = [(4, 16, True), (4, 16, False), (4, -1, False), (3, 16, True), (3, 16, False), (2, 16, False), (8, 16, True)]


def on_a_grid(bits: int, group: int, symmetric: bool, shape: tuple[int, int] = (33, 48)) -> tuple[torch.Tensor, Any]:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    grid = absmax_grid(w, bits, group, symmetric, BF16)
    return dequantize(quantize(w, grid), grid), grid


def rounded(view: ModelView, kinds: dict[str, tuple[int, int, bool]]) -> None:
    """Put the linears of each part on a grid of (bits, group, symmetric)."""
    view.storage_dtype = BF16
    storage.round_to_storage(view)
    for part, kind in kinds.items():
        for ref in view.linears(part):
            grid = absmax_grid(ref.module.weight.detach(), *kind, BF16)
            ref.module.weight.data.copy_(dequantize(quantize(ref.module.weight, grid), grid))
            view.grids[ref.path] = grid


@pytest.mark.parametrize(("bits", "group", "symmetric"), KINDS)
def test_compressed_tensors_itself_decompresses_to_our_values(bits: int, group: int, symmetric: bool) -> None:
    value, grid = on_a_grid(bits, group, symmetric)
    state = packed_state(
        SimpleNamespace(grids={"x": grid}, activations={}), {"x.weight": value.to(BF16), "x.bias": torch.ones(33)}
    )
    assert state.keys() == {"x.bias", "x.weight_packed", "x.weight_scale", "x.weight_shape"} | (
        set() if symmetric else {"x.weight_zero_point"}
    )
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    local = {k.removeprefix("x."): v for k, v in state.items() if k != "x.bias"}
    assert sum(t.numel() * t.element_size() for t in local.values()) == packed_bytes((33, 48), grid)
    assert torch.equal(PackedQuantizationCompressor.decompress(local, scheme)["weight"].float(), value)


@pytest.mark.parametrize(("bits", "group", "symmetric"), KINDS)
def test_unpacking_is_the_inverse(bits: int, group: int, symmetric: bool) -> None:
    value, grid = on_a_grid(bits, group, symmetric)
    state = packed_state(
        SimpleNamespace(grids={"x": grid}, activations={}), {"x.weight": value.to(BF16), "y": torch.ones(3)}
    )
    ours, grids = unpack_state(state, {"x": {"bits": bits, "group": group, "symmetric": symmetric}})
    assert ours.keys() == {"x.weight", "y"} and torch.equal(ours["x.weight"].float(), value)
    back = grids["x"]
    assert (back.bits, back.group, back.symmetric) == (bits, group, symmetric) and torch.equal(back.scale, grid.scale)
    assert back.zero is None if symmetric else torch.equal(back.zero, grid.zero)
    del state["x.weight_scale"]
    with pytest.raises(ModelError, match="lacks a tensor"):
        unpack_state(state, {"x": {"bits": bits, "group": group, "symmetric": symmetric}})


def test_a_weight_off_its_grid_is_not_packed() -> None:
    value, grid = on_a_grid(4, 16, True)
    value[2, 5] += 0.31 * float(grid.scale[2, 0])
    with pytest.raises(WorkFailed, match="off its grid") as caught:
        packed_state(SimpleNamespace(grids={"x": grid}, activations={}), {"x.weight": value})
    assert caught.value.where == "x"


def test_every_linear_is_a_target_under_both_of_its_names_or_ignored() -> None:
    view = view_of(zoo.model("llava"))
    rounded(view, {"vision": (4, 8, False), "language": (3, -1, True)})
    saved = {path: re.sub(r"^model\.language_model", "language_model.model", path) for path in view.grids}
    config = quantization_config(view, saved)
    groups = config["config_groups"].values()
    assert {(g["weights"]["num_bits"], g["weights"]["group_size"], g["weights"]["symmetric"]) for g in groups} == {
        (4, 8, False),
        (3, None, True),
    }
    linears = {name for name, module in view.model.named_modules() if isinstance(module, nn.Linear)}
    targets = [target for g in groups for target in g["targets"]]
    matched = [name for name, _ in match_named_modules(view.model, targets, config["ignore"])]
    assert sorted(matched) == sorted(view.grids), "each once, and nothing else"
    assert set(matched) | set(config["ignore"]) == linears and not set(matched) & set(config["ignore"])
    for path, old in saved.items():
        fits = [t for t in targets if old == t or (t.startswith("re:") and re.match(t[3:], old))]
        assert len(fits) == 1 and (path == fits[0] or re.match(fits[0][3:], path))


def saved(view: ModelView, batch: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    """The logits of `view`, which is saved and read back by svlm on the way."""
    with torch.no_grad():
        wanted = view.model(**batch).logits
    storage.save(view, folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    ours = storage.load_model(folder, find=passes.find)
    assert set(ours.grids) == set(view.grids)
    with torch.no_grad():
        torch.testing.assert_close(ours.model(**batch).logits, wanted, rtol=0, atol=0)
    return wanted


@pytest.mark.parametrize(("number", "family"), list(enumerate(zoo.FAMILIES)))
def test_stock_transformers_loads_what_is_saved(number: int, family: str, tmp_path: Path) -> None:
    """All parts on one kind of grid, another for each family; the same logits, with svlm and without."""
    from transformers import AutoModelForImageTextToText

    view, batch = view_of(zoo.model(family)), zoo.batch(family)
    parts = [part for part in ("vision", "connector", "language") if any(u.linears for u in view.parts.get(part, ()))]
    kind = [(4, -1, True), (4, -1, False), (3, -1, False), (8, -1, True), (2, -1, True)][number % 5]
    rounded(view, dict.fromkeys(parts, kind))
    wanted = saved(view, batch, tmp_path / "m")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, wanted, rtol=0, atol=0)


def test_groups_of_channels_load_in_stock_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    for symmetric in (True, False):
        view, batch = view_of(zoo.model("llava")), zoo.batch("llava")
        rounded(view, dict.fromkeys(("vision", "connector", "language"), (4, 8, symmetric)))
        wanted = saved(view, batch, tmp_path / str(symmetric))
        stock = AutoModelForImageTextToText.from_pretrained(tmp_path / str(symmetric), dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(stock(**batch).logits, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("number", "family"), list(enumerate(zoo.FAMILIES)))
def test_stock_transformers_loads_groups_of_several_sizes(number: int, family: str, tmp_path: Path) -> None:
    """What a group that does not divide every width makes; with zero points or a SigLIP the few are saved unpacked."""
    from transformers import AutoModelForImageTextToText

    symmetric = number % 2 == 0 or family == "gemma3"
    view, batch = view_of(zoo.model(family)), zoo.batch(family)
    parts = [part for part in ("vision", "connector", "language") if any(u.linears for u in view.parts.get(part, ()))]
    linears = view.linears(tuple(parts))
    view.storage_dtype = BF16
    storage.round_to_storage(view)
    for place, ref in enumerate(linears):
        group = -1 if place % 4 else ref.module.in_features // 2
        grid = absmax_grid(ref.module.weight.detach(), 4, group, symmetric, BF16)
        ref.module.weight.data.copy_(dequantize(quantize(ref.module.weight, grid), grid))
        view.grids[ref.path] = grid
    saved(view, batch, tmp_path / "m")
    ours = storage.load_model(tmp_path / "m", find=passes.find)
    for path, grid in view.grids.items():
        back = ours.grids[path]
        assert (back.bits, back.group, back.symmetric) == (grid.bits, grid.group, grid.symmetric)
        assert torch.equal(back.scale, grid.scale)
        assert back.zero is None if symmetric else torch.equal(back.zero, grid.zero)
    plain = plain_paths(view)
    assert bool(plain) == (not symmetric or family in WEIGHT_INITIALISED), family
    assert len(plain) < len(linears) / 2 and (tmp_path / "m" / PLAIN_FILE).exists() == bool(plain)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "m", dtype=BF16).eval()
    with torch.no_grad():
        stock(**{k: v.to(BF16) if v.is_floating_point() else v for k, v in batch.items()})  # unpacks where it must
    for ref in linears:
        assert torch.equal(stock.get_submodule(ref.path).weight.float(), ref.module.weight), ref.path


def test_several_kinds_of_grid_in_one_model(tmp_path: Path) -> None:
    """svlm reads any mixture; stock transformers a symmetric one."""
    from transformers import AutoModelForImageTextToText

    view, batch = view_of(zoo.model("llava")), zoo.batch("llava")
    rounded(view, {"vision": (3, 8, False), "connector": (8, -1, True), "language": (4, 8, True)})
    saved(view, batch, tmp_path / "zeros")
    view = view_of(zoo.model("llava"))
    rounded(view, {"vision": (3, 8, True), "connector": (8, -1, True), "language": (4, 8, True)})
    saved(view, batch, tmp_path / "symmetric")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "symmetric", dtype=BF16).eval()
    with torch.no_grad():
        stock(**{k: v.to(BF16) if v.is_floating_point() else v for k, v in batch.items()})  # unpacks now
    for ref in view.linears(("vision", "connector", "language")):
        assert torch.equal(stock.get_submodule(ref.path).weight.float(), ref.module.weight), ref.path
