"""What `svlm export` writes, read by the other project's own loader on CPU. Skipped where it is not installed.

The loaders run in bfloat16, as the checkpoints say. Weights are compared exactly, logits with those of `svlm.load` in
bfloat16; answers with those of `svlm.load` in float32 and in bfloat16, which differ where two answers are nearly tied.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # gptqmodel 7 asks for two even of a machine with one

import svlm
from svlm import passes
from svlm.calib.encode import Encoder
from svlm.compress import storage
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.export.run import export_model
from svlm.passes.quantize.bnb import BNB
from tests import zoo
from tests.compress.test_compressed_tensors import rounded
from tests.passes.quantize.helpers import fresh, run

pytestmark = pytest.mark.peers
BF16 = torch.bfloat16
CHECKS, TOKENS = 32, 16
TOLERANCE = 0.03  # of the norm of the logits; rounding activations to bfloat16 alone moves them by 0.005 to 0.02
QUANTIZED = ("vision", "connector", "language")
TEXT_FIRST = [f for f in zoo.FAMILIES if f not in ("blip-2", "blip-2-t5", "trocr", "donut")]


@pytest.fixture
def gptqmodel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The peer, without compiling its kernel for every shape of a test."""
    module = pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function)
    return module


def stock(folder: Path, **options: Any) -> Any:
    """The model through transformers' own loader; every key found, none left over."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=BF16, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def packed_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold packed words."""
    return {name: module for name, module in model.named_modules() if "qweight" in dict(module.named_buffers())}


def half(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.to(BF16) if value.is_floating_point() else value for key, value in batch.items()}


def logits(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits.float()


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return float((got - wanted).norm() / wanted.norm()) < tolerance


def kind(name: str) -> Any:
    """The config that asks gptqmodel for its portable kernel, whose weights can be read."""
    from transformers import AwqConfig, GPTQConfig

    return AwqConfig(backend="torch_awq") if name == "awq" else GPTQConfig(bits=4, backend="gptq_torch")


def weight_of(module: Any, name: str) -> torch.Tensor:
    """The weight [out, in] that the other project makes of the words."""
    if name != "awq":
        return module.dequantize_weight().t()
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size).t()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("name", "family"), [*(("gptq_v2", f) for f in TEXT_FIRST), *(("awq", f) for f in zoo.FAMILIES), ("gptq", "llava")]
)
def test_every_family_loads(name: str, family: str, symmetric: bool, tmp_path: Path, gptqmodel: Any) -> None:
    """All parts quantized; what cannot be packed is dense; each weight and the logits are ours."""
    view, batch = view_of(zoo.model(family)), half(zoo.batch(family))
    parts = [part for part in QUANTIZED if any(unit.linears for unit in view.parts.get(part, ()))]
    rounded(view, dict.fromkeys(parts, (4, -1, symmetric)))
    storage.save(view, tmp_path / "src")
    facts = export_model(tmp_path / "src", name, tmp_path / "out", find=passes.find, dense=True)
    model = stock(tmp_path / "out", quantization_config=kind(name))
    found = packed_linears(model)
    assert set(found) == set(view.grids) - set(facts["dense"]) and len(found) == facts["packed"]
    for path, module in found.items():
        got, wanted = weight_of(module, name).to(BF16).float(), view.linear(path).module.weight
        if symmetric:
            assert torch.equal(got, wanted), path
        else:  # integers of five bits times scales of eight need more digits than fp16 has, so it rounds once more
            torch.testing.assert_close(got, wanted, rtol=2**-7, atol=0)
    for path in facts["dense"]:
        assert torch.equal(model.get_submodule(path).weight.float(), view.linear(path).module.weight), path
    assert close(logits(model, batch), logits(view.model.to(BF16), batch))


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, -1), (3, 32), (8, 16)])
@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_other_bits_load_through_gptqmodel(name: str, bits: int, group: int, tmp_path: Path, gptqmodel: Any) -> None:
    view, batch = view_of(zoo.model("smolvlm")), half(zoo.batch("smolvlm"))
    rounded(view, {})
    from tests.compress.test_compressed_tensors import absmax_grid, dequantize, quantize

    for ref in view.linears("language"):
        if ref.module.in_features % 32 == 0 and ref.module.out_features % 32 == 0:
            grid = absmax_grid(ref.module.weight.detach(), bits, group, True, BF16)
            ref.module.weight.data.copy_(dequantize(quantize(ref.module.weight, grid), grid))
            view.grids[ref.path] = grid
    storage.save(view, tmp_path / "src")
    facts = export_model(tmp_path / "src", name, tmp_path / "out", find=passes.find)
    model = stock(tmp_path / "out")
    found = packed_linears(model)
    assert set(found) == set(view.grids) and len(found) == facts["packed"] >= 6
    for path, module in found.items():
        got, wanted = weight_of(module, name).to(BF16).float(), view.linear(path).module.weight
        if bits < 8:
            assert torch.equal(got, wanted), path
        else:  # as above: integers of eight bits times scales of eight
            torch.testing.assert_close(got, wanted, rtol=2**-7, atol=0)
    assert close(logits(model, batch), logits(view.model.to(BF16), batch))


# ---------------------------------------------------------------------------------------- the trained model that ships


