"""Recipes: every key is checked, every value typed, and nothing in one is a code path."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from svlm.compress.errors import RecipeError
from svlm.compress.gate import Gate
from svlm.compress.recipe import DEFAULT_GATE, Recipe, read_recipe
from svlm.passes import find
from svlm.recipes import SHIPPED

GOOD = """
calibration: {fit: 64, check: 128, seed: 3}
gate: {metric: exact_match, max_drop: 0.05}
passes:
  - tokens.grid: {keep: 0.5}
  - quantize.gptq: {bits: 3, group: 64, where: [vision, language]}
    gate: {metric: kl, max: 0.2, on_fail: retry}
  - quantize.rtn
"""


def test_a_good_recipe_and_its_round_trip():
    recipe = Recipe.from_json(yaml.safe_load(GOOD), find)
    assert [s.step.name for s in recipe.steps] == ["tokens.grid", "quantize.gptq", "quantize.rtn"]
    assert recipe.steps[0].gate == Gate("exact_match", max_drop=0.05)
    assert recipe.steps[1].gate == Gate("kl", max=0.2, on_fail="retry")
    assert recipe.steps[1].step.settings()["where"] == ["vision", "language"]
    assert (recipe.calibration.fit, recipe.calibration.check, recipe.calibration.seed) == (64, 128, 3)
    assert Recipe.from_json(recipe.to_json(), find).to_json() == recipe.to_json()


def test_a_step_without_a_gate_takes_the_default_and_null_means_none():
    steps = Recipe.from_json({"passes": ["quantize.rtn", {"quantize.rtn": {}, "gate": None}]}, find).steps
    assert steps[0].gate == DEFAULT_GATE
    assert steps[1].gate is None


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"passes": [{"quantize.gptk": {}}]}, "quantize.gptq"),
        ({"passes": [{"quantize.gptq": {"bit": 4}}]}, "'bits'"),
        ({"passes": [{"quantize.gptq": {"bits": "four"}}]}, "wrong kind"),
        ({"passes": [{"quantize.gptq": {"bits": True}}]}, "wrong kind"),
        ({"passes": [{"quantize.gptq": {"where": 3}}]}, r"give a list \(each a text\) or a text"),
        ({"passes": [{"prune.structured": {"what": "mlpp"}}]}, "one of mlp, heads"),
        ({"passes": [{"distill.logits": {"lr": float("inf")}}]}, "finite"),
        ({"passes": [{"distill.features": {"weight": float("nan")}}]}, "finite"),
        ({"passes": [{"quantize.gptq": [4]}]}, "mapping"),
        ({"passes": [{"quantize.gptq": {}, "quantize.rtn": {}}]}, "one pass"),
        ({"passes": [{"gate": None}]}, "one pass"),
        ({"passes": []}, "at least one"),
        ({"pases": [{"quantize.rtn": {}}]}, "'passes'"),
        ({"passes": ["quantize.rtn"], "calibration": {"fitt": 3}}, "'fit'"),
        ({"passes": ["quantize.rtn"], "calibration": {"fit": 0}}, "at least 1"),
        ({"passes": ["quantize.rtn"], "calibration": {"check": 1.5}}, "whole number"),
        ({"passes": [{"repeat": {"times": 0, "passes": ["quantize.rtn"]}}]}, "at least 1"),
        ({"passes": [{"repeat": {"times": 2}}]}, "lists at least one pass"),
        ({"passes": [{"repeat": {"tims": 2, "passes": ["quantize.rtn"]}}]}, "'times'"),
        ({"passes": [{"repeat": ["quantize.rtn"]}]}, "mapping"),
        (
            {"passes": [{"repeat": {"times": 2, "passes": [{"quantize.gptk": {}}]}}]},
            r"passes\[0\]: repeat: passes\[0\]",
        ),
        ("quantize.rtn", "mapping"),
        ({"passes": ["os:system"]}, "no pass"),
    ],
)
def test_wrong_recipes_say_what_and_where(value, word):
    with pytest.raises(RecipeError, match=word):
        Recipe.from_json(value, find)


def test_repeat_stands_for_its_passes_several_times():
    inside = [{"prune.structured": {"ratio": 0.2}}, {"distill.logits": {"steps": 5}, "gate": None}]
    rows = [{"repeat": {"times": 2, "passes": inside}, "gate": {"metric": "kl", "max": 0.5}}, "quantize.rtn"]
    recipe = Recipe.from_json({"passes": rows}, find)
    assert [s.step.name for s in recipe.steps] == ["prune.structured", "distill.logits"] * 2 + ["quantize.rtn"]
    gates = [s.gate for s in recipe.steps]
    assert gates[0] == gates[2] != DEFAULT_GATE and gates[1] is gates[3] is None and gates[4] == DEFAULT_GATE
    assert Recipe.from_json(recipe.to_json(), find).steps == recipe.steps
    nested = {"passes": [{"repeat": {"times": 2, "passes": [{"repeat": {"times": 3, "passes": ["quantize.rtn"]}}]}}]}
    assert len(Recipe.from_json(nested, find).steps) == 6


def test_override_reaches_every_such_step_and_checks_types():
    recipe = Recipe.from_json({"passes": ["quantize.rtn", {"tokens.grid": {"keep": 0.5}}]}, find)
    changed = recipe.override([("quantize.rtn", "bits", "3"), ("tokens.grid", "keep", "0.25")])
    assert changed.steps[0].step.settings()["bits"] == 3
    assert changed.steps[1].step.settings()["keep"] == 0.25
    assert recipe.steps[0].step.settings()["bits"] == 4, "the recipe itself is frozen"
    with pytest.raises(RecipeError, match="no pass"):
        recipe.override([("quantize.gptq", "bits", "3")])
    with pytest.raises(RecipeError, match="no setting"):
        recipe.override([("quantize.rtn", "bist", "3")])
    with pytest.raises(RecipeError, match="wrong kind"):
        recipe.override([("quantize.rtn", "bits", "[3]")])


def test_every_shipped_recipe_reads():
    assert {"default", "int4", "tokens-half", "tiny"} <= set(SHIPPED)
    for name in SHIPPED:
        assert read_recipe(name, find, SHIPPED).steps


def test_unknown_recipe_names_those_that_ship(tmp_path: Path):
    with pytest.raises(RecipeError, match="did you mean 'default'"):
        read_recipe("defalt", find, SHIPPED)
    broken = tmp_path / "r.yaml"
    broken.write_text("passes: [")
    with pytest.raises(RecipeError, match="not YAML"):
        read_recipe(broken, find, SHIPPED)


def test_the_datas_own_score_is_named_once() -> None:
    def score(**more: Any) -> str | None:
        return Recipe.from_json({"passes": ["quantize.rtn"], **more}, find).score

    gate = {"metric": "anls", "max_drop": 0.01}
    assert score() is None and score(calibration={"score": "vqa"}) == "vqa" and score(gate=gate) == "anls"
    assert score(calibration={"score": "anls"}, gate=gate) == "anls"
    with pytest.raises(RecipeError, match="a run measures one score"):
        score(calibration={"score": "vqa"}, gate=gate)
    with pytest.raises(RecipeError, match="did you mean 'relaxed'"):
        score(calibration={"score": "relax"})
