"""Gates: bounds, actions, sentences."""

import pytest

from svlm.compress.errors import RecipeError
from svlm.compress.gate import SCORES, Gate


def quality(delta=0.0, agreement=1.0, kl=0.0, perplexity=1.0):
    exact = {"value": 0.8 + delta, "reference": 0.8, "delta": delta, "ci95": [delta - 0.01, delta + 0.01]}
    return {"exact_match": exact, "agreement": agreement, "kl": kl, "perplexity": perplexity}


@pytest.mark.parametrize(
    ("delta", "holds"), [(0.01, True), (0.0, True), (-0.02, True), (-0.0201, False), (-0.5, False)]
)
def test_exact_match_bounds_the_drop_against_the_original(delta, holds):
    passed, says = Gate("exact_match", max_drop=0.02).judge(quality(delta=delta))
    assert passed is holds
    assert f"lost {0.0 - 100 * delta:.2f} points" in says and "95 % interval" in says


def test_other_metrics():
    assert Gate("agreement", max_drop=0.1).judge(quality(agreement=0.91))[0]
    assert not Gate("agreement", max_drop=0.1).judge(quality(agreement=0.89))[0]
    assert Gate("kl", max=0.05).judge(quality(kl=0.05))[0]
    assert not Gate("kl", max=0.05).judge(quality(kl=0.051))[0]
    assert not Gate("kl", max=0.05).judge(quality(kl=float("nan")))[0], "a figure that is not a number never passes"
    assert not Gate("perplexity", max=2).judge(quality(perplexity=2.5))[0]


def test_from_json_and_text_agree():
    wanted = Gate("exact_match", max_drop=0.01, on_fail="retry")
    assert Gate.from_json({"metric": "exact_match", "max_drop": 0.01, "on_fail": "retry"}) == wanted
    assert Gate.parse("exact_match max_drop=0.01 on_fail=retry") == wanted
    assert Gate.from_json(wanted.to_json()) == wanted


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"metric": "exact_mach", "max_drop": 0.1}, "exact_match"),
        ({"metric": "exact_match", "max_drp": 0.1}, "max_drop"),
        ({"metric": "exact_match", "max_drop": 0.1, "on_fail": "retri"}, "retry"),
        ({"metric": "exact_match"}, "max_drop"),
        ({"metric": "kl", "max_drop": 0.1}, "max"),
        ({"metric": "exact_match", "max_drop": "much"}, "number"),
        ({"metric": "exact_match", "max_drop": -0.1}, "at least 0"),
        ([1], "mapping"),
    ],
)
def test_wrong_gates_say_what_to_change(value, word):
    with pytest.raises(RecipeError, match=word):
        Gate.from_json(value)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_of_the_data_bounds_its_own_drop(name):
    quality = {"score": {"name": name, "delta": -0.015, "ci95": [-0.03, 0.001]}}
    passed, says = Gate(name, max_drop=0.01).judge(quality)
    assert not passed and says.startswith(f"{SCORES[name]} lost 1.50 points (95 % interval -0.10 to 3.00)")
    assert Gate.parse(f"{name} max_drop=0.02").judge(quality)[0]
    for other in ({}, {"score": quality["score"] | {"name": "another"}}):
        with pytest.raises(RecipeError, match="was not measured"):
            Gate(name, max_drop=0.01).judge(other)
