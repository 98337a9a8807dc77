"""The three experiments, small: what they measure, what they refuse, and that their plots can be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from svlm.compress.anatomy import view_of
from svlm.compress.errors import RecipeError, Unmet
from svlm.compress.recipe import Calibration, Recipe, Step
from svlm.compress.report.svg import VARIABLES
from svlm.passes import api, experiments, find
from svlm.passes.experiments import _figures as figures
from svlm.passes.experiments import alignment, attention, distillation
from tests import zoo


def recipe(*passes: tuple[str, dict[str, Any]]) -> Recipe:
    return Recipe(tuple(Step(find(name)(**settings)) for name, settings in passes), Calibration(fit=4, check=16), "own")


def readable(path: Path) -> None:
    """An SVG that draws in its own variables alone, for light and for dark."""
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert "prefers-color-scheme:dark" in text and "var(--ink)" in text
    assert not any(drawn in text for drawn in VARIABLES)
    for colour in re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text):
        pytest.fail(f"{path.name} has a colour that does not follow light and dark: {colour}")


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("family", ["llava", "qwen3-vl", "gemma3", "blip-2", "florence-2", "trocr"])
def test_attention_runs_for_every_decoder_and_refuses_the_others(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = view_of(zoo.model(family))
    monkeypatch.setattr(api, "load_view", lambda *args, **options: view)
    monkeypatch.setattr(attention, "PATIENCE", 0.0)
    monkeypatch.setattr(figures, "leave", lambda made, folder, **drawn: None)
    monkeypatch.setattr(attention, "_figure", lambda made: None)
    if view.family.seq2seq:
        with pytest.raises(Unmet, match="decoders that read visual tokens"):
            attention.attention(family, tmp_path, longest=128)
        return
    made = attention.attention(family, tmp_path, longest=128)
    rows = {row["variant"]: row for row in made["rows"]}
    assert {"eager", "sdpa, math", "sdpa, flash"} <= set(rows), made["left_out"]
    assert all(row["ms"]["prefill"] > 0 < row["ms"]["decode"] and row["peak_bytes"] > 0 for row in made["rows"])
    assert rows["eager"]["peak_bytes"] > rows["sdpa, flash"]["peak_bytes"]
    if view.decoder.config.to_dict().get("num_key_value_heads"):
        one, own, every = (next(r for n, r in rows.items() if n.startswith(kind)) for kind in ("MQA", "GQA", "MHA"))
        assert [every["kv_bytes"] / row["kv_bytes"] for row in (one, own)] == pytest.approx([4, 2], rel=0.01)
    else:
        assert "GQA, MQA" in made["left_out"]
    variants, inexpressible = attention.variants_of(view.decoder.config)
    assert set(rows) | set(made["left_out"]) == {variant.name for variant in variants} | set(inexpressible)


def test_a_window_bounds_the_cache_where_the_config_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(zoo.model("llava-next"))  # Mistral
    monkeypatch.setattr(api, "load_view", lambda *args, **options: view)
    monkeypatch.setattr(attention, "PATIENCE", 0.0)
    made = attention.attention("x", tmp_path, longest=512)
    assert sorted({row["length"] for row in made["rows"]}) == [128, 256, 512]
    cache = {(row["variant"], row["length"]): row["kv_bytes"] for row in made["rows"]}
    assert cache["sliding window of 256", 512] < 1.1 * cache["sliding window of 256", 256]
    assert cache["eager", 512] == 2 * cache["eager", 256]
    assert any("no pass yet that simplifies attention" in sentence for sentence in made["says"])
    readable(tmp_path / "attention.svg")


def test_held_bytes_are_those_of_live_tensors() -> None:
    given = torch.ones(1000)
    with attention.Held(iter([given])) as held:
        a = given + 1  # 4,000 bytes
        b = a * 2  # 8,000
        del a
        (b.view(10, 100).T + 0).sum()  # 8,000 and a sum
        assert given.view(10, 100).T.shape == (100, 10)  # of what was given
    assert held.peak == 8004


# -------------------------------------------------------------------------------------------------------- distillation


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("distillation")
    plan = recipe(
        ("prune.layers", {"criterion": "random"}),
        ("distill.logits", {"steps": 9, "batch_size": 4}),
        ("quantize.rtn", {}),
    )
    return distillation.distillation("demo", plan, "demo", folder, steps=1), folder


def test_distillation_measures_teacher_before_and_after(distilled: tuple[dict[str, Any], Path]) -> None:
    made, folder = distilled
    assert [step["pass"] for step in made["made"]] == ["prune.layers"]
    assert made["distilled"]["pass"] == "distill.logits" and made["distilled"]["settings"]["steps"] == 1
    rows = {row["figure"]: row for row in made["rows"]}
    before, after = (made["students"][name] for name in distillation.STUDENTS)
    assert rows["KL"]["before"] == before["quality"]["kl"] > 0.01
    assert rows["KL"]["after"] == after["quality"]["kl"]
    assert rows["exact match"]["teacher"] == before["quality"]["exact_match"]["reference"]
    assert sum("kind: " in name for name in rows) == len(before["quality"]["by_tag"]["kind"]) > 1
    assert rows["CKA with the teacher"]["before"] == before["alignment"]["cka"] < 1
    readable(folder / "distillation.svg")
    assert json.loads((folder / "distillation.json").read_text())["says"] == made["says"]


def test_bias_is_shown_where_it_was_measured(distilled: tuple[dict[str, Any], Path]) -> None:
    students = json.loads(json.dumps(distilled[0]["students"]))
    for name, value in zip(distillation.STUDENTS, (0.2, 0.1)):
        students[name]["quality"]["bias"] = {"yes_rate": {"value": value, "ci95": [0.0, 0.3]}, "position": None}
    rows = [row for row in distillation._rows(students) if row["unit"] == "bias"]
    assert rows == [{"figure": "bias: yes rate", "unit": "bias", "teacher": 0.0, "before": 0.2, "after": 0.1}]


@pytest.mark.parametrize("passes", [[("quantize.rtn", {})], [("distill.logits", {}), ("quantize.rtn", {})]])
def test_a_recipe_without_a_student_or_without_distillation_is_refused(passes: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="makes a student and then distils it"):
        distillation.distillation("demo", recipe(*passes), "demo", tmp_path)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- alignment


def test_alignment_is_measured_after_each_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = {"ratio": 0.5, "what": ["hidden"], "importance": "magnitude", "multiple": 32}
    plan = recipe(("tokens.grid", {"keep": 0.5}), ("prune.structured", narrow))
    made = alignment.alignment("demo", plan, "demo", tmp_path)
    assert [stage["name"] for stage in made["stages"]] == ["original", "1 tokens.grid", "2 prune.structured"]
    first, fewer, narrower = made["stages"]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and first["alignment"]["cka"] == pytest.approx(1.0)
    assert fewer["alignment"]["blocks"][0]["cka"] == pytest.approx(1.0)  # the tower is as it was
    assert narrower["alignment"]["cka"] < fewer["alignment"]["cka"] < 1
    for stage in made["stages"]:
        assert set(stage["points"]) == set(alignment.PLACES)
        for kinds in stage["points"].values():
            assert all(40 < len(points) < 260 and len(points[0]) == 2 for points in kinds.values())
    assert any("axes of its own" in sentence for sentence in made["says"])
    for name in ("alignment", "alignment-embeddings"):
        readable(tmp_path / f"{name}.svg")
    experiments.show(made)
    printed = capsys.readouterr().out
    assert "2 prune.structured" in printed and f"plot: {tmp_path / 'alignment.svg'}" in printed
