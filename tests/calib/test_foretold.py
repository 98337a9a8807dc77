"""Answers that the forward has told already need no generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from svlm.calib import foretold
from svlm.calib.judge import Judge, Measurement
from svlm.compress.anatomy import ModelView
from tests.judged import BATCH


def nearly(measured: Measurement) -> list[Any]:
    """The items, with confidences as a forward without a cache has them."""
    return [item | {"confidence": pytest.approx(item["confidence"], rel=1e-4)} for item in measured.items]


def test_answers_that_the_forward_told_are_those_of_generate(
    judge: Judge, worse: ModelView, measured: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = measured.quality["generated"]
    assert BATCH <= count < 40, "one batch shows that generate agrees, and wrong answers are generated"
    monkeypatch.setattr(foretold.Foretold, "says", lambda *_: False)
    slow = judge.measure(worse)
    assert slow.quality["generated"] == 40
    assert slow.items == nearly(measured)
    rounded = {key: slow.quality[key] for key in ("generated", "calibration")}  # with a cache the last bits differ
    assert slow.quality == measured.quality | rounded
    assert slow.quality["calibration"]["ece"] == pytest.approx(measured.quality["calibration"]["ece"], abs=1e-4)


def test_where_generate_does_not_agree_every_answer_is_generated(
    judge: Judge, worse: ModelView, measured: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foretold.Foretold, "says", lambda *_: True)
    wrong = judge.measure(worse)
    assert wrong.quality["generated"] == 40 and wrong.items == nearly(measured)


def test_what_counts_as_told(original: ModelView) -> None:
    told = foretold.Foretold(original, 3, lambda rows: ["?" for _ in rows])
    (end, *_) = told.ends
    size = original.model.config.get_text_config().vocab_size
    other = next(i for i in range(size) if i not in told.ends)

    def says(*ids: int, gap: float = 1.0) -> bool:
        rows = torch.zeros(len(ids), size)
        rows[torch.arange(len(ids)), list(ids)] = gap
        return told.says(rows.log_softmax(-1), torch.tensor(ids))

    assert says(other, end) and says(end)
    assert not says(other, end, gap=0.05), "too close"
    assert not says(other) and not says(other, end, end) and not says(other, other, other, end)
    assert not told.says(torch.eye(size)[[other, other]], torch.tensor([other, end])), "says another token"
    settings = original.model.generation_config
    before = settings.repetition_penalty
    try:
        settings.repetition_penalty = 1.2
        assert not foretold.Foretold(original, 3, told.decode).ends
    finally:
        settings.repetition_penalty = before
