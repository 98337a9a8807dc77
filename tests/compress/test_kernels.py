"""The torch runtime: its forms against values written out one by one, its choice, its cache, whole models."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import svlm
from svlm.calib.dataset import CalibrationSet
from svlm.calib.encode import Encoder
from svlm.cli import main
from svlm.compress.anatomy import view_of
from svlm.compress.base import Context
from svlm.compress.errors import UsageError
from svlm.compress.runtime.grid import Grid, dequantize
from svlm.compress.runtime.kernels import measure as measuring
from svlm.compress.runtime.kernels import use
from svlm.compress.runtime.kernels.linear import KernelLinear
from svlm.compress.runtime.kernels.measure import choose, kind, machine, measure
from svlm.compress.runtime.kernels.table import KERNELS, check
from svlm.compress.runtime.kernels.use import rows, says, use_kernels
from tests import zoo

CPU = [k for k in KERNELS.values() if k.name != "int4cuda"]


def lying(bits: int, group: int, zeros: bool, out: int = 32, columns: int = 128) -> tuple[torch.Tensor, Grid]:
    """A weight on a grid, every third scale negative where it is symmetric."""
    g = torch.Generator().manual_seed(bits * 1000 + group)
    groups = columns // group if group > 0 else 1
    scale = (torch.rand(out, groups, generator=g) + 0.5).mul(0.02).bfloat16()
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    if zeros:
        zero = torch.randint(low, high, (out, groups), generator=g).to(torch.int8)
    else:
        scale[::3] *= -1
    grid = Grid(bits, group, not zeros, scale, zero if zeros else None)
    q = torch.randint(low, high, (out, columns), generator=g).to(torch.int8)
    return dequantize(q, grid), grid


def written_out(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x W^T + b, value by value."""
    found = [
        [sum(a * b for a, b in zip(row, w)) + c for w, c in zip(weight.tolist(), bias.tolist())] for row in x.tolist()
    ]
    return torch.tensor(found)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 32, 128, -1])
def test_every_form_computes_the_dequantized_linear(bits: int, group: int, zeros: bool) -> None:
    weight, grid = lying(bits, group, zeros)
    bias = torch.linspace(-1, 1, 32)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(5))
    wanted = written_out(x, weight, bias)
    ran = set()
    for kernel in CPU:
        if not kernel.fits((32, 128), grid, "cpu"):
            continue
        run = kernel.make(weight, bias, grid)
        for dtype in (torch.float32, torch.bfloat16):
            found = run(x.to(dtype).view(1, 3, 128))
            assert found.shape == (1, 3, 32) and found.dtype is dtype
            allowed = max(kernel.tolerance, 0.0 if dtype is torch.float32 else 1e-2)
            assert float((found[0].float() - wanted).norm()) < allowed * float(wanted.norm()), (kernel.name, dtype)
        assert check(kernel, run, weight, bias, torch.float32) == ""
        assert check(kernel, run, -weight, bias, torch.float32).startswith("off by")
        ran.add(kernel.name)
    expected = {"float32", "bfloat16", "float16w", "unpack"}
    expected |= {"int4"} if bits <= 4 and group != 16 else set()
    expected |= {"int8"} if bits == 8 and group in (-1, 128) and not zeros else set()
    assert ran == expected


def test_forms_refuse_what_they_cannot_take() -> None:
    _, grid = lying(4, 32, False, out=24)
    assert not KERNELS["int4"].fits((24, 128), grid, "cpu") and not KERNELS["int4"].fits((32, 128), None, "cpu")
    _, rows8 = lying(8, -1, False, out=17)
    assert not KERNELS["int8"].fits((17, 128), rows8, "cpu"), "torch reads beyond its tensors there"
    assert not KERNELS["int4cuda"].fits((32, 128), lying(4, 32, False)[1], "cpu")