def quantized_demo(folder: Path, bits: int, symmetric: bool) -> None:
    """The demo model by rounding to nearest, everything but embedding and head."""
    view = svlm.load_view("demo")
    step = svlm.find("quantize.rtn")(bits=bits, group=64, symmetric=symmetric, search="none")
    data = svlm.CalibrationSet.load("demo", fit=64, check=CHECKS)
    svlm.apply_pass(step, view, svlm.Workbench(svlm.load_view("demo"), data, latency=False).context(view))
    storage.save(view, folder)


def answers(model: Any, view: ModelView, dtype: torch.dtype) -> tuple[list[str], torch.Tensor]:
    """Greedy answers to the check questions, and the logits of their first token."""
    encoder = Encoder(view.processor)
    said, first = [], []
    samples = svlm.CalibrationSet.load("demo", fit=64, check=CHECKS).check
    for start in range(0, CHECKS, 16):
        batch = encoder.prompts(samples[start : start + 16])
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        with torch.no_grad():
            tokens = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
        said += encoder.decode(tokens[:, batch["input_ids"].shape[1] :])
        first.append(logits(model, batch)[:, -1])
    return said, torch.cat(first)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_the_demo_model_answers_alike(name: str, symmetric: bool, tmp_path: Path, gptqmodel: Any) -> None:
    """With the kernel that gptqmodel chooses itself, which keeps the weights packed."""
    quantized_demo(tmp_path / "src", 4, symmetric)
    facts = export_model(tmp_path / "src", name, tmp_path / "out", find=passes.find, dense=True)
    view = svlm.load_view(tmp_path / "src")
    whole, exact = answers(view.model, view, torch.float32)
    short, rough = answers(view.model.to(BF16), view, BF16)
    model = stock(tmp_path / "out")
    assert len(packed_linears(model)) == facts["packed"] >= 25
    got, near = answers(model, view, BF16)
    assert len(set(whole)) > 5, "answers that are all alike would prove nothing"
    assert len(got) == CHECKS
    assert [g for g, w, s in zip(got, whole, short) if g not in (w, s)] == []
    if symmetric:
        assert got == whole
    assert close(near, exact, 2 * TOLERANCE) and close(near, rough, 2 * TOLERANCE)


# -------------------------------------------------------------------------------------------------------- bitsandbytes


def bitsandbytes_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What bitsandbytes itself makes of the codes or integers that it holds, [out, in] float32."""
    F = pytest.importorskip("bitsandbytes").functional
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            found[name] = F.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        elif type(module).__name__ == "Linear8bitLt":
            found[name] = F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).to(BF16).float()
    return found


def same_weights(found: Mapping[str, torch.Tensor], view: ModelView, paths: set[str]) -> None:
    assert set(found) == paths and len(paths) > 10
    for path in paths:
        wanted = view.linear(path).module.weight.detach().float()
        if view.grids[path].bits == 4:
            assert torch.equal(found[path], wanted), path
        else:  # the product is rounded in another order
            torch.testing.assert_close(found[path], wanted, rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("step", "family"),
    [
        *((BNB(), family) for family in zoo.FAMILIES),
        *((BNB(bits=8), family) for family in zoo.FAMILIES),
        (BNB(double=False), "smolvlm"),
        (BNB(levels="fp4"), "smolvlm"),
    ],
)
def test_bitsandbytes_takes_every_family(step: BNB, family: str, tmp_path: Path) -> None:
    """Codes as svlm saves them, integers as it exports them; what the loader never packs is written dense."""
    pytest.importorskip("bitsandbytes")
    view, batch = fresh(family), half(zoo.batch(family))
    parts = tuple(part for part in QUANTIZED if any(unit.linears for unit in view.parts.get(part, ())))
    view, notes = run(dataclasses.replace(step, where=parts), view, [batch])
    storage.save(view, tmp_path / "src")
    facts = export_model(tmp_path / "src", "bnb", tmp_path / "out", find=passes.find, dense=True)
    packed = set(view.grids) - set(facts["dense"])
    assert len(packed) == facts["packed"] and bool(facts["dense"]) == family.startswith("blip-2")
    with torch.no_grad():
        wanted = logits(view.model.to(BF16), batch)
    view.model.float()
    direct = step.bits == 4 and notes.numbers["stock_transformers"] == "loads it"
    assert direct == (step.bits == 4 and not facts["dense"])
    for folder in ("src", "out") if direct else ("out",):
        model = stock(tmp_path / folder, device_map="cpu")
        same_weights(bitsandbytes_weights(model), view, packed)
        for path in facts["dense"]:
            assert torch.equal(model.get_submodule(path).weight.float(), view.linear(path).module.weight), path
        assert close(logits(model, batch), wanted, 2 * TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_the_demo_model_answers_alike_in_bitsandbytes(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    view = svlm.load_view("demo")
    data = svlm.CalibrationSet.load("demo", fit=64, check=CHECKS)
    svlm.apply_pass(BNB(bits=bits), view, svlm.Workbench(svlm.load_view("demo"), data, latency=False).context(view))
    storage.save(view, tmp_path / "src")
    export_model(tmp_path / "src", "bnb", tmp_path / "out", find=passes.find)
    model = stock(tmp_path / "out", device_map="cpu")
    same_weights(bitsandbytes_weights(model), view, set(view.grids))
    said, near = answers(model, view, BF16)
    whole, exact = answers(view.model, view, torch.float32)
    short, _ = answers(view.model.to(BF16), view, BF16)
    assert len(set(whole)) > 5, "answers that are all alike would prove nothing"
    assert [g for g, w, s in zip(said, whole, short) if g not in (w, s)] == []
    assert close(near, exact, 2 * TOLERANCE)
