"""The mechanism, on every family whose visual tokens lie in the decoder's sequence, against a naive oracle."""

from __future__ import annotations

import copy

import pytest
import torch

from svlm.compress.errors import UsageError
from svlm.compress.runtime.layered import images_of, installed
from svlm.compress.runtime.seen import seen
from svlm.passes.fuse.freeze_vision import FreezeVision
from svlm.passes.quantize.kv_cache import KVCache
from svlm.passes.tokens.dpp import DPP
from svlm.passes.tokens.fastv import FastV
from svlm.passes.tokens.grid import Grid
from tests import zoo
from tests.passes.tokens.helpers import (
    IN_SEQUENCE,
    generate,
    logits,
    moved_together,
    prompts,
    single,
    two_images,
    typed,
)

from .helpers import CASES, NOTHING, cache_lengths, cache_of, put, text, treated, wanted

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=IN_SEQUENCE)
def family(request):
    return request.param, zoo.model(request.param), prompts(request.param)


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_oracle_says(family, case):
    """A batch with padding; generation with a cache, without, and row by row."""
    _name, model, batch = family
    step, rules = CASES[case]
    view = treated(model, step)
    step.ensures(view)
    found = logits(view.model, batch)
    expected, _ = wanted(model, batch, rules)
    torch.testing.assert_close(found[text(batch)], expected[text(batch)], **CLOSE)
    assert not torch.allclose(found[text(batch)], logits(model, batch)[text(batch)], **CLOSE)
    answers = generate(view.model, batch, 3)
    assert torch.equal(answers, generate(view.model, batch, 3, use_cache=False))
    alone = single(batch, 1)
    torch.testing.assert_close(
        logits(view.model, alone)[text(alone)], found[1:2, -alone["input_ids"].shape[1] :][text(alone)], **CLOSE
    )
    assert torch.equal(generate(view.model, alone, 3)[0], answers[1])


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_done_is_bit_identical(family, case):
    _, model, batch = family
    view = treated(model, NOTHING[case])
    assert torch.equal(logits(view.model, batch), logits(model, batch))
    if case == "pyramid":
        assert torch.equal(generate(view.model, batch), generate(model, batch))


SOME = [("llava", case) for case in CASES]
SOME += [("qwen3-vl", "fastv"), ("qwen3-vl", "bypass"), ("paligemma", "freeze"), ("paligemma", "pyramid")]


@pytest.mark.parametrize(("name", "case"), SOME)
def test_rows_with_different_numbers_of_images(name, case):
    model, batch = zoo.model(name), typed(name, two_images(5, name))
    step, rules = CASES[case]
    view = treated(model, step)
    together = logits(view.model, batch)
    expected, left = wanted(model, batch, rules)
    torch.testing.assert_close(together[text(batch)], expected[text(batch)], **CLOSE)
    answers = generate(view.model, batch)
    assert torch.equal(answers, generate(view.model, batch, use_cache=False))
    if "keep" in rules:
        logits(view.model, batch)
        kept = seen(view.model)
        assert torch.equal(kept.through, left), "the tokens that the oracle keeps, image by image"
    for row in range(2):
        mine = slice(0, 2) if row == 0 else slice(2, 3)
        alone = {k: v[row : row + 1] for k, v in batch.items()}
        for images in {"pixel_values", "image_grid_thw"} & set(batch):
            alone[images] = torch.cat(batch[images].chunk(3)[mine])
        torch.testing.assert_close(
            logits(view.model, alone)[text(alone)], together[row : row + 1][text(alone)], **CLOSE
        )
        assert torch.equal(generate(view.model, alone)[0], answers[row])


def test_the_cache_holds_what_each_block_holds():
    batch = prompts("llava", 1)
    length = batch["input_ids"].shape[1]
    expected = {
        "freeze": [length] * 3,
        "fastv": [length, length - 8, length - 8],
        "pyramid": [length, length - 8, length - 12],
        "bypass": [length - 16, length, length - 16],
    }
    for case, lengths in expected.items():
        cache = cache_of(treated(zoo.model("llava"), CASES[case][0]), batch)
        assert cache_lengths(cache) == lengths and cache.get_seq_length() == length