def times(**columns: tuple[float | None, ...]) -> dict[str, dict[str, float]]:
    counts = ("1", "8", "64", "512")
    return {c: {n: t for n, us in columns.items() if (t := us[i]) is not None} for i, c in enumerate(counts)}


def test_the_fastest_form_is_chosen_for_each_number_of_tokens() -> None:
    _, grid = lying(4, 32, False)
    us = times(float32=(9, 9, 9, 9), float16w=(5, 6, 8, 8.9), int4=(2, 4, 20, 90), unpack=(20, 20, 30, 40))
    assert choose(us, grid, "fast") == [(22, "int4"), (float("inf"), "float16w")]
    assert choose(us, grid, "small") == [(181, "int4"), (float("inf"), "unpack")]
    near = times(float32=(9, 9, 9, 9), int4=(8.8, 9, 20, 90))
    assert choose(near, grid, "fast") == [(float("inf"), "float32")], "a second form has to pay"
    long = times(float32=(9, 9, 9, None), int4=(2, 2, 20, None))
    assert choose(long, grid, "fast") == [(22, "int4"), (float("inf"), "float32")]
    light = times(float32=(9, 9, 9, 9), float16w=(9.2, 9, 8, 9.2))
    assert choose(light, grid, "fast") == [(float("inf"), "float16w")], "the lighter of two that take the same"
    floats = times(float32=(9, 9, 9, 9), bfloat16=(9, 9, 20, 90))
    assert choose(floats, None, "small") == [(float("inf"), "bfloat16")]


