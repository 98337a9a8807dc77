"""Whole models in OpenVINO: the answers and logits of torch. Skipped where openvino is not installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import svlm
from svlm.calib.dataset import CalibrationSet
from svlm.calib.encode import Encoder
from svlm.compress.anatomy import view_of
from svlm.compress.base import Context
from svlm.compress.errors import UsageError
from svlm.compress.runtime.activations import Activation, install, remove
from svlm.compress.runtime.grid import dequantize, quantize
from svlm.compress.runtime.openvino import build
from svlm.compress.runtime.openvino.build import _settings, integers_exact, load_openvino
from svlm.compress.runtime.openvino.convert import Rows, convert_part
from svlm.passes.quantize._rtn import absmax_grid
from tests import zoo

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo model in four bits, saved."""
    view = svlm.load_view("demo")
    svlm.apply_pass(svlm.find("quantize.rtn")(bits=4, group=64), view, Context([], lambda *a, **k: None, nullcontext))
    folder = tmp_path_factory.mktemp("openvino") / "out"
    svlm.save(view, folder)
    yield folder


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs in float32 on every processor, where their values are compared with torch's."""
    real = build._settings

    def float32(name: str, counts: Any, threads: int, native: bool, exact: bool | None) -> dict[str, Any]:
        return real(name, counts, threads, False, exact)

    monkeypatch.setattr(build, "_settings", float32)


def test_the_demo_model_answers_as_in_torch(four_bits: Path) -> None:
    reference = svlm.load_view(four_bits)
    data = CalibrationSet.load("demo", fit=16, check=16)
    encoder = Encoder(reference.processor)
    prompts, full = encoder.prompts(data.check), encoder.encode(data.check)
    full.pop("labels")
    model = svlm.load(four_bits, runtime="openvino", threads=1)
    assert model.notes["rebuilt"] and (four_bits / ".svlm" / "openvino" / "manifest.json").is_file()
    packed = sum(row["integers"].get("i4", 0) for row in model.notes["constants"].values())
    assert packed == len(reference.grids), "every quantized linear is a constant of four bits"
    assert not any(row["missed"] for row in model.notes["constants"].values())
    with torch.no_grad():
        wanted = reference.model.generate(**prompts, max_new_tokens=8, do_sample=False)
        logits, real = reference.model(**full).logits, full["attention_mask"].bool()
    answers = model.generate(**prompts, max_new_tokens=8)
    close = 0.9 if "bf16" in str(model.notes["settings"]) else 1.0  # bfloat16 may decide a close call otherwise
    assert (answers == wanted).all(1).float().mean() >= close
    found = model(**full).logits
    assert float((found - logits)[real].abs().mean()) < 0.01 * float(logits[real].abs().mean())

    again = svlm.load(four_bits, runtime="openvino", threads=1)
    assert not again.notes["rebuilt"]
    assert torch.equal(again.generate(**prompts, max_new_tokens=8), answers)
    manifest = four_bits / ".svlm" / "openvino" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"key": "of other weights"}))
    assert svlm.load(four_bits, runtime="openvino", threads=1).notes["rebuilt"]
    for setting in (
        {"do_sample": True}, {"return_dict_in_generate": True}, {"suppress_tokens": [2]}, {"bad_words_ids": [[2]]},
        {"stopping_criteria": [lambda *_: True]}, {"min_length": 99}, {"max_time": 0.0}, {"streamer": print},
    ):  # fmt: skip
        with pytest.raises(UsageError, match="greedily"):
            again.generate(**prompts, **setting)
    for none in (0, -2):
        with pytest.raises(UsageError, match="no new token"):
            again.generate(**prompts, max_new_tokens=none)
    ids, rest = prompts["input_ids"], {k: v for k, v in prompts.items() if k != "input_ids"}
    assert torch.equal(again.generate(ids, **rest, max_length=ids.shape[1] + 8, use_cache=False), answers)
    with ThreadPoolExecutor(2) as pool:  # they take turns
        found = list(pool.map(lambda _: again.generate(**prompts, max_new_tokens=8), range(4)))
    assert all(torch.equal(made, answers) for made in found)


@pytest.mark.parametrize("family", ["smolvlm", "gemma3"])
def test_families_answer_as_in_torch(family: str, wide: None) -> None:
    """Padding on the left, two kinds of masks, a tower with masks of its own."""
    batch: dict[str, Any] = zoo.batch(family)
    batch.pop("labels")
    reference = zoo.model(family)
    model = load_openvino(view_of(zoo.model(family)), batch, None, threads=2)
    with torch.no_grad():
        logits, real = reference(**batch).logits, batch["attention_mask"].bool()
        wanted = reference.generate(**batch, max_new_tokens=12, do_sample=False)
    assert float((model(**batch).logits - logits)[real].abs().max()) < 0.05 * float(logits.abs().max())
    answers = model.generate(**batch, max_new_tokens=12)
    assert answers.shape == wanted.shape and torch.equal(answers, wanted)