@pytest.mark.parametrize(("name", "case"), [("llava", "bypass"), *(("gemma3", case) for case in CASES)])
def test_eager_attention_and_beams(name, case):
    model, batch = zoo.model(name), prompts(name)
    view = treated(model, CASES[case][0])
    beams = generate(view.model, batch, 3, num_beams=3)
    assert torch.equal(beams, generate(view.model, batch, 3, num_beams=3, use_cache=False))
    found = logits(view.model, batch)
    view.model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(view.model, batch)[text(batch)], found[text(batch)], **CLOSE)


@pytest.mark.parametrize(("name", "case"), [("llava", "fastv"), *(("gemma3", case) for case in CASES)])
def test_second_turn_continues_the_cache(name, case):
    """What a second turn adds to a cache is what one forward over everything computes, with the choice of the first."""
    model, batch = zoo.model(name), prompts(name)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])  # so that positions are the same in either way
    view = treated(model, CASES[case][0])
    first = view.model.generate(
        **batch, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
        suppress_tokens=[0, zoo.IMAGE, zoo.VIDEO],
    )  # fmt: skip
    ids = torch.cat([first.sequences, torch.full((3, 2), 7)], dim=1)
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(3, 6)], dim=1)
    more = batch | {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in batch:
        more["token_type_ids"] = torch.cat([batch["token_type_ids"], batch["token_type_ids"].new_zeros(3, 6)], dim=1)
    later = {k: v for k, v in more.items() if k != "pixel_values"}
    labels = torch.full_like(ids, -100)
    labels[:, batch["input_ids"].shape[1] :] = 7  # the prompt of the first turn ends there
    whole = logits(view.model, more | {"labels": labels})[:, -1]
    cache = first.past_key_values
    with torch.no_grad():
        told = {k: v[:, -3:] if k in ("input_ids", "token_type_ids") else v for k, v in later.items()}
        found = view.model(**told, past_key_values=copy.deepcopy(cache)).logits[:, -1]
    torch.testing.assert_close(found, whole, **CLOSE)
    answers = generate(view.model, later, past_key_values=cache)
    assert torch.equal(answers[:, 0], whole.index_fill(1, torch.tensor([0, zoo.IMAGE, zoo.VIDEO]), -1e9).argmax(1))


def test_an_image_in_the_second_turn():
    """Frozen and bypassing images do not depend on turns."""
    model = zoo.model("llava")
    both = two_images()
    batch = {k: v[:1] for k, v in both.items()} | {"pixel_values": both["pixel_values"][:2]}
    for case in ("freeze", "bypass"):
        view = treated(model, CASES[case][0])
        whole = logits(view.model, batch)
        with torch.no_grad():
            head = {"input_ids": batch["input_ids"][:, :19], "pixel_values": batch["pixel_values"][:1]}
            cache = view.model(**head, use_cache=True).past_key_values
            tail = {"input_ids": batch["input_ids"][:, 19:], "pixel_values": batch["pixel_values"][1:]}
            tail["attention_mask"] = torch.ones(1, batch["input_ids"].shape[1], dtype=torch.long)
            found = view.model(**tail, past_key_values=cache).logits
        here = text(batch)[:, 19:]
        torch.testing.assert_close(found[here], whole[:, 19:][here], **CLOSE)


def test_the_answer_is_not_looked_at():
    """The same tokens stay, whether the prompt comes alone, or with labels and any answer."""
    batch = zoo.batch("llava", 3)
    prompt = {k: v[:, :-3] if v.ndim == 2 else v for k, v in batch.items() if k != "labels"}
    for case in ("fastv", "pyramid"):
        view = treated(zoo.model("llava"), CASES[case][0])
        alone = logits(view.model, prompt)[:, -1]
        chosen = seen(view.model).through
        for answer in (5, 11):
            other = batch | {"input_ids": batch["input_ids"].clone()}
            other["input_ids"][:, -3:] = answer
            torch.testing.assert_close(logits(view.model, other)[:, -4], alone, **CLOSE)
            assert torch.equal(seen(view.model).through[:, :-3], chosen)


def test_two_mechanisms_together():
    """Fewer tokens before the decoder, and other treatment of those that are left inside it."""
    model, batch = zoo.model("qwen3-vl"), prompts("qwen3-vl")
    for before, step in ((Grid(keep=0.5), FreezeVision(blocks=(0, 2))), (DPP(keep=0.75), FastV(keep=0.34, block=1))):
        for steps in ((before, step), (step, before)):
            view = treated(model)
            for one in steps:
                one.rebuild(view, {}) if isinstance(one, (Grid, DPP)) else put(view, one)
            answers = generate(view.model, batch)
            assert torch.equal(answers, generate(view.model, batch, use_cache=False))
            assert torch.equal(generate(view.model, single(batch, 2))[0], answers[2])
            shorter = [2, 2, 2] if isinstance(step, FreezeVision) else [3, 1, 1]
            assert view.visual_tokens(batch) == [sum(shorter) / 3] * 3
            lengths = cache_lengths(cache_of(view, single(batch, 0)))
            assert lengths == [n + batch["input_ids"].shape[1] - 4 for n in shorter]


def test_frozen_and_dropped_together():
    model, batch = zoo.model("llava"), prompts("llava")
    view = treated(model, FreezeVision(blocks=(2,)), FastV(keep=0.5, block=1))
    expected, _ = wanted(model, batch, {"frozen": (2,), "ranks": (0,), "keep": {1: 0.5}})
    torch.testing.assert_close(logits(view.model, batch)[text(batch)], expected[text(batch)], **CLOSE)
    assert torch.equal(generate(view.model, batch), generate(view.model, batch, use_cache=False))


def test_rows_of_the_cache_move_together():
    view, batch = treated(zoo.model("llava"), CASES["bypass"][0]), two_images()
    batch["attention_mask"][1, :2] = 0
    with torch.no_grad():
        cache = cache_of(view, batch)
        moved_together(view, batch, cache, CLOSE)
        with pytest.raises(UsageError, match="into its images"):
            cache.crop(-30)
        cache.reset()
        assert cache.get_seq_length() == 0 and not any("Held" in type(layer).__name__ for layer in cache.layers)


def test_with_a_packed_cache():
    """Tokens that are held go into a cache of few bits as all others do; where none is old enough, nothing changes."""
    view, batch = treated(zoo.model("llava"), CASES["fastv"][0]), prompts("llava")
    exact = generate(view.model, batch)
    KVCache(bits=8, group=4, residual=64).rebuild(view, {})
    assert torch.equal(generate(view.model, batch), exact)
    packed = treated(zoo.model("llava"), CASES["fastv"][0])
    KVCache(bits=8, group=4, residual=4).rebuild(packed, {})
    assert generate(packed.model, batch).shape == exact.shape


def test_gradients_flow():
    """Into the connector and all projections that work on visual tokens: the bypass is trained afterwards."""
    view, batch = treated(zoo.model("llava"), CASES["bypass"][0]), zoo.batch("llava")
    view.model(**batch).loss.backward()
    for ref in view.linears(["connector", "language"]):
        assert ref.module.weight.grad is not None and bool(ref.module.weight.grad.any()), ref.path


def test_what_cannot_be_told_apart_is_refused():
    view = treated(zoo.model("llava"), CASES["freeze"][0])
    with pytest.raises(UsageError, match="input_ids"):
        view.model(inputs_embeds=torch.zeros(1, 5, 32))
    assert installed(view.model).run is None or not installed(view.model).run.images


def test_images_are_runs_by_length():
    visual = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 1]]).bool()
    found = {places.shape[1]: places.tolist() for places in images_of(visual)}
    assert found == {1: [[13]], 2: [[1, 2], [7, 8]], 3: [[4, 5, 6]]}
