"""Rounding of inputs: the arithmetic, the hook, and what compressed-tensors makes of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from svlm import passes
from svlm.compress import storage
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.errors import UsageError
from svlm.compress.export.common import choose
from svlm.compress.pipeline import logits_tolerance
from svlm.compress.runtime.activations import Activation, install, installed, remove
from svlm.compress.runtime.grid import dequantize, quantize
from svlm.passes.quantize._rtn import absmax_grid
from tests import zoo
from tests.oracles import int8 as oracle

TENSOR = Activation("tensor", 0.03125, -17)
# compressed-tensors takes one scale for the first two dimensions: not a token where there are no batches
FLAT = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "blip-2")


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 2


def test_rounding_equals_the_naive_one() -> None:
    x = values(7, 16)
    x[3] = 0
    step = (x.abs().amax(1, keepdim=True) / 127.5).clamp(min=1e-9)
    tie = ((x / step).abs().frac() - 0.5).abs() < 1e-4  # there either neighbour is nearest; the largest always is one
    found, wanted = Activation().round(x), oracle.per_token(x)
    torch.testing.assert_close(found[~tie], wanted[~tie], rtol=1e-6, atol=1e-6)
    assert float(((found - x).abs() / step).max()) < 0.501 and int(tie.sum()) < 12
    torch.testing.assert_close(TENSOR.round(x), oracle.per_tensor(x, 0.03125, -17), rtol=0, atol=0)
    low, high = TENSOR.limits
    assert float(TENSOR.round(torch.tensor([-99.0]))) == low and float(TENSOR.round(torch.tensor([99.0]))) == high
    assert float(TENSOR.round(torch.zeros(1))) == 0
    steps = (Activation().round(x[0]) * 127.5 / x[0].abs().max()).round()
    assert steps.unique().numel() > 8 and steps.min() >= -128 and steps.max() <= 127
    assert Activation().round(x.bfloat16()).dtype == torch.bfloat16
    assert Activation().round(torch.full((1, 4), float("nan"))).isnan().all(), "never hidden"


@pytest.mark.parametrize("activation", [Activation(), TENSOR])
def test_gradients_pass_straight_through_where_nothing_is_clipped(activation: Activation) -> None:
    x = values(4, 8)
    x[0, 0] = 50.0
    x.requires_grad_()
    out = activation.round(x)
    torch.testing.assert_close(out.detach(), activation.round(x.detach()), rtol=1e-6, atol=1e-6)
    out.sum().backward()
    clipped = (x < activation.limits[0]) | (x > activation.limits[1]) if activation.kind == "tensor" else x == 1e9
    assert x.grad is not None and torch.equal(x.grad, (~clipped).float())
    assert bool(clipped.any()) == (activation.kind == "tensor")


def test_the_hook_is_a_fact_of_the_linear() -> None:
    linear, x = nn.Linear(16, 4), values(3, 16)
    plain = linear(x)
    install(linear, Activation())
    install(linear, TENSOR)
    assert installed(linear) == TENSOR and len(linear._forward_pre_hooks) == 1 and type(linear) is nn.Linear
    assert torch.equal(linear(x), nn.functional.linear(TENSOR.round(x), linear.weight, linear.bias))
    twin = copy.deepcopy(linear)
    remove(linear)
    assert installed(linear) is None and torch.equal(linear(x), plain)
    assert installed(twin) == TENSOR and not torch.equal(twin(x), plain)
    assert linear.state_dict().keys() == twin.state_dict().keys()


def rounded(
    family: str, kinds: dict[str, tuple[int, int, bool, Activation | None]], dtype: torch.dtype = torch.float32
) -> ModelView:
    """Parts on grids of (bits, group, symmetric), their inputs rounded."""
    view = view_of(zoo.model(family))
    view.storage_dtype = dtype
    storage.round_to_storage(view)
    for part, (bits, group, symmetric, activation) in kinds.items():
        for ref in view.linears(part):
            grid = absmax_grid(ref.module.weight.detach(), bits, group, symmetric, dtype)
            ref.module.weight.data.copy_(dequantize(quantize(ref.module.weight, grid), grid))
            view.grids[ref.path] = grid
            if activation is not None:
                install(ref.module, activation)
    return view


def logits(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**zoo.batch(family)).logits


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


QUICK = ("llava", "llava-onevision", "smolvlm", "qwen2-vl", "gemma3", "blip-2-t5", "florence-2")


@pytest.mark.parametrize(
    ("number", "family"),
    [
        pytest.param(number, family, marks=() if family in QUICK else pytest.mark.slow)
        for number, family in enumerate(zoo.FAMILIES)
    ],
)
def test_stock_transformers_rounds_the_same_inputs(number: int, family: str, tmp_path: Path) -> None:
    """Every linear in 8 bits; the loader's logits are svlm's, and not those of a model that rounds weights alone."""
    flat = family in FLAT
    activation = Activation("tensor", 0.0625, 5) if flat or number % 2 else Activation()
    model = zoo.model(family)
    parts = [p for p in ("vision", "connector", "language") if any(u.linears for u in view_of(model).parts.get(p, ()))]
    view = rounded(family, dict.fromkeys(parts, (8, -1, True, activation)))
    wanted = logits(view.model, family)
    storage.save(view, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized" and len(config["config_groups"]) == 1 and not config["dequantize"]
    loaded = stock(tmp_path / "m")
    torch.testing.assert_close(logits(loaded, family), wanted, rtol=1e-5, atol=1e-5)
    for path in view.activations:
        remove(view.model.get_submodule(path))
    assert float((logits(view.model, family) - wanted).abs().max()) > 1e-3


def test_in_bfloat16_the_loader_has_the_same_weights_and_inputs(tmp_path: Path) -> None:
    activation = Activation("tensor", 0.0625, 5)
    kinds = {"vision": (8, -1, True, activation), "language": (8, -1, True, Activation())}
    view = rounded("llava", kinds, torch.bfloat16)
    wanted = logits(view.model, "llava")
    storage.save(view, tmp_path / "m")
    loaded = stock(tmp_path / "m", torch.bfloat16)
    batch = zoo.batch("llava")
    with torch.no_grad():
        loaded(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()})  # unpacks now
    for path in view.grids:
        assert torch.equal(loaded.get_submodule(path).weight.float(), view.model.get_submodule(path).weight), path
    torch.testing.assert_close(logits(nn.Module.float(loaded), "llava"), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("symmetric", "loads"), [(True, True), (False, False)])
def test_eight_bits_in_vision_and_four_in_the_language_model(symmetric: bool, loads: bool, tmp_path: Path) -> None:
    """svlm loads both; stock transformers the symmetric one (two groups, two formats)."""
    kinds = {"vision": (8, -1, True, Activation("tensor", 0.0625, 5)), "language": (4, 16, symmetric, None)}
    view = rounded("llava", kinds)
    wanted = logits(view.model, "llava")
    storage.save(view, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {g["format"] for g in config["config_groups"].values()} == {"int-quantized", "pack-quantized"}
    ours = storage.load_model(tmp_path / "m", find=passes.find)
    for path, activation in view.activations.items():
        install(ours.linear(path).module, activation)  # no pass is in the ledger that would
    assert torch.equal(logits(ours.model, "llava"), wanted)
    if loads:
        torch.testing.assert_close(logits(stock(tmp_path / "m"), "llava"), wanted, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(RuntimeError):
            logits(stock(tmp_path / "m"), "llava")


def test_flat_inputs_have_coarser_scales_in_compressed_tensors(tmp_path: Path) -> None:
    """What docs/formats.md says of towers without batches; if this fails, the loader became finer."""
    view = rounded("qwen2-vl", {"vision": (8, -1, True, Activation())})
    wanted = logits(view.model, "qwen2-vl")
    storage.save(view, tmp_path / "m")
    off = (logits(stock(tmp_path / "m"), "qwen2-vl") - wanted).abs().max()
    assert 1e-4 < float(off) < 0.1 * float(wanted.abs().max())


def test_formats_that_cannot_say_it_refuse_it() -> None:
    kinds = {"vision": (8, -1, True, Activation()), "language": (8, -1, True, None)}
    view = rounded("smolvlm", kinds)
    assert logits_tolerance(view) > logits_tolerance(view_of(zoo.model("llava")))
    with pytest.raises(UsageError, match="cannot hold") as caught:
        choose(view, "gptq", lambda *_: "", dense=False)
    assert "input is rounded" in (caught.value.found or "")
    choice = choose(view, "gptq", lambda *_: "", dense=True)
    assert set(choice.dense) >= set(view.activations) and not set(choice.packed) & set(view.activations)