@pytest.mark.parametrize("activation", [Activation("tensor", 0.0625, -11), Activation()])
def test_rounded_inputs_are_rounded_in_the_graph(activation: Activation) -> None:
    """Calibrated: one FakeQuantize before the integers; a scale a token: plain operators. The same values as torch."""
    import openvino as ov

    view = view_of(zoo.model("llava"))
    ref = view.linears("language.blocks[0].mlp.down")[0]
    grid = absmax_grid(ref.module.weight.detach(), 8, -1, True, torch.float32)
    ref.module.weight.data.copy_(dequantize(quantize(ref.module.weight, grid), grid))
    view.grids[ref.path] = grid
    install(ref.module, activation)
    x = torch.randn(1, 40, ref.module.in_features, generator=torch.Generator().manual_seed(0)) * 3
    graph, counts = convert_part(view, Rows(ref.module), ref.path, (x,))
    static = activation.kind == "tensor"
    assert (counts.static, counts.token, counts.integers) == (int(static), int(not static), {"i8": 1})
    core = ov.Core()
    exact = integers_exact(core)
    compiled = core.compile_model(graph, "CPU", _settings("", counts, 1, False, exact))
    with torch.no_grad():
        wanted = ref.module(x)
        plain = torch.nn.functional.linear(x, ref.module.weight, ref.module.bias)
    off = (torch.from_numpy(compiled(x.numpy())[0]) - wanted).abs()
    if static:
        assert float(off.quantile(0.9)) < 1e-5, "but for values between two levels"
    else:  # a token's largest value lies between two levels where it is negative
        step = x.abs().amax(-1, keepdim=True) / 127.5
        assert bool((off <= 1.01 * step * ref.module.weight.detach().abs().max() + 1e-5).all())
    assert float(off.max()) < float((plain - wanted).abs().max())
    kinds = {op.get_rt_info()["layerType"].value for op in compiled.get_runtime_model().get_ordered_ops()}
    assert "FullyConnected" in kinds


def test_a_tower_with_calibrated_inputs_and_a_connector_that_is_one_linear(wide: None) -> None:
    family = "smolvlm"
    batch: dict[str, Any] = zoo.batch(family)
    view, again = view_of(zoo.model(family)), view_of(zoo.model(family))
    for v in (view, again):
        for ref in v.linears(("vision", "connector")):
            grid = absmax_grid(ref.module.weight.detach(), 8, -1, True, torch.float32)
            ref.module.weight.data.copy_(dequantize(quantize(ref.module.weight, grid), grid))
            v.grids[ref.path] = grid
            install(ref.module, Activation("tensor", 0.0625, 3))
    batch.pop("labels")
    with torch.no_grad():
        logits, real = view.model(**batch).logits, batch["attention_mask"].bool()
    model = load_openvino(again, batch, None, threads=1)
    assert sum(row["static"] for row in model.notes["constants"].values()) > 8
    assert isinstance(model.notes["integer_kernels"], bool)
    found = model(**batch).logits
    for path in view.activations:
        remove(view.model.get_submodule(path))
    with torch.no_grad():
        plain = view.model(**batch).logits
    assert float((found - logits)[real].abs().mean()) < 0.3 * float((plain - logits)[real].abs().mean())


def test_a_tower_that_merges_tokens_runs_as_in_torch(tmp_path: Path, wide: None) -> None:
    view = svlm.load_view("demo")
    full = Encoder(view.processor).encode(CalibrationSet.load("demo", fit=4, check=4).check)
    full.pop("labels")
    ctx = Context([full], lambda *a, **k: None, nullcontext)
    svlm.apply_pass(svlm.find("tokens.merge")(keep=0.5), view, ctx)
    svlm.save(view, tmp_path / "out")
    with torch.no_grad():
        wanted, real = view.model(**full).logits, full["attention_mask"].bool()
        plain = svlm.load_view("demo").model(**full).logits
    found = svlm.load(tmp_path / "out", runtime="openvino", threads=1)(**full).logits
    assert float((found - wanted)[real].abs().mean()) < 1e-3
    assert float((plain - wanted)[real].abs().mean()) > 1e-2, "merging makes a difference"
