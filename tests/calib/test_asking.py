"""Asking with less work: questions about one picture in one forward, batches made once, the original asked once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import svlm
from svlm.calib import asking, encode
from svlm.calib import judge as judging
from svlm.calib.dataset import CalibrationSet
from svlm.calib.encode import Encoder, Kept
from svlm.calib.judge import Judge
from svlm.calib.packing import packed
from svlm.calib.sample import Sample
from svlm.compress.anatomy import ModelView
from svlm.compress.base import evaluating
from svlm.passes.tokens.dpp import DPP


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return CalibrationSet.load("demo", fit=4, check=24, seed=0).check


@pytest.fixture(scope="module")
def original() -> ModelView:
    return svlm.load_view("demo")


@pytest.fixture(scope="module")
def judge(original: ModelView, samples: list[Sample]) -> Judge:
    return Judge(samples, Encoder(original.processor), original, batch_size=16)


@pytest.fixture(scope="module")
def worse() -> ModelView:
    view = svlm.load_view("demo")
    with torch.no_grad():
        for ref in view.linears("language"):
            ref.module.weight.add_(0.02 * torch.randn_like(ref.module.weight))
    return view


def test_packed_questions_are_measured_as_single_ones(
    judge: Judge, original: ModelView, worse: ModelView, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: list[int] = []
    note = worse.tower.register_forward_pre_hook(
        lambda _, args, given: pictures.append(len(args[0] if args else given["pixel_values"])), with_kwargs=True
    )
    tight, shown = judge.measure(worse), sum(pictures)
    monkeypatch.setattr(judging, "layout", lambda *_: asking.singly)
    pictures.clear()
    loose = judge.measure(worse)
    note.remove()
    assert shown < 0.8 * sum(pictures), "the tower sees a picture once for all of its questions"
    assert [item["answer"] for item in tight.items] == [item["answer"] for item in loose.items]
    for key in ("kl", "perplexity", "agreement"):
        assert tight.quality[key] == pytest.approx(loose.quality[key], rel=1e-4)
    for one, other in zip(tight.items, loose.items):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-6) and one["tokens"] == other["tokens"]


def test_who_answers_packed_questions_differently_is_asked_one_by_one(judge: Judge, samples: list[Sample]) -> None:
    view = svlm.load_view("demo")
    order = [samples[i] for i in judge._order]
    with evaluating(view.model):
        assert asking.layout(view, judge.encoder.encode, order, 16) is packed
        apart = [s for i, s in enumerate(order) if s.image_id not in {o.image_id for o in order[:i]}]
        assert asking.layout(view, judge.encoder.encode, apart, 16) is asking.singly, "no two about one picture"
        DPP(keep=0.25, relevance="prompt").rebuild(view, {})
        assert asking.layout(view, judge.encoder.encode, order, 16) is asking.singly


def test_nothing_is_packed_that_was_not_packed_for_a_trial(
    judge: Judge, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    view, encoded = svlm.load_view("demo"), judge.encoder.encode
    order = [samples[i] for i in judge._order]
    with evaluating(view.model):
        assert asking.layout(view, encoded, order, 1) is asking.singly, "a batch of one has nothing to pack"
        with monkeypatch.context() as patch:
            patch.setattr(asking, "LOGIT_BYTES", 1)  # every question of the trial in a forward of its own
            assert asking.layout(view, encoded, order, 16) is asking.singly
        forward = view.model.forward

        def flat(**batch: Any) -> Any:
            assert batch["attention_mask"].dim() == 2
            return forward(**batch)

        monkeypatch.setattr(view.model, "forward", flat)
        assert asking.layout(view, encoded, order, 16) is asking.singly, "whatever its code raises"


def test_what_was_kept_of_the_original_is_used_only_if_it_is_whole(
    original: ModelView, samples: list[Sample], tmp_path: Path
) -> None:
    def asked() -> Judge:
        return Judge(samples, Encoder(original.processor), original, tmp_path, batch_size=16)

    whole = asked().reference()
    texts, tensors = (next(tmp_path.glob(f"*.{kind}")) for kind in ("json", "safetensors"))
    assert asked()._read() is not None
    for damaged in ("null", "[1]", '["a"]', json.dumps(whole.answers[:-1]), "{"):
        texts.write_text(damaged)
        assert asked()._read() is None, damaged
    texts.write_text(json.dumps(whole.answers))
    kept = load_file(tensors)
    for key in ("blind", "chosen", "counts", "confidence"):
        save_file(kept | {key: kept[key][:-1].clone()}, tensors)
        assert asked()._read() is None, key
    assert torch.equal(asked().reference().values, whole.values)


def test_questions_about_one_picture_stand_together(samples: list[Sample]) -> None:
    order = asking.by_picture(samples)
    assert sorted(order) == list(range(len(samples)))
    names = [samples[i].image_id for i in order]
    assert len(set(names)) == 1 + sum(a != b for a, b in pairwise(names))


def test_the_original_is_not_asked_again_to_be_compared_with_itself(
    judge: Judge, original: ModelView, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge.reference()
    asked: list[Any] = []
    note = original.model.register_forward_pre_hook(lambda *_: asked.append(1))
    known = judge.baseline()
    note.remove()
    assert not asked
    again = judge.measure(svlm.load_view("demo"))
    assert known.items == again.items
    assert known.quality | {"generated": 0} == again.quality | {"generated": 0}


def test_batches_are_made_once_as_far_as_they_fit(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Sequence[Sample]] = []

    def encoded(some: Sequence[Sample]) -> dict[str, torch.Tensor]:
        made.append(some)
        return {"input_ids": torch.zeros(len(some), 10)}

    monkeypatch.setattr(encode, "KEPT_BYTES", 200)
    kept = Kept(encoded)
    for _ in range(2):
        for some in (samples[:4], samples[4:8]):  # 160 bytes each
            assert len(kept(list(some))["input_ids"]) == 4
    assert [len(some) for some in made] == [4, 4, 4] and made[2] == samples[4:8]
    first = kept(samples[:4])
    first.clear()
    assert kept(samples[:4]), "who takes a batch apart has his own"
