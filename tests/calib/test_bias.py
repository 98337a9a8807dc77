"""Bias against loops, and on simulated answers: a preference is found, being wrong more often is not taken for one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from svlm.calib.metrics.bias import Cells, answer_prior, bias, lean, tag_gap
from svlm.calib.metrics.kinds import OTHER, chosen, kinds, lumped, options, settled
from svlm.calib.metrics.pairs import paired_bootstrap
from svlm.calib.metrics.resample import Pictures, bootstrap, ratio
from svlm.calib.sample import Sample
from tests.oracles import bias as oracle

ANSWERS = {
    "exists": ["yes", "no"],
    "count": ["1", "2", "2", "3", "3"],
    "colour": ["red", "green", "blue", "white"],
    "name": [f"thing {i}" for i in range(30)],
}


def asked(pictures: int, seed: int, per_picture: int = 4) -> list[Sample]:
    draw = random.Random(seed)
    samples = []
    for i in range(pictures):
        for k in range(per_picture):
            kind = draw.choice(list(ANSWERS))
            tags = {"kind": kind, "style": draw.choice("ab"), "number": f"{i}-{k}"}
            answer = draw.choice(ANSWERS[kind])
            samples.append(Sample(f"{i}-{k}", f"p{i}", (), f"{kind} of what?", (answer,), tags))
    return samples


def said(samples: Sequence[Sample], wrong: float, seed: int, prefer: str = "", often: float = 0.0) -> list[str]:
    """Right answers, a share of them exchanged for another answer to that kind, or for the preferred one.

    Whole pictures are harder than others. An exchange follows the right answers' own distribution: no preference.
    """
    draw = random.Random(seed)
    hard = {s.image_id: draw.expovariate(1) for s in samples}
    answers = []
    for s in samples:
        of_kind = ANSWERS[s.tags["kind"]]
        answer = draw.choice(of_kind) if draw.random() < wrong * hard[s.image_id] else s.answers[0]
        answers.append(prefer if prefer in of_kind and draw.random() < often else answer)
    return answers


# -------------------------------------------------------------------------------------------------------- against loops


@pytest.fixture(scope="module")
def items() -> tuple[list[Sample], list[str], list[str]]:
    samples = asked(60, 1)
    return samples, said(samples, 0.1, 2), said(samples, 0.2, 3, "2", 0.3)


def test_figures_equal_the_loops(items: tuple[list[Sample], list[str], list[str]]) -> None:
    samples, was, now = items
    images, groups = [s.image_id for s in samples], [s.tags["kind"] for s in samples]
    truth = [s.answers[0] for s in samples]
    pictures, cells = Pictures.of(images), Cells.of(groups, truth, was, now)
    leaning = lean(pictures, cells)
    assert leaning.estimate == pytest.approx(oracle.lean(images, groups, truth, was, now))
    assert leaning.estimate[0] > 0
    prior = answer_prior(pictures, cells)
    for kind, figures in prior["by_kind"].items():
        own = [[a for a, g in zip(row, groups) if g == kind] for row in (truth, was, now)]
        assert figures["value"] == pytest.approx(oracle.total_variation(own[2], own[0]))
        assert figures["reference"] == pytest.approx(oracle.total_variation(own[1], own[0]))
        assert figures["between"] == pytest.approx(oracle.total_variation(own[2], own[1]))
        assert figures["n"] == len(own[0])
    mean = sum(f["n"] * f["value"] for f in prior["by_kind"].values()) / len(samples)
    assert prior["distance"]["value"] == pytest.approx(mean)
    right = [[a == t for a, t in zip(row, truth)] for row in (was, now)]
    gap = tag_gap(pictures, groups, *(np.array(row, dtype=float) for row in right))
    assert gap is not None
    expected = oracle.gaps(images, groups, *right)
    assert [gap["reference"], gap["student"]] == pytest.approx(expected)
    assert gap["value"] == pytest.approx(expected[1] - expected[0])


def test_the_general_bootstrap_gives_the_interval_of_means(items: tuple[list[Sample], list[str], list[str]]) -> None:
    samples, was, now = items
    images = [s.image_id for s in samples]
    right = [[a == s.answers[0] for a, s in zip(row, samples)] for row in (was, now)]
    pictures = Pictures.of(images)
    change = pictures.sums(np.subtract(right[1], right[0], dtype=float))
    size = pictures.sums(np.ones(len(samples)))
    found = bootstrap(pictures.count, lambda w: ratio(w @ change, w @ size), resamples=10_000)
    assert found.percentile() == pytest.approx(paired_bootstrap(*right, images), abs=0.01)
    assert found.normal() == pytest.approx(found.percentile(), abs=0.01)
    assert found.estimate[0] == pytest.approx(np.mean(right[1]) - np.mean(right[0]))
    low, high = found.together()[0]
    assert (low, high) == pytest.approx(found.normal(), abs=0.01), "one figure: nothing to correct for"


def test_intervals_for_all_figures_at_once_are_wider_and_hold() -> None:
    draw = np.random.default_rng(0)
    missed = {"each": 0, "together": 0}
    for _ in range(60):
        table = draw.standard_normal((80, 12))
        found = bootstrap(80, lambda w, table=table: w @ table / 80, resamples=400)
        each = np.array([found.normal(i) for i in range(12)])
        for name, bounds in (("each", each), ("together", found.together())):
            missed[name] += bool(((bounds[:, 0] > 0) | (bounds[:, 1] < 0)).any())
    assert missed["together"] <= 8 < missed["each"], "of sixty: 5 % and nearly half"


# ---------------------------------------------------------------------------------------------------- planted, and none


def test_a_preferred_answer_is_found_and_named() -> None:
    samples = asked(128, 5)
    found = bias(samples, said(samples, 0.02, 6), said(samples, 0.03, 7, "3", 0.4))
    assert found["grouped_by"] == "tag kind"
    assert found["amplification"]["ci95"][0] > 0 and found["amplification"]["value"] > 0.02
    first = found["answer_prior"]["gained"][0]
    assert (first["kind"], first["answer"]) == ("count", "3") and first["ci95"][0] > 0
    assert first["value"] - first["reference"] == pytest.approx(first["delta"])
    assert found["answer_prior"]["distance"]["p"] < 0.01
    assert any("'3' is given more often" in sentence for sentence in found["says"])
    assert any("given too often" in sentence for sentence in found["says"])


def test_a_student_that_amplifies_its_biased_teacher_is_told_from_one_that_copies_it() -> None:
    samples = asked(128, 8)
    teacher = said(samples, 0.02, 9, "2", 0.15)
    own, more = said(samples, 0.05, 10, "2", 0.15), said(samples, 0.02, 11, "2", 0.5)
    copy = [mine if i % 8 == 0 else theirs for i, (mine, theirs) in enumerate(zip(own, teacher))]
    low, high = bias(samples, teacher, copy)["amplification"]["ci95"]
    assert low < 0 < high
    amplified = bias(samples, teacher, more)["amplification"]
    assert amplified["ci95"][0] > 0 and amplified["reference"]["value"] > 0.01
    assert bias(samples, more, teacher)["amplification"]["value"] == pytest.approx(-amplified["value"])


def test_an_identical_student_has_no_bias_at_all() -> None:
    samples = asked(30, 12)
    same = said(samples, 0.2, 13)
    found = bias(samples, same, same)
    assert found["amplification"]["value"] == 0 and found["amplification"]["ci95"] == [0, 0]
    assert found["answer_prior"]["value"] == 0 and found["answer_prior"]["gained"] == []
    assert found["answer_prior"]["distance"]["between"] == 0 and found["answer_prior"]["distance"]["p"] == 1
    assert found["yes_rate"]["value"] == 0 and found["says"] == [] and found["position"] is None
    assert set(found["tag_gap"]) == {"kind", "style"}, "numbers that every question has its own of are no groups"
    assert all(gap["value"] == 0 for gap in found["tag_gap"].values())


def alarms(trials: int, student: Callable[[list[Sample], int], list[str]]) -> tuple[int, int]:
    """How often the interval of amplification lies above zero, and below."""
    above = below = 0
    for trial in range(trials):
        samples = asked(128, 100 + trial)
        found = bias(samples, said(samples, 0.02, 5_000 + trial), student(samples, 9_000 + trial))
        low, high = found["amplification"]["ci95"]
        above, below = above + (low > 0), below + (high < 0)
    return above, below


def test_being_wrong_more_often_is_no_bias() -> None:
    assert alarms(8, lambda samples, seed: said(samples, 0.12, seed))[0] <= 1


@pytest.mark.slow
def test_false_alarms_and_power_over_200_trials() -> None:
    """An unbiased pair: at most 1 in 20 on either side; a clear preference: 19 of 20."""
    for wrong in (0.02, 0.06, 0.15):
        above, below = alarms(200, lambda samples, seed, wrong=wrong: said(samples, wrong, seed))
        assert above <= 10 and below <= 10, f"{above} above, {below} below of 200, {wrong} wrong"
    above, _ = alarms(200, lambda samples, seed: said(samples, 0.03, seed, "3", 0.35))
    assert above >= 190


# ----------------------------------------------------------------------------------------------------- yes and position


def test_yes_rate() -> None:
    samples = asked(100, 20)
    found = bias(samples, said(samples, 0.0, 21), said(samples, 0.0, 22, "yes", 0.3))["yes_rate"]
    n = sum(s.tags["kind"] == "exists" for s in samples)
    assert found["n"] == n and found["reference"] == found["right"] and found["ci95"][0] > 0
    assert found["value"] == pytest.approx(found["student"] - found["reference"])
    coloured = [s for s in samples if s.tags["kind"] == "colour"]
    assert bias(coloured, *[[s.answers[0] for s in coloured]] * 2)["yes_rate"] is None


@pytest.mark.parametrize(
    ("question", "listed"),
    [
        ("what is it?\nA. cat\nB. dog\nC. a red bear", ["cat", "dog", "a red bear"]),
        ("which one? (A) cat (B) dog", ["cat", "dog"]),
        ("which one? (a) cat, (b) dog", ["cat", "dog"]),
        ("Pick: A) left, B) right\nAnswer with the letter.", ["left", "right"]),
        ("what is it?", None),
        ("who is J. Smith?", None),
        ("which? A. cat", None),
        ("which? A. cat C. dog", None),
        ("which? B. cat A. dog", None),
        ("which? A. cat B. cat", None),
        ("is this vitamin A or B?", None),
    ],
)
def test_options_are_read_with_certainty_or_not_at_all(question: str, listed: list[str] | None) -> None:
    assert options(question) == listed


@pytest.mark.parametrize(
    ("answer", "place"),
    [("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("B. dog", 1), ("Dog", 1), ("the dog", 1), ("C", None), ("bird", None),
     ("", None), ("a dog and a cat", None)],
)  # fmt: skip
def test_which_option_an_answer_names(answer: str, place: int | None) -> None:
    assert chosen(answer, ["cat", "dog"]) == place


def test_a_student_that_likes_the_first_option_is_found() -> None:
    draw = random.Random(0)
    samples = [
        Sample(f"{i}", f"p{i}", (), "what?\nA. cat\nB. dog\nC. bear\nD. owl", (draw.choice("ABCD"),))
        for i in range(120)
    ]
    right = [s.answers[0] for s in samples]
    first = ["A. cat" if draw.random() < 0.3 else a for a in right[:-1]] + ["none of them"]
    found = bias(samples, right, first)["position"]
    assert found["ci95"][0] > 0 and found["n"] == 119 and found["unread"] == 1
    assert found["by_option"]["A"]["ci95"][0] > 0
    assert sum(option["value"] for option in found["by_option"].values()) == pytest.approx(0)


# ---------------------------------------------------------------------------------------------------------------- kinds


def test_kinds_come_from_the_tag_that_tells_most_then_from_the_words_then_from_nothing() -> None:
    samples = asked(60, 30)
    truth = [s.answers[0] for s in samples]
    tags, questions = [s.tags for s in samples], [s.question or "" for s in samples]
    assert kinds(tags, questions, truth) == ("tag kind", [s.tags["kind"] for s in samples])
    name, groups = kinds([{}] * len(samples), questions, truth)
    assert name == "first words" and set(groups) == {f"{kind} of" for kind in ANSWERS}
    assert kinds([{}] * len(samples), ["what?"] * len(samples), truth) == ("all questions", ["all"] * len(samples))
    assert lumped(["a"] * 8 + ["b"] * 7) == ["a"] * 8 + [OTHER] * 7


def test_a_right_answer_counts_as_the_first_accepted_one() -> None:
    assert settled("A sofa.", ["couch", "sofa"]) == "couch" and settled("The Chair", ["couch"]) == "chair"


def test_few_questions_and_one_picture_are_no_error() -> None:
    one = asked(1, 40)
    found = bias(one, said(one, 0.5, 41), said(one, 0.9, 42))
    assert found["amplification"]["n"] == 4 and np.isfinite(found["amplification"]["value"])
    many = asked(1, 43, per_picture=40)
    found = bias(many, said(many, 0.1, 44), said(many, 0.9, 45))
    assert found["tag_gap"] == {}, "one picture: nothing to choose on"
    json.dumps(found, allow_nan=False)