def test_measuring_drops_and_names_what_is_wrong_here(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid = lying(4, 32, False)
    real = KERNELS["int4"]
    monkeypatch.setitem(KERNELS, "int4", dataclasses.replace(real, make=lambda w, b, g: real.make(2 * w, b, g)))

    def missing(*_: Any) -> Any:
        raise NotImplementedError("no such operator on this processor")

    monkeypatch.setitem(KERNELS, "float16w", dataclasses.replace(KERNELS["float16w"], make=missing))
    made = measure(weight, None, grid, torch.float32, model=1 << 20)
    assert set(made["dropped"]) == {"int4", "float16w"}
    assert made["dropped"]["int4"].startswith("off by") and "no such operator" in made["dropped"]["float16w"]
    assert all(set(row) == {"float32", "bfloat16", "unpack"} for row in made["us"].values())
    assert all(us > 0 for row in made["us"].values() for us in row.values())


def test_few_tokens_are_timed_after_the_rest_of_the_model_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as the model has, or as are said to be enough; what many tokens take is not bound by them."""
    weight, grid = lying(4, 32, False)
    swept: dict[int, int] = {}

    def race(forms: Any, x: torch.Tensor, sweep: torch.Tensor | None) -> dict[str, float]:
        swept[len(x)] = 0 if sweep is None else sweep.nbytes
        return dict.fromkeys(forms, 1.0)

    monkeypatch.setattr(measuring, "_race", race)
    for model, wanted in ((1 << 20, 1 << 20), (1 << 40, measuring.SWEPT)):
        measure(weight, None, grid, torch.float32, model=model)
        assert swept == {1: wanted, 8: wanted, 64: 0, 512: 0}


def test_a_linear_takes_its_form_by_the_number_of_tokens() -> None:
    linear = nn.Linear(4, 2)
    few, many = (lambda x: x[..., :2]), (lambda x: x[..., 2:])
    made = KernelLinear(linear, [(2, few), (float("inf"), many)], ["few", "many"])
    x = torch.randn(2, 3, 4)
    assert torch.equal(made(x[:, :1]), x[:, :1, :2]) and torch.equal(made(x), x[..., 2:])
    assert made(x[:0]).shape == (0, 3, 2)
    assert made.weight.dtype is torch.float32 and not list(made.parameters())
    with pytest.raises(UsageError, match="cannot be saved"):
        nn.Sequential(made).state_dict()


def int4(view: Any, group: int = 64) -> Any:
    ctx = Context([], lambda *a, **k: None, nullcontext)
    svlm.apply_pass(svlm.find("quantize.rtn")(bits=4, group=group), view, ctx)
    return view


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_families_answer_as_dequantized(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few-bit forms for few tokens, weights in float16 for many; the choice is fixed here, not measured."""
    view = view_of(zoo.model(family))
    ctx = Context([], lambda *a, **k: None, nullcontext)
    svlm.apply_pass(svlm.find("quantize.rtn")(bits=4, group=-1, where=("vision", "language")), view, ctx)
    batch = zoo.batch(family)
    batch.pop("labels")
    with torch.no_grad():
        wanted = view.model(**batch, **_start(view, batch)).logits

    def fixed(weight: torch.Tensor, bias: Any, grid: Grid | None, dtype: Any, *, model: int) -> dict[str, Any]:
        few = (
            "float16w"
            if grid is None
            else "int4"
            if KERNELS["int4"].fits((len(weight), weight.shape[1]), grid, "cpu")
            else "unpack"
        )
        return {
            "us": times(**({"float32": (9, 9, 9, 9), "float16w": (5, 5, 5, 5)} | {few: (1, 1, 5, 5)})),
            "dropped": {},
        }

    monkeypatch.setattr(use, "measure", fixed)
    facts = use_kernels(view)
    assert facts["dense"] == {} and sum(k["linears"] for k in facts["kinds"].values()) > 10
    changed = [m for m in view.model.modules() if isinstance(m, KernelLinear)]
    assert len(changed) == sum(k["linears"] for k in facts["kinds"].values())
    with torch.no_grad():
        found = view.model(**batch, **_start(view, batch)).logits
    assert float((found - wanted).norm()) < 0.03 * float(wanted.norm())
    assert not torch.equal(found, wanted)


def test_a_head_tied_to_the_embedding_runs_in_float32_beside_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(zoo.model("llava"))
    view.model.get_output_embeddings().weight = view.model.get_input_embeddings().weight
    monkeypatch.setattr(use, "measure", lambda *a, **k: {"us": times(float32=(1, 1, 1, 1)), "dropped": {}})
    batch = zoo.batch("llava")
    with torch.no_grad():
        wanted = view.model(**batch).logits
        facts = use_kernels(view, dtype=torch.bfloat16)
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
        found = view.model(**batch).logits.float()
    assert any("lm_head" in name for name, m in view.model.named_modules() if isinstance(m, KernelLinear)), facts
    assert float((found - wanted).norm()) < 0.05 * float(wanted.norm())


def test_what_reads_pictures_keeps_no_form_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(zoo.model("llava"))
    us = times(float32=(9, 9, 5, 5), float16w=(1, 1, 9, 9))
    monkeypatch.setattr(use, "measure", lambda *a, **k: {"us": us, "dropped": {}})
    facts = use_kernels(view)
    inside = [m for m in view.decoder.modules() if isinstance(m, KernelLinear)]
    assert inside and all(m.names == ("float16w", "float32") for m in inside)
    assert not any(isinstance(m, KernelLinear) for m in view.model.get_submodule(view.tower_path).modules())
    pictures = [k for name, k in facts["kinds"].items() if name.endswith("of pictures")]
    assert pictures and all(set(k["us"]) == {"64", "512"} == set(k["forms"]) for k in pictures)
    assert use.says(facts) and use.rows(facts)


def _start(view: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not view.family.seq2seq or "decoder_input_ids" in batch:
        return {}
    rows = next(iter(batch.values())).shape[0]
    return {"decoder_input_ids": torch.full((rows, 2), 2)}


def test_weights_that_no_form_can_hold_stay_dense_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(zoo.model("llava"))
    path, linear = next((r.path, r.module) for r in view.linears("language"))
    with torch.no_grad():
        linear.weight.mul_(1e9)  # beyond float16
    only = {"us": times(float32=(9, 9, 9, 9), float16w=(1, 1, 1, 1)), "dropped": {}}
    monkeypatch.setattr(use, "measure", lambda *a, **k: only)
    before = linear.weight.clone()
    hooked = view.linears("vision")[0]
    hooked.module.register_forward_pre_hook(lambda *_: None)
    facts = use_kernels(view)
    assert torch.equal(linear.weight, before)
    assert set(facts["dense"]) == {path, hooked.path} and view.model.get_submodule(path) is linear
    assert view.model.get_submodule(hooked.path) is hooked.module, "what a pass hangs on a linear is not lost"
    assert any(path in sentence for sentence in says(facts))


def test_the_demo_answers_the_same_and_times_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    view = int4(svlm.load_view("demo"))
    svlm.save(view, out)
    prompts = Encoder(view.processor).prompts(CalibrationSet.load("demo", fit=16, check=16).check)
    with torch.no_grad():
        wanted = view.model.generate(**prompts, max_new_tokens=8, do_sample=False)
    file = out / ".svlm" / "kernels.json"
    assert torch.equal(svlm.load(out).generate(**prompts, max_new_tokens=8, do_sample=False), wanted)
    assert not file.exists(), "without a runtime nothing is measured"
    model = svlm.load(out, runtime="torch")
    assert torch.equal(model.generate(**prompts, max_new_tokens=8, do_sample=False), wanted)
    kept = json.loads(file.read_text())
    assert list(kept) == [machine("cpu")]

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(use, "measure", never)
        small = svlm.load(out, runtime="torch", memory="small")
        packed = [m for m in small.modules() if isinstance(m, KernelLinear) and set(m.names) <= {"int4", "unpack"}]
        assert len(packed) == len(view.grids), "weights stay in few bits"
        assert torch.equal(small.generate(**prompts, max_new_tokens=8, do_sample=False), wanted)
        assert main(["bench", str(out), "--kernels"]) == 0
        shown = capsys.readouterr().out
        assert "192x192 4 bits g64" in shown and machine("cpu") in shown and " *" in shown
        assert main(["bench", str(out)]) == 2 and main(["bench", str(out), "--kernels", "--against", "demo"]) == 2
        file.write_text(json.dumps({"another machine": {}}))
        with pytest.raises(AssertionError, match="measured again"):
            svlm.load(out, runtime="torch")
    with pytest.raises(UsageError, match="did you mean 'small'"):
        svlm.load(out, runtime="torch", memory="smal")


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    plain = {"us": times(float32=(2, 2, 2, 2)), "dropped": {}}
    monkeypatch.setattr(use, "measure", lambda *a, **k: plain)
    facts = use_kernels(view_of(zoo.model("llava")), tmp_path / "file" / "kernels.json")
    assert facts["kinds"]


def test_what_is_shown() -> None:
    _, grid = lying(4, 32, False)
    assert kind((32, 128), grid) == "32x128 4 bits g32" and kind((32, 128), None) == "32x128 floats"
    us = times(float32=(10, 10, 10, 10), int4=(5, 20, 20, None))
    forms = {"1": "int4", "8": "float32", "64": "float32", "512": "float32"}
    facts = {
        "machine": "m", "activations": "float32", "kinds": {"a": {"linears": 3, "us": us, "forms": forms}},
        "dropped": {"int8": "off"}, "dense": {}, "stepwise": "",
    }  # fmt: skip
    titles, cells = rows(facts)
    assert titles == ["weight", "linears", "tokens", "float32", "int4"]
    assert cells[0] == ["a", "3", "1", "10  ", "5 *"] and cells[3] == ["a", "3", "512", "10 *", ""]
    said = says(facts)
    assert said[1] == "At 1 token the linears take 0.50 of the time of dequantized ones."
    assert said[2].startswith("At 8 tokens few bits do not pay on this machine")
    assert said[-1] == "Not used here: int8: off"
    assert "transformers' own loop: why." in says(facts | {"stepwise": "why"})[-2]
