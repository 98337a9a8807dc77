"""Robustness: what is asked, of whom, and what follows from right and wrong, by loops and on planted losses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from svlm.calib import robustness as r
from svlm.calib.dataset import CalibrationSet
from svlm.calib.demo import MODEL
from svlm.calib.sample import Sample
from svlm.compress.errors import DataError, UsageError
from svlm.compress.report.tables import print_robustness
from svlm.passes import analyses, api


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return CalibrationSet.load("demo", fit=4, check=48).check


class Talks:
    """A judge whose model gets the questions wrong that `fails` says."""

    def __init__(self, known: list[Sample], fails: Any) -> None:
        self.samples, self.fails, self.score = known, fails, "exact_match"
        self.asked: list[list[Sample]] = []

    def answers(self, model: Any, samples: Sequence[Sample]) -> list[str]:
        self.asked.append(list(samples))
        return ["wrong" if self.fails(s) else s.answers[0] for s in samples]


def bench(samples: list[Sample], original: Any, small: Any) -> Any:
    judges = Talks(samples, original), Talks(samples, small)
    return SimpleNamespace(
        judge=judges[0], original=None, other=judges[1], speaking=lambda view: SimpleNamespace(judge=judges[1])
    )


def blurred(s: Sample) -> bool:
    return bool(s.images) and ", blur" in s.images[0].where


def third(s: Sample) -> bool:
    return sum(s.id.encode()) % 3 == 0


def test_what_the_small_model_alone_loses_is_found_and_named(samples: list[Sample]) -> None:
    made = bench(samples, lambda s: False, lambda s: blurred(s) and third(s))
    found = r.robustness(made, None, questions=40)  # type: ignore[arg-type]
    by_change = found["by_change"]
    assert {name for name, entry in by_change.items() if entry["clear"]} == {"blur"}
    share = np.mean([third(s) for s in samples[:40]])
    assert by_change["blur"]["difference"] == pytest.approx(share) and by_change["noise"]["difference"] == 0
    assert found["pictures"]["difference"] == pytest.approx(share / len(r.CORRUPTIONS))
    rows = [row for row in found["rows"] if row["change"] == "blur"]
    assert [row["strength"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row["loss"] == pytest.approx(share) and row["reference_loss"] == 0 and row["n"] == 40
        assert row["value"] == pytest.approx(1 - share) and row["ci95"][0] > 0
    assert any("Under blur it lost" in sentence for sentence in found["says"])
    assert json.loads(json.dumps(found)) == found


def test_answers_are_rated_as_the_data_asks(samples: list[Sample]) -> None:
    """By ANLS an answer without its last letter is nearly right, without its last five less so; exactly neither is."""
    long = [dataclasses.replace(s, answers=("a sentence that is long",)) for s in samples[:8]]
    made = bench(long, lambda s: False, blurred)
    made.judge.score = "anls"
    made.other.answers = lambda model, asked: [s.answers[0][: -5 if blurred(s) else -1] for s in asked]
    found = r.robustness(made, None, questions=8)  # type: ignore[arg-type]
    assert found["score"] == "anls" and found["clean"] == {"value": pytest.approx(22 / 23), "reference": 1.0}
    assert found["by_change"]["noise"]["difference"] == pytest.approx(0)
    assert found["by_change"]["blur"]["difference"] == pytest.approx(4 / 23)


def test_a_score_that_depends_on_the_other_questions_is_taken_over_the_same_ones(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CIDEr's do: the fewer questions are rated, the more an answer is worth."""
    monkeypatch.setattr(r, "rate", lambda name, said, accepted: [1 / len(said)] * len(said))
    found = r.robustness(bench(samples, lambda s: False, lambda s: False), None, questions=12)  # type: ignore[arg-type]
    turns = [row for row in found["rows"] if row["change"] == "more_turns"]
    assert turns and all(row["loss"] == row["reference_loss"] == row["difference"] == 0 for row in turns)


def test_what_both_lose_is_no_loss_of_the_small_model(samples: list[Sample], capsys: Any) -> None:
    found = r.robustness(bench(samples, blurred, blurred), None, questions=40)  # type: ignore[arg-type]
    assert found["by_change"]["blur"] == {"difference": 0.0, "ci95": [0.0, 0.0], "clear": False}
    assert all(row["reference_loss"] == row["loss"] == 1 for row in found["rows"] if row["change"] == "blur")
    assert found["says"] == ["Over all corruptions of the picture no difference in loss is shown: 0.0 points "
                             "(95 % interval +0.0 to +0.0)."]  # fmt: skip
    print_robustness(found)
    assert "100.0" in capsys.readouterr().out


def test_differences_equal_the_loop(samples: list[Sample]) -> None:
    draw = np.random.default_rng(0)
    some, stems = samples[:30], [0, 3, 4, 7, 8, 20]
    clean = (draw.random((2, 30)) < 0.9).astype(float)
    all_of = (draw.random((2, 30)) < 0.6).astype(float)
    few = (draw.random((2, 6)) < 0.5).astype(float)
    other = (draw.random((2, 10)) < 0.5).astype(float)
    answered = [
        (r.Change("noise", 1, some, list(range(30))), clean, all_of),
        (r.Change("more_turns", 1, [some[i] for i in stems], stems), clean[:, stems], few),
        (r.Change("shifted_data", None, samples[30:40], None), clean, other),
    ]
    rows = r.compared(some, clean, answered)["rows"]
    for row, right, before in zip(rows, (all_of, few, other), (clean, clean[:, stems], clean)):
        lost = [sum(before[k]) / len(before[k]) - sum(right[k]) / len(right[k]) for k in (0, 1)]
        assert [row["reference_loss"], row["loss"]] == pytest.approx(lost)
        assert row["difference"] == pytest.approx(lost[1] - lost[0])
        low, high = row["ci95"]
        assert low <= row["difference"] <= high


