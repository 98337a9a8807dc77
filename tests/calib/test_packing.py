"""Several questions of one picture in one sequence: the same logits and gradients as one by one, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from svlm.calib import packing
from svlm.calib.packing import alike, packed, sees
from svlm.calib.shown import Shown
from svlm.compress.anatomy import ModelView, view_of
from svlm.passes.distill._observe import answer_logits
from svlm.passes.distill.logits import Logits
from svlm.passes.tokens.dpp import DPP
from svlm.passes.tokens.grid import Grid
from tests import zoo
from tests.passes.distill.test_logits import context, distilled, pair

PACKS = ("llava", "llava-next", "llava-onevision", "idefics3", "smolvlm", "internvl")
TWO_WAY = ("paligemma",)  # the prompt is attended to in both directions


def asked(family: str) -> dict[str, Tensor]:
    """Five questions, about two pictures: 0, 1, 2 about the first, 3 and 4 about the second."""
    batch, shows = zoo.batch(family, 5), (0, 0, 0, 3, 3)
    for k, v in batch.items():
        if len(v) == 5 and k not in ("input_ids", "attention_mask", "labels"):
            batch[k] = v[list(shows)]
    for i, first in enumerate(shows):  # what stands before the picture is the same, wherever it begins
        start, other = (int(batch["attention_mask"][n].argmax()) for n in (i, first))
        batch["input_ids"][i, start : start + 2] = batch["input_ids"][first, other : other + 2]
    return batch


def agrees(view: ModelView, batch: Mapping[str, Tensor]) -> bool:
    """Whether packed questions are answered as single ones."""
    return alike(lambda: answer_logits(view, batch), lambda: answer_logits(view, packed(view, batch)))


@pytest.mark.parametrize("family", PACKS)
def test_packed_questions_have_the_logits_and_the_gradients_of_single_ones(family: str) -> None:
    view, batch = view_of(zoo.model(family)), asked(family)
    tight = packed(view, batch)
    assert len(tight["input_ids"]) == 2 and len(tight["pixel_values"]) == 2
    assert int((tight["labels"] != -100).sum()) == int((batch["labels"] != -100).sum())
    found = []
    for given in (batch, tight):
        logits = answer_logits(view, given)
        logits.logsumexp(-1).sum().backward()
        trained = {k: p for k, p in view.model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), {k: p.grad.clone() for k, p in trained.items()}))
        view.model.zero_grad()
    (one, gradients), (other, packed_gradients) = found
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == packed_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-3, atol=1e-3, msg=name)
    assert agrees(view, batch)


@pytest.mark.parametrize("family", PACKS)
def test_with_fewer_visual_tokens_too(family: str) -> None:
    view, batch = view_of(zoo.model(family)), asked(family)
    Grid(keep=0.5).rebuild(view, {})
    with torch.no_grad():
        torch.testing.assert_close(
            answer_logits(view, packed(view, batch)), answer_logits(view, batch), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", TWO_WAY)
def test_a_model_that_answers_packed_questions_differently_is_found_out(family: str) -> None:
    view, batch = view_of(zoo.model(family)), asked(family)
    batch["token_type_ids"] = (batch["input_ids"] == zoo.IMAGE).long()
    assert packed(view, batch) is not batch and not agrees(view, batch)


def test_a_choice_of_tokens_by_the_prompt_is_found_out() -> None:
    view, batch = view_of(zoo.model("llava")), asked("llava")
    DPP(keep=0.25, relevance="prompt").rebuild(view, {})
    assert not agrees(view, batch)


@pytest.mark.parametrize("family", ["gemma3", "qwen2-vl", "blip-2-t5", "florence-2"])
def test_what_cannot_be_packed_is_left_as_it_is(family: str) -> None:
    batch = asked(family)
    assert packed(view_of(zoo.model(family)), batch) is batch


@pytest.mark.parametrize("told", [{"layer_types": ["full_attention", "sliding_attention"]}, {"sliding_window": 8}])
def test_a_decoder_with_a_window_is_never_packed(told: dict[str, Any]) -> None:
    """Its mask would be the packed one, without the window: a long question would see more than it may."""
    view, batch = view_of(zoo.model("llava")), asked("llava")
    assert packed(view, batch) is not batch
    for key, value in told.items():
        setattr(view.decoder.config, key, value)
    assert packed(view, batch) is batch


def test_a_row_is_no_longer_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    view, batch = view_of(zoo.model("llava")), asked("llava")
    assert len(packed(view, batch)["input_ids"]) == 2
    two = int(batch["attention_mask"][:2].sum()) - 18  # the beginning of two tokens and 16 of the picture once
    monkeypatch.setattr(packing, "MOST", two)
    tight = packed(view, batch)
    assert 2 < len(tight["input_ids"]) < 5 and tight["input_ids"].shape[1] <= two
    assert int((tight["labels"] != -100).sum()) == int((batch["labels"] != -100).sum())
    assert agrees(view, batch)
    monkeypatch.setattr(packing, "MOST", 1)
    assert packed(view, batch) is batch


def test_different_pictures_are_never_packed() -> None:
    view, batch = view_of(zoo.model("llava")), zoo.batch("llava", 4)
    batch["input_ids"][:, :6] = batch["input_ids"][0, :6]
    assert packed(view, batch) is batch


def test_what_the_original_is_shown_is_packed_alike_or_not_at_all() -> None:
    view, batch = view_of(zoo.model("llava")), asked("llava")
    tight = packed(view, Shown(batch, batch))
    assert isinstance(tight, Shown) and tight.original.keys() == tight.keys()
    assert all(torch.equal(tight[k], tight.original[k]) and len(tight[k]) == 2 for k in tight)
    other = Shown(batch, zoo.batch("llava", 5))  # as if only the small pictures were the same
    assert packed(view, other) is other


def test_padding_is_told_from_tokens() -> None:
    view, batch = view_of(zoo.model("llava")), asked("llava")
    tight, masks = packed(view, batch), view.token_masks(packed(view, batch))
    real = sum(int(t.sum()) for t in (masks.vision, masks.text))
    assert int(masks.padding.sum()) + real == tight["input_ids"].numel()
    one = view.token_masks(batch)
    assert int(masks.answer.sum()) == int(one.answer.sum()) and int(masks.vision.sum()) == 2 * 16
    shared = 2 + 16
    assert real == int((~one.padding).sum()) - 3 * shared  # three of five prompts need not repeat the beginning


def test_who_sees_whom() -> None:
    seen = sees(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("recovery", [False, True])
def test_training_says_whether_it_packs_and_learns_the_same(recovery: bool, monkeypatch: Any) -> None:
    batch: Mapping[str, Tensor] = asked("llava")
    stream = (lambda size, start: iter([batch] * 3)) if recovery else None
    step, ends = Logits(steps=3, lr=1e-3, batch_size=5), {}
    for packs in (True, False):
        student, teacher = pair()
        if not packs:
            monkeypatch.setattr("svlm.calib.packing.packed", lambda view, given: given)
        numbers = distilled(step, student, context(teacher, [batch], stream)).numbers
        assert str(numbers["packed"]).startswith("yes" if packs else "no")
        ends[packs] = torch.tensor(list(numbers["course"].values()))
    torch.testing.assert_close(ends[True], ends[False], rtol=2e-3, atol=1e-5)
