"""The main job on the demo model, small: verdicts, ladders, broken promises, resume, refusal, the proof of reload."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import shutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import svlm
from svlm import passes
from svlm.calib.dataset import CalibrationSet
from svlm.calib.workbench import Workbench
from svlm.compress import storage
from svlm.compress.base import Notes, Pass
from svlm.compress.errors import GateFailed, OutputError, PromiseBroken, RecipeError, SelectorError, Unmet, WorkFailed
from svlm.compress.pipeline import apply_pass
from svlm.compress.recipe import Recipe
from svlm.passes import api
from svlm.passes.tokens.random import Random


@dataclass(frozen=True)
class Undo(Pass):
    """Writes noise over every language linear: it undoes whatever was promised of them. amount: of noise."""

    name: ClassVar[str] = "test.undo"
    amount: float = 0.001

    def apply(self, model, ctx):
        torch.manual_seed(ctx.seed)
        with torch.no_grad():
            for ref in model.linears("language"):
                ref.module.weight.add_(self.amount * torch.randn_like(ref.module.weight))
        return Notes()


@dataclass(frozen=True)
class Ruin(Pass):
    """Writes NaN into a weight. Nothing to set: level."""

    name: ClassVar[str] = "test.ruin"
    level: int = 0

    def apply(self, model, ctx):
        with torch.no_grad():
            model.linears("language")[0].module.weight[0, 0] = float("nan")
        return Notes()


PLANTED = {kind.name: kind for kind in (Undo, Ruin)}


def find(name):
    return PLANTED[name] if name in PLANTED else passes.find(name)


@pytest.fixture(scope="module")
def data():
    return CalibrationSet.load("demo", fit=8, check=24, seed=0)


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setattr(api, "find", find)


def recipe(*steps, gate=None):
    value = {"passes": list(steps), "calibration": {"fit": 8, "check": 24}}
    return Recipe.from_json(value | ({"gate": gate} if gate else {}), find)


def run(plan, data, out, **options):
    return api.compress_model("demo", plan, data, out, api.Options(batch_size=16, latency=False, **options))


def report_of(out):
    return json.loads((out / "report.json").read_text())


def test_a_run_leaves_a_small_model_that_loads_and_answers(data, tmp_path):
    out = tmp_path / "out"
    report = run(recipe({"quantize.rtn": {"bits": 4, "group": 64}, "gate": {"metric": "kl", "max": 5}}), data, out)
    assert [s["verdict"] for s in report["stages"]] == ["baseline", "passed"]
    stock = {"works": True, "says": ""}  # tried, and its logits are the same
    assert report["reload"] == {"checked": True, "max_abs_diff": pytest.approx(0, abs=1e-3), "stock": stock}
    assert report == report_of(out) and report["schema"] == 1
    first, last = report["stages"]
    assert last["cost"]["bytes"] < 0.4 * first["cost"]["bytes"]
    assert first["quality"]["kl"] == pytest.approx(0, abs=1e-6) and first["quality"]["agreement"] == 1.0
    assert first["seconds_measuring"] > 0 and last["seconds_measuring"] > 0 and last["quality"]["generated"] > 0
    assert (out / "report.html").is_file() and not (out / ".svlm" / "stages").exists()
    packed = [k for k in _tensors(out) if k.endswith("weight_packed")]
    assert packed and not any(k.replace("weight_packed", "weight") in _tensors(out) for k in packed)
    model = svlm.load(out)
    fresh = svlm.load_view("demo").model
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in fresh.parameters())


@pytest.mark.slow
def test_verify_from_disk_gives_the_figures_of_the_run(data, tmp_path):
    out = tmp_path / "out"
    report = run(recipe({"quantize.rtn": {"bits": 3, "group": 64}, "gate": None}), data, out)
    checked = api.verify(out, "demo", "demo", batch_size=16)
    for key in ("exact_match", "kl", "agreement"):
        assert checked["quality"][key] == report["stages"][-1]["quality"][key], key


@pytest.mark.slow
def test_a_choice_of_tokens_beside_its_controls(tmp_path):
    """Each control is what measuring it alone gives; the report says plainly where the choice is no better."""
    few = CalibrationSet.load("demo", fit=4, check=16, seed=0)
    asked = {"keep": 0.25, "against_controls": True}
    report = run(recipe({"tokens.dpp": asked, "gate": None}), few, tmp_path / "out", rehearse=False)
    stage = report["stages"][-1]
    names = ["tokens.random", "tokens.grid", "tokens.resolution"]
    assert [control["pass"] for control in stage["controls"]] == names and report["stages"][0]["controls"] == []
    view = svlm.load_view("demo")
    bench = Workbench(svlm.load_view("demo"), few, batch_size=16, latency=False)
    apply_pass(Random(keep=0.25), view, bench.context(view))
    quality, _ = bench.measure(view)
    control = stage["controls"][0]
    assert control["quality"] == {key: quality[key] for key in ("exact_match", "kl", "agreement")}
    assert control["visual_tokens"] == stage["cost"]["visual_tokens"]
    mine, its = (s["quality"]["exact_match"]["value"] for s in (stage, control))
    assert control["ahead"]["delta"] == pytest.approx(mine - its)
    low, high = control["ahead"]["ci95"]
    assert low <= control["ahead"]["delta"] <= high
    shown = html.unescape((tmp_path / "out" / "report.html").read_text())
    told = stage["notes"].get("remarks", [])
    for row in stage["controls"]:
        behind = "skipped" in row or row["ahead"]["delta"] <= 0 or row["ahead"]["ci95"][0] <= 0
        assert any(row["pass"] in remark for remark in told) == behind
        assert "skipped" in row or f"in its place: {row['pass']}" in shown
    assert all(remark in shown for remark in told)


def test_a_failed_gate_stops_and_out_holds_the_stage_before(data, tmp_path):
    out = tmp_path / "out"
    steps = [
        {"quantize.rtn": {"bits": 8, "group": 64, "where": ["vision"]}, "gate": {"metric": "kl", "max": 1}},
        {"quantize.rtn": {"bits": 2, "group": 64, "where": ["language"]}, "gate": {"metric": "kl", "max": 1e-6}},
    ]
    with pytest.raises(GateFailed, match=r"quantize\.rtn"):
        run(recipe(*steps), data, out)
    assert [s["verdict"] for s in report_of(out)["stages"]] == ["baseline", "passed", "failed"]
    view = svlm.load_view(out)
    assert [r.settings["bits"] for r in view.ledger] == [8]
    assert report_of(out)["error"]["kind"] == "GateFailed"


def test_retry_walks_up_the_ladder_and_the_report_shows_the_tries(data, tmp_path):
    out = tmp_path / "out"
    gate = {"metric": "agreement", "max_drop": 0.02, "on_fail": "retry"}
    report = run(
        recipe({"quantize.rtn": {"bits": 2, "group": -1, "where": ["language"], "search": "none"}, "gate": gate}),
        data,
        out,
    )
    stage = report["stages"][-1]
    assert stage["verdict"] == "retried"
    assert [t["settings"]["bits"] for t in stage["tries"]] + [stage["settings"]["bits"]] in (
        [2, 3],
        [2, 3, 4],
        [2, 3, 4, 8],
    )
    assert all(t["verdict"] == "failed" for t in stage["tries"]) and stage["gate_passed"]


@pytest.mark.slow
def test_skip_restores_and_keep_goes_on(data, tmp_path):
    worse = {"quantize.rtn": {"bits": 2, "group": -1, "where": ["language"]}}
    bound = {"metric": "kl", "max": 1e-9}
    skipped = run(recipe(worse | {"gate": bound | {"on_fail": "skip"}}), data, tmp_path / "skip")
    assert skipped["stages"][-1]["verdict"] == "skipped"
    assert len(svlm.load_view(tmp_path / "skip").ledger) == 0
    kept = run(recipe(worse | {"gate": bound | {"on_fail": "keep"}}), data, tmp_path / "keep")
    assert kept["stages"][-1]["verdict"] == "kept"
    assert len(svlm.load_view(tmp_path / "keep").ledger) == 1


def test_a_broken_promise_is_caught_and_named(data, tmp_path):
    out = tmp_path / "out"
    steps = [
        {"quantize.rtn": {"bits": 4, "group": 64}, "gate": None},
        {"test.undo": {}, "gate": {"metric": "kl", "max": 1e9}},
    ]
    with pytest.raises(PromiseBroken, match=r"test\.undo") as caught:
        run(recipe(*steps), data, out, rehearse=False)
    assert "quantize.rtn" in str(caught.value)
    stages = report_of(out)["stages"]
    assert stages[-1]["verdict"] == "failed" and "quantize.rtn" in stages[-1]["broken_promise"]
    assert [r.name for r in svlm.load_view(out).ledger] == ["quantize.rtn"]


def test_weights_that_are_not_finite_stop_the_work(data, tmp_path):
    with pytest.raises(WorkFailed, match="not finite"):
        run(recipe({"test.ruin": {}, "gate": None}), data, tmp_path / "out")


def test_an_interrupted_run_resumes_to_the_same_bits(data, tmp_path, monkeypatch):
    steps = [
        {"quantize.rtn": {"bits": 8, "group": 64, "where": ["vision"]}, "gate": None},
        {"quantize.gptq": {"bits": 4, "group": 64, "where": ["language"]}, "gate": None},
    ]
    run(recipe(*steps), data, tmp_path / "calm")
    from svlm.calib import scratch

    finished = []
    original = scratch.Scratch.save

    def stop_after_two(self, unit, notes):
        original(self, unit, notes)
        finished.append(unit.name)
        if len(finished) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(scratch.Scratch, "save", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(*steps), data, tmp_path / "out", rehearse=False)
    monkeypatch.setattr(scratch.Scratch, "save", original)
    with pytest.raises(OutputError, match="--resume"):
        run(recipe(*steps), data, tmp_path / "out")
    report = run(recipe(*steps), data, tmp_path / "out", resume=True)
    assert _digest(tmp_path / "out") == _digest(tmp_path / "calm")
    calm = report_of(tmp_path / "calm")
    assert [s["quality"] for s in report["stages"]] == [s["quality"] for s in calm["stages"]]


def test_out_that_is_not_ours_is_left_alone(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not made by svlm"):
        run(recipe("quantize.rtn"), data, tmp_path, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]


def test_the_rehearsal_finds_what_would_fail_later(data, tmp_path):
    twice = recipe(
        {"quantize.rtn": {"bits": 4, "group": 64, "where": ["vision"]}},
        {"quantize.gptq": {"bits": 4, "group": 64, "where": ["vision.blocks[0]", "language"]}},
    )
    with pytest.raises(Unmet, match="quantized already"):
        run(twice, data, tmp_path / "a")
    with pytest.raises(SelectorError, match="langage"):
        run(recipe({"quantize.rtn": {"where": ["langage"]}}), data, tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists(), "nothing is left of a run that was refused"


def test_composing_by_hand(data):
    view, small = svlm.load_view("demo"), svlm.load_view("demo")
    bench = svlm.Workbench(view, data, batch_size=16)
    notes = svlm.apply_pass(svlm.find("quantize.rtn")(bits=4, group=64), small, bench.context(small))
    quality, answers = bench.measure(small)
    assert notes.numbers and 0 < quality["kl"] < 1 and len(answers) == 24
    with pytest.raises(Unmet):
        svlm.apply_pass(svlm.find("quantize.rtn")(bits=4, group=64), small, bench.context(small))


def test_a_recipe_knows_no_code_paths():
    with pytest.raises(RecipeError, match="no pass"):
        svlm.find("os:system")


def test_a_checkpoint_with_nan_or_a_missing_shard_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "nan"
    shutil.copytree(storage.DEMO, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(k for k in tensors if "q_proj" in k)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(svlm.SvlmError, match="not finite") as caught:
        svlm.load_view(broken)
    assert "q_proj" in str(caught.value) and caught.value.exit_code == 2

    lacking = tmp_path / "shard"
    shutil.copytree(storage.DEMO, lacking)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (lacking / "model.safetensors.index.json").write_text(json.dumps(index))
    os.remove(lacking / "model.safetensors")
    with pytest.raises(svlm.SvlmError, match="cannot load"):
        svlm.load_view(lacking)


def test_planted_passes_are_passes():
    for kind in PLANTED.values():
        assert kind.from_settings(kind().settings()) == kind()
        assert dataclasses.is_dataclass(kind)


def _tensors(out):
    from safetensors import safe_open

    names = set()
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            names |= set(handle.keys())
    return names


def _digest(out):
    return {p.name: p.read_bytes() for p in [*out.glob("*.safetensors"), out / "svlm.json"]}