def test_both_are_shown_the_very_same_pictures_and_words(samples: list[Sample]) -> None:
    made = bench(samples, third, third)
    r.robustness(made, None, questions=6)  # type: ignore[arg-type]
    assert len(made.judge.asked) == len(made.other.asked) > 40
    for ours, theirs in zip(made.judge.asked, made.other.asked):
        for a, b in zip(ours, theirs):
            assert (a.question, a.messages) == (b.question, b.messages)
    worse = [s for asked in zip(made.judge.asked, made.other.asked) for s in (asked[0][0], asked[1][0])][:16]
    for a, b in zip(worse[::2], worse[1::2]):
        assert a.images[0].open().tobytes() == b.images[0].open().tobytes()


def test_longer_prompts_keep_the_question_last(samples: list[Sample]) -> None:
    sample = samples[0]
    longer = r._longer(sample, 2)
    assert longer.question == f"Please look at the picture. Take your time. {sample.question}"
    told = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where?"}]}]
    chat = r._longer(Sample("a", "p", sample.images, "where?", ("here",), {}, told), 1)
    assert chat.messages is not None and [part["type"] for part in chat.messages[0]["content"]] == [
        "image",
        "text",
        "text",
    ]
    assert chat.messages[0]["content"][-1]["text"] == "where?" and len(told[0]["content"]) == 2
    plain = r._longer(Sample("a", "p", (), "where?", ("here",), {}, [{"role": "user", "content": "where?"}]), 1)
    assert plain.messages == [{"role": "user", "content": "Please look at the picture. where?"}]


def test_turns_are_other_questions_about_the_same_picture_rightly_answered(samples: list[Sample]) -> None:
    every, left_out = r.changes(samples[:8], samples)
    turned = {change.strength: change for change in every if change.name == "more_turns"}
    assert set(turned) == {1, 2, 3} and set(left_out) == {"more_turns 4", "more_turns 5"}, "four questions a picture"
    for strength, change in turned.items():
        assert change.stems is not None
        for stem, made in zip(change.stems, change.samples):
            asked, messages = samples[stem], made.messages
            assert messages is not None and [m["role"] for m in messages] == ["user", "assistant"] * strength + ["user"]
            assert sum(part["type"] == "image" for m in messages for part in m["content"]) == 1
            assert messages[-1]["content"] == [{"type": "text", "text": asked.question}]
            pairs = {(o.question, o.answers[0]) for o in samples if o.image_id == asked.image_id and o is not asked}
            said = [m["content"][-1]["text"] for m in messages[:-1]]
            assert set(zip(said[::2], said[1::2])) <= pairs and made.answers == asked.answers


def test_a_prompt_that_does_not_fit_is_left_out_with_the_reason(samples: list[Sample]) -> None:
    made = bench(samples, third, third)
    talk = made.other.answers

    def answers(model: Any, asked: Sequence[Sample]) -> list[str]:
        if "Thank you." in (asked[0].question or ""):
            raise DataError("a prompt of 600 tokens does not fit the model's 512", where="sample x")
        return talk(model, asked)

    made.other.answers = answers
    found = r.robustness(made, None, questions=6)  # type: ignore[arg-type]
    assert found["left_out"]["longer_prompt 5"] == "a prompt of 600 tokens does not fit the model's 512"
    assert "longer_prompt 5" not in {f"{row['change']} {row['strength']}" for row in found["rows"]}


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(r, "CORRUPTIONS", {name: r.CORRUPTIONS[name] for name in ("occlusion",)})
    monkeypatch.setattr(analyses, "QUESTIONS", 8)
    for name in ("STRENGTHS", "SENTENCES", "TURNS"):
        monkeypatch.setattr(r, name, (1,))
    yield


def test_verify_asks_the_demo_model_itself(brief: None, tmp_path: Path) -> None:
    result = api.verify(MODEL, "demo", "demo", fit=2, check=8, batch_size=16, analyses=("robustness",))
    found = result["analysis"]["robustness"]
    assert [row["change"] for row in found["rows"]] == ["occlusion", "longer_prompt", "more_turns", "shifted_data"]
    assert all(row["difference"] == 0 and row["ci95"] == [0, 0] for row in found["rows"]), "it is compared with itself"
    assert found["n"] == 8 and found["rows"][3]["n"] == 8 and found["left_out"] == {}
    assert result["quality"]["bias"]["amplification"]["value"] == 0


def test_the_command_line_asks_for_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from svlm import cli

    asked: list[Any] = []

    def verify(*_: Any, analyses: Sequence[str], **__: Any) -> dict[str, Any]:
        asked.append(tuple(analyses))
        return {"passed": True}

    monkeypatch.setattr(api, "verify", verify)
    assert cli.main(["verify", "OUT", "--against", "demo", "--robustness", "--json"]) == 0
    assert cli.main(["verify", "OUT", "--against", "demo", "--json"]) == 0
    assert asked == [("robustness",), ()] and capsys.readouterr().out


def test_an_unknown_analysis_is_named() -> None:
    with pytest.raises(UsageError, match="no analysis 'robustnes'"):
        api.verify(MODEL, "demo", "demo", analyses=("robustnes",))
