"""The passes: what they require, record and promise."""

from __future__ import annotations

import pytest
import torch

from svlm.compress.anatomy import view_of
from svlm.compress.base import Context
from svlm.compress.errors import PromiseBroken, RecipeError, Unmet
from svlm.compress.runtime.reduce import installed, remove
from svlm.passes.tokens.apet import ApET
from svlm.passes.tokens.divprune import DivPrune
from svlm.passes.tokens.dpp import DPP
from svlm.passes.tokens.grid import Grid
from svlm.passes.tokens.pool import Pool
from svlm.passes.tokens.random import Random
from svlm.passes.tokens.visionzip import VisionZip
from tests import zoo

from .helpers import ELSEWHERE, IN_SEQUENCE, generate, logits, prompts, reduced, single

KINDS = (DPP, Random, Grid, Pool, DivPrune, VisionZip, ApET)


def context(*batches):
    def none(*_, **__):
        raise AssertionError("no walk and no teacher needed")

    return Context(batches, none, none)


def test_families_are_all_spoken_for():
    assert set(IN_SEQUENCE) | set(ELSEWHERE) == set(zoo.FAMILIES)


@pytest.mark.parametrize("family", ELSEWHERE)
def test_refused_by_name(family):
    view = view_of(zoo.model(family))
    with pytest.raises(Unmet) as caught:
        DPP().requires(view, context(zoo.batch(family)))
    assert family.split("-t5")[0] in str(caught.value).lower() or view.family.name in str(caught.value)
    assert installed(view.model) is None


@pytest.mark.parametrize("kind", KINDS)
def test_apply_records_what_rebuild_needs(kind):
    model, batch = zoo.model("llava"), prompts("llava")
    view = view_of(model)
    step = kind(keep=0.25)
    step.requires(view, context(batch))
    notes = step.apply(view, context(batch))
    assert notes.record == {"keep": 0.25, "kept_per_image": 4}
    assert notes.numbers == {"tokens_per_image": [16], "kept_per_image": [4], "text_agnostic": True}
    view.ledger.add(step, notes.record)
    step.ensures(view)
    fresh = view_of(zoo.model("llava"))
    step.rebuild(fresh, notes.record)
    assert logits(fresh.model, batch).equal(logits(view.model, batch))
    with pytest.raises(Unmet, match="reduced already"):
        kind(keep=0.5).requires(view, context(batch))


@pytest.mark.parametrize("family", IN_SEQUENCE)
@pytest.mark.parametrize("kind", [Pool, DivPrune, ApET])
def test_batches_and_caches(kind, family):
    """A batch of three prompts: with a cache as without, and each row as alone."""
    view, batch = reduced(zoo.model(family), kind(keep=0.5)), prompts(family)
    answers = generate(view.model, batch)
    assert torch.equal(answers, generate(view.model, batch, use_cache=False))
    assert torch.equal(generate(view.model, single(batch, 2))[0], answers[2])


def test_text_agnostic_is_told():
    model, batch = zoo.model("llava"), prompts("llava")
    told = {
        kind.name: kind().apply(view_of(zoo.model("llava")), context(batch)).numbers["text_agnostic"] for kind in KINDS
    }
    assert set(told.values()) == {True}
    asked = DPP(relevance="prompt").apply(view_of(model), context(batch))
    assert asked.numbers["text_agnostic"] is False


def test_counts_that_differ_are_recorded_as_such():
    batch = prompts("llava")
    short = {**batch, "input_ids": batch["input_ids"].clone()}
    short["input_ids"][0, 2:8] = 5
    notes = Grid(keep=0.5).apply(view_of(zoo.model("llava")), context(batch, short))
    assert notes.record["kept_per_image"] is None
    assert notes.numbers["tokens_per_image"] == [10, 16]


def test_promise():
    view = reduced(zoo.model("llava"), DPP(keep=0.5))
    DPP(keep=0.5).ensures(view)
    with pytest.raises(PromiseBroken, match="another one"):
        DPP(keep=0.25).ensures(view)
    decoder = view.decoder
    hooks = dict(decoder._forward_pre_hooks)
    decoder._forward_pre_hooks.clear()
    with pytest.raises(PromiseBroken, match="hooks on the model are gone"):
        DPP(keep=0.5).ensures(view)
    decoder._forward_pre_hooks.update(hooks)
    DPP(keep=0.5).ensures(view)
    remove(view.model)
    with pytest.raises(PromiseBroken, match="no reduction"):
        DPP(keep=0.5).ensures(view)


@pytest.mark.parametrize("kind", KINDS)
def test_ladder_and_settings(kind):
    step, rungs = kind(keep=0.1), []
    while step is not None:
        rungs.append(step.keep)
        step = step.weaker()
    assert rungs == [0.1, 0.125, 0.25, 0.5, 0.75]
    for keep in (0.0, -0.5, 1.5):
        with pytest.raises(RecipeError, match="keep"):
            kind.from_settings({"keep": keep})
    assert kind.from_settings(kind(keep=0.3).settings()) == kind(keep=0.3)


@pytest.mark.parametrize("family", ["llava", "qwen3-vl", "gemma3"])
def test_saved_loaded_rebuilt(family, tmp_path):
    """The reduction adds nothing to the checkpoint; `rebuild` on the loaded model gives the same answers."""
    view = reduced(zoo.model(family), DPP(keep=0.5))
    batch = prompts(family)
    view.model.save_pretrained(tmp_path)
    loaded = view_of(type(view.model).from_pretrained(tmp_path, dtype="float32").eval())
    assert loaded.model.state_dict().keys() == view.model.state_dict().keys()
    assert installed(loaded.model) is None
    DPP(keep=0.5).rebuild(loaded, {"keep": 0.5, "kept_per_image": None})
    assert torch.equal(logits(loaded.model, batch), logits(view.model, batch))
    assert torch.equal(generate(loaded.model, batch), generate(view.model, batch))
