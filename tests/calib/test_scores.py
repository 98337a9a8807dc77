"""Scores of answers against loops and against public implementations on the same inputs.

`metrics_peers.json` holds what lmms-eval 0.7.3 and pycocoevalcap 1.2 gave (`benchmarks/metrics_peers.py`); torchmetrics
is asked here.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from svlm.calib.metrics import captions, scores
from svlm.calib.metrics.answers import exact_match
from svlm.calib.metrics.calibration import calibration
from svlm.calib.metrics.divergence import perplexity
from svlm.calib.metrics.near import _distance, anls, relaxed
from svlm.calib.metrics.vqa import spelled_alike, vqa_accuracy
from svlm.calib.metrics.yes_no import asked, verdict, yes_no
from svlm.compress.errors import DataError, UsageError
from svlm.compress.gate import SCORES
from tests.oracles import metrics as oracle

PEERS: dict[str, Any] = json.loads((Path(__file__).parent / "metrics_peers.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- VQA soft accuracy


def test_vqa_accuracy_equals_lmms_evals_vqav2_and_textvqa() -> None:
    rows = [row for row in PEERS["vqa"] if "score" in row]
    for row in rows:
        found = vqa_accuracy(row["answer"], row["references"])
        assert found == pytest.approx(row["score"]) == pytest.approx(row.get("textvqa", row["score"])), row
    assert sum(0 < row["score"] < 1 for row in rows) > 15 and sum("textvqa" in row for row in rows) > 15


def test_answers_are_spelled_as_lmms_evals_processor_spells_them() -> None:
    rows = [row for row in PEERS["vqa"] if "spelled" in row]
    assert len(rows) > 40 and sum(row["answer"] != row["spelled"] for row in rows) > 20
    assert [spelled_alike(row["answer"]) for row in rows] == [row["spelled"] for row in rows]


@pytest.mark.parametrize("matches", range(11))
def test_of_ten_people_each_is_left_out_once(matches: int) -> None:
    people = ["cat"] * matches + ["dog"] * (10 - matches)
    assert vqa_accuracy("cat", people) == pytest.approx(float(oracle.left_out("cat", people)))


def test_another_number_of_people_has_no_one_left_out() -> None:
    assert [vqa_accuracy("cat", ["cat"] * k + ["dog"] * (5 - k)) for k in range(6)] == [0, 1 / 3, 2 / 3, 1, 1, 1]
    assert vqa_accuracy("cat", ["cat"]) == 1 and vqa_accuracy("cat", ["cat", "dog"]) == 0.5
    assert vqa_accuracy("cat", []) == 0


# ------------------------------------------------------------------------------------------ nearly right, exactly right


def test_anls_equals_lmms_evals() -> None:
    for row in PEERS["anls"]:
        assert anls(row["answer"], row["references"]) == pytest.approx(row["score"]), row
    found = [row["score"] for row in PEERS["anls"]]
    assert sum(0 < x < 1 for x in found) > 20 and 0 in found and 1 in found


def test_the_edit_distance_equals_trying_everything() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abc", k=draw.randint(0, 5))) for _ in range(12)]
    for a, b in itertools.product(words, repeat=2):
        assert _distance(a, b) == oracle.edits(a, b)


def test_anls_is_nothing_below_one_half_and_takes_the_best_reference() -> None:
    assert anls("ab", ["abcd"]) == 0.5 and anls("ab", ["abcde"]) == 0 and anls("", ["abc"]) == 0
    assert anls("  New   York ", ["Boston", "new york"]) == 1 and anls("x", []) == 0 and anls("", [""]) == 1


def test_relaxed_accuracy_equals_lmms_evals_chartqa() -> None:
    found = [row["score"] for row in PEERS["relaxed"]]
    assert [relaxed(row["answer"], row["references"]) for row in PEERS["relaxed"]] == found
    assert 20 < sum(found) < len(found) - 20
    assert relaxed("104", ["7", "100"]) and not relaxed("106", ["7", "100"])


def test_exact_match_equals_lmms_evals_processor_on_plain_answers() -> None:
    """Where an answer has nothing but words, numbers, articles and a full stop, both rules are one."""
    plain = [r for r in PEERS["vqa"] if "spelled" in r and r["answer"].strip(".").replace(" ", "").isalnum()]
    pairs = list(itertools.combinations([r for r in plain if r["answer"].lower() not in ("none", "a", "0")], 2))
    same = [exact_match(a["answer"], [b["answer"]]) for a, b in pairs if "know" not in a["answer"] + b["answer"]]
    expected = [a["spelled"] == b["spelled"] for a, b in pairs if "know" not in a["answer"] + b["answer"]]
    assert same == expected and sum(expected) == 2 and len(expected) > 60


# -------------------------------------------------------------------------------------------------------------- yes, no


def test_yes_and_no_equal_lmms_evals_pope() -> None:
    rows = PEERS["pope"]["rows"]
    found = yes_no([row["right"] == "yes" for row in rows], [verdict(row["answer"]) for row in rows])
    ours = [found[key] for key in ("accuracy", "precision", "recall", "f1")]
    assert ours == pytest.approx([PEERS["pope"][key] for key in ("accuracy", "precision", "recall", "f1_score")])
    assert found["n"] == 60 and found["neither"] == 0 and 0 < found["f1"] < 1


def test_yes_and_no_equal_torchmetrics() -> None:
    theirs = pytest.importorskip("torchmetrics.functional.classification")
    draw = random.Random(6)
    right, said = ([draw.random() < p for _ in range(100)] for p in (0.4, 0.6))
    found = yes_no(right, said)
    for key in ("accuracy", "precision", "recall", "f1_score"):
        expected = getattr(theirs, f"binary_{key}")(torch.tensor(said).int(), torch.tensor(right).int())
        assert found[key.removesuffix("_score")] == pytest.approx(float(expected))
    assert found["yes_rate"] == sum(said) / 100


def test_what_says_neither_is_wrong_and_no_yes() -> None:
    found = yes_no([True, True, False], [True, None, None])
    assert found["accuracy"] == pytest.approx(1 / 3) and found["neither"] == 2 and found["yes_rate"] == 1 / 3
    assert (found["precision"], found["recall"], found["f1"]) == (1.0, 0.5, pytest.approx(2 / 3))
    nothing = yes_no([False], [False])
    assert (nothing["precision"], nothing["recall"], nothing["f1"], nothing["accuracy"]) == (None, None, None, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [("Yes", True), ("yes, there is.", True), ("No", False), ("There is no dog. Yes.", False), ("it is not", False),
     ("maybe", None), ("", None), ("nothing", None)],
)  # fmt: skip
def test_what_an_answer_says(text: str, says: bool | None) -> None:
    assert verdict(text) is says


def test_which_questions_are_answered_by_yes_or_no() -> None:
    assert asked(["Yes."]) is True and asked(["no"]) is False and asked(["yes", "two"]) is None and asked([]) is None
    assert asked(["yes", "no", "no"]) is False and asked(["yes", "no"]) is True and asked(["no", "yes"]) is False


# ----------------------------------------------------------------------------------------------------- being sure of it


def sure(n: int = 300) -> tuple[list[float], list[bool]]:
    draw = random.Random(3)
    confidence = [draw.betavariate(4, 1) for _ in range(n)]
    return confidence, [draw.random() < 0.8 * c for c in confidence]


def test_the_calibration_error_equals_the_loop_and_torchmetrics() -> None:
    confidence, right = sure()
    error, bins = calibration(confidence, right)
    assert error == pytest.approx(oracle.calibration_error(confidence, right, 15)) and 0.1 < error < 0.3
    assert sum(row["n"] for row in bins) == 300 and all(row["low"] < row["confidence"] <= row["high"] for row in bins)
    theirs = pytest.importorskip("torchmetrics.functional.classification")
    # with two classes, a probability above one half is of class 1, which is right where the target is 1
    above = [(c, r) for c, r in zip(confidence, right) if c > 0.5]
    probabilities, target = torch.tensor([c for c, _ in above]).double(), torch.tensor([r for _, r in above]).int()
    expected = theirs.binary_calibration_error(probabilities, target, n_bins=15, norm="l1")
    assert calibration([c for c, _ in above], [r for _, r in above])[0] == pytest.approx(float(expected), abs=1e-6)


def test_calibration_at_the_edges() -> None:
    assert calibration([1.0, 1.0, 0.0], [True, True, False])[0] == 0
    assert calibration([1.0, 1.0], [False, True])[0] == 0.5 and calibration([], []) == (0.0, [])
    error, bins = calibration([0.2, 0.2000001], [True, True], bins=5)
    assert [row["n"] for row in bins] == [1, 1] and error == pytest.approx(0.8, abs=1e-6), "0.2 closes the first bin"


def test_perplexity_equals_torchmetrics() -> None:
    text = pytest.importorskip("torchmetrics.functional.text")
    logits = torch.randn(1, 12, 30, generator=torch.Generator().manual_seed(0))
    target = torch.arange(12)[None]
    chosen = logits.log_softmax(-1).gather(-1, target[..., None])
    assert perplexity(chosen.flatten()) == pytest.approx(float(text.perplexity(logits, target)), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- captions


@pytest.mark.peers
@pytest.mark.parametrize("name", ["cider", "bleu"])
def test_captions_are_scored_by_pycocoevalcap(name: str) -> None:
    pytest.importorskip("pycocoevalcap")
    made = PEERS["captions"]
    found = scores.rate(name, [f"{text.upper()}." for text in made["answers"]], made["references"])
    assert found == pytest.approx(made[name]) and len({round(x, 6) for x in found}) > 10
    nothing = scores.rate(name, ["", "a b c d"], [["x y z w"], ["a b c d"]])
    assert nothing[0] == 0 and nothing[1] > 0.99


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    for name in scores.NEEDS_CAPTIONS:
        with pytest.raises(UsageError, match=r"pycocoevalcap[\s\S]*svlm\[captions\]"):
            scores.chosen(name, ())


def test_words_of_a_caption() -> None:
    assert captions.words('A man, in a "T-shirt": it\'s 2 dogs!') == "a man in a t-shirt it's 2 dogs"


# ------------------------------------------------------------------------------------------------------------- choosing


def test_which_score_the_data_have() -> None:
    ten = ["cat"] * 10
    assert scores.chosen(None, [ten, ten]) == "vqa" and scores.chosen("exact_match", [ten]) == "exact_match"
    assert scores.chosen(None, [ten, ten[:9]]) == "exact_match" == scores.chosen(None, [])
    with pytest.raises(DataError, match="did you mean 'anls'"):
        scores.chosen("anl", ())
    for name in ("exact_match", "vqa", "anls", "relaxed"):
        assert scores.rate(name, ["cat", "x"], [["cat"] * 3, ["dog"]]) == [1.0, 0.0]
    assert set(scores._RATE) == {"exact_match", *SCORES}
