"""Gates: bounds, actions, sentences."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from benchmarks import gates
from svlm.compress.base import Pass
from svlm.compress.errors import RecipeError
from svlm.compress.gate import SCORES, Gate
from svlm.compress.preflight import check_evidence, foreseen
from svlm.compress.recipe import Calibration, Recipe, Step


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


# ------------------------------------------------------------------------------------------------------------- evidence

SURE = Gate(max_drop=0.01, confidence=0.95)


def proved(lost, gained, n, effect=1.2):
    proof = {"lost": lost / n, "gained": gained / n, "n": n, "questions": n, "images": n // 4, "design_effect": effect}
    return quality(delta=(gained - lost) / n) | {"evidence": {"exact_match": proof}}


@pytest.mark.parametrize(
    ("lost", "gained", "n", "holds", "word"),
    [
        (0, 0, 512, True, "at 95 % confidence no more than 0.64 points"),
        (3, 2, 512, False, "at 95 % confidence up to 1.24 points: cannot tell with n = 512; 1,800 needed"),
        (12, 6, 512, False, "cannot tell with n = 512, nor with more if they come out alike"),
        (30, 5, 512, False, "at 95 % confidence more than 2.95 points"),
        (5, 4, 1024, True, "no more than 0.73 points"),
        (0, 0, 128, False, "cannot tell with n = 128; 740 needed"),
    ],
)
def test_a_gate_with_confidence_holds_only_on_evidence(lost, gained, n, holds, word):
    passed, says = SURE.judge(proved(lost, gained, n))
    assert passed is holds and word in says
    plain, sentence = Gate(max_drop=0.01).judge(proved(lost, gained, n))
    assert plain is (lost - gained <= 0.01 * n) and "confidence" not in sentence and says.startswith(sentence)


def test_a_gate_claims_no_gain():
    assert "no more than 0.00 points" in SURE.judge(proved(0, 30, 512))[1]


def test_more_confidence_asks_for_more():
    measured = proved(0, 0, 512)
    held = [Gate(max_drop=0.01, confidence=c).judge(measured)[0] for c in (0.5, 0.9, 0.99, 0.9999)]
    assert held == [True, True, False, False]


def test_agreement_and_kl_take_confidence_too():
    tokens = {"lost": 0.004, "gained": 0.0, "n": 1500, "questions": 512, "images": 128, "design_effect": 1.5}
    passed, says = Gate("agreement", max_drop=0.01, confidence=0.95).judge(
        quality(agreement=0.996) | {"evidence": {"agreement": tokens}}
    )
    assert passed and "no more than 0.8" in says
    passed, says = Gate("agreement", max_drop=0.005, confidence=0.95).judge(
        quality(agreement=0.996) | {"evidence": {"agreement": tokens}}
    )
    assert not passed and "cannot tell with n = 512;" in says, "questions, not tokens"
    kl = {"value": 0.02, "error": 0.004, "skew": 3.0, "questions": 512, "images": 128}
    measured = quality(kl=0.02) | {"evidence": {"kl": kl}}
    assert Gate("kl", max=0.04, confidence=0.95).judge(measured)[0]
    passed, says = Gate("kl", max=0.025, confidence=0.95).judge(measured)
    assert not passed and "up to 0.02" in says and "cannot tell with n = 512" in says
    assert "more than" in Gate("kl", max=0.01, confidence=0.95).judge(measured)[1]


@pytest.mark.parametrize(
    "value",
    [
        {"max_drop": 0.01, "confidence": 95},
        {"max_drop": 0.01, "confidence": "high"},
        {"max_drop": 0.01, "confidence": 0.2},
        {"max_drop": 0.0, "confidence": 0.95},
        {"metric": "perplexity", "max": 2.0, "confidence": 0.95},
    ],
)
def test_confidence_that_makes_no_sense_is_refused(value):
    with pytest.raises(RecipeError, match=r"confidence|proves a loss of 0"):
        Gate.from_json(value)


def test_confidence_travels():
    assert Gate.parse("exact_match max_drop=0.01 confidence=0.95") == SURE == Gate.from_json(SURE.to_json())
    assert "confidence" not in Gate(max_drop=0.01).to_json(), "chains of runs without it stay as they were"


def test_what_a_plan_can_foresee():
    assert "check: 128 cannot prove a loss of at most 1.00 points" in SURE.foresees(128) and SURE.hopeless(128)
    likely = SURE.foresees(512)
    assert "likely too few" in likely and "check: 2600" in likely and not SURE.hopeless(512)
    assert SURE.foresees(2600) is None and Gate(max_drop=0.01).foresees(1) is None
    assert Gate("kl", max=0.1, confidence=0.95).foresees(1) is None and not Gate(max_drop=0.01).hopeless(1)


@dataclass(frozen=True)
class Nothing(Pass):
    name: ClassVar[str] = "test.nothing"
    summary: ClassVar[str] = "changes nothing"


def recipe(check, **gate):
    step = Step(Nothing(), Gate(max_drop=0.01, confidence=0.95, **gate))
    return Recipe((step, Step(Nothing()), step), Calibration(check=check))


def test_a_run_that_cannot_pass_does_not_begin():
    with pytest.raises(RecipeError, match="too small for the confidence") as caught:
        check_evidence(recipe(128), 128)
    assert "step 1 (test.nothing)" in str(caught.value) and "check: 2600" in str(caught.value)
    check_evidence(recipe(128, on_fail="keep"), 128)
    check_evidence(recipe(512), 512)
    (careful,) = foreseen(recipe(512), 512)
    assert careful.startswith("careful: gate of step 1 (test.nothing), 3 (test.nothing): check: 512 is likely too few")
    assert foreseen(recipe(3000), 3000) == []


def test_planted_damage_is_stopped_and_none_is_not():
    """benchmarks/gates.py in small: n = 1,024, questions clustered by picture."""
    lost, fine = "3 points lost, many flips", "few flips, nothing lost"
    assert gates.passes(SURE, 1024, "4 a picture", lost, 40)["passes"] == 0
    assert gates.passes(Gate(max_drop=0.02), 1024, "4 a picture", fine, 40)["passes"] >= 0.95
    assert gates.passes(Gate(max_drop=0.02, confidence=0.95), 1024, "4 a picture", fine, 40)["passes"] >= 0.85
