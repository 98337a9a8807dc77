"""The mechanism, on every family whose visual tokens lie in the decoder's sequence."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
import transformers as tf

from svlm.compress.anatomy import view_of
from svlm.compress.errors import ModelError, UsageError
from svlm.compress.runtime.images import kept_count
from svlm.compress.runtime.reduce import Reduction, install, installed, remove
from svlm.passes.tokens.divprune import DivPrune
from svlm.passes.tokens.dpp import DPP
from svlm.passes.tokens.grid import Grid
from svlm.passes.tokens.random import Random
from tests import zoo

from .helpers import (
    IN_SEQUENCE,
    generate,
    kept_of,
    logits,
    masked_original,
    moved_together,
    prompts,
    reduced,
    single,
    two_images,
    typed,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=IN_SEQUENCE)
def family(request):
    return request.param, zoo.model(request.param), prompts(request.param)


@pytest.fixture(scope="module")
def llava():
    return zoo.model("llava")


def test_keeping_all_is_bit_identical(family):
    _, model, batch = family
    view = reduced(model, DPP(keep=1.0))
    assert torch.equal(logits(view.model, batch), logits(model, batch))
    assert torch.equal(generate(view.model, batch), generate(model, batch))


@pytest.mark.parametrize("kind", [DPP, Random, Grid, DivPrune])
def test_equals_the_original_with_the_others_masked(family, kind):
    _, model, batch = family
    view = reduced(model, kind(keep=0.5))
    found = logits(view.model, batch)
    kept = kept_of(view, batch)
    visual = batch["input_ids"] == zoo.IMAGE
    per_image = kept_count(int(visual[0].sum()), 0.5)
    assert (kept & visual).sum(1).tolist() == [per_image] * 3 and bool(kept[~visual].all())
    wanted = masked_original(model, batch, kept)
    seen = kept & batch["attention_mask"].bool()
    torch.testing.assert_close(found[seen], wanted[seen], **CLOSE)
    assert found.shape == wanted.shape and not torch.allclose(found[seen], logits(model, batch)[seen], **CLOSE)


def test_cached_generation_equals_full_prefill(family):
    _, model, batch = family
    view = reduced(model)
    assert torch.equal(generate(view.model, batch), generate(view.model, batch, use_cache=False))


def test_batch_equals_one_by_one(family):
    _, model, batch = family
    view = reduced(model)
    together, answers = logits(view.model, batch), generate(view.model, batch)
    for row in range(3):
        alone = single(batch, row)
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(logits(view.model, alone)[0], together[row, -length:], **CLOSE)
        assert torch.equal(generate(view.model, alone)[0], answers[row])


def test_shortened_by_hand(family):
    """The shorter sequence built by hand and given to the decoder, kept positions and all."""
    _name, model, batch = family
    view = reduced(model)
    alone = single(batch, 0)
    found = logits(view.model, alone)
    kept = kept_of(view, alone)[0]
    caught = {}

    def catch(module, args, kwargs):
        caught.update(kwargs)

    decoder = model.get_submodule(view.decoder_path)
    handle = decoder.register_forward_pre_hook(catch, with_kwargs=True)
    logits(model, alone)
    handle.remove()
    places = [i for i in range(len(kept)) if kept[i]]
    positions = caught.get("position_ids")
    positions = torch.arange(len(kept))[None] if positions is None else positions
    given = {"inputs_embeds": caught["inputs_embeds"][:, places], "position_ids": positions[..., places]}
    mask = caught["attention_mask"]
    if isinstance(mask, dict):
        given["attention_mask"] = {k: v if v is None else v[:, :, places][..., places] for k, v in mask.items()}
    elif mask is not None and mask.ndim == 4:
        given["attention_mask"] = mask[:, :, places][..., places]
    else:
        given["attention_mask"] = torch.ones(1, len(places), dtype=torch.long)
    if "visual_pos_masks" in caught:
        visual = caught["visual_pos_masks"][0]
        rows = [n for n, i in enumerate(visual.nonzero()[:, 0].tolist()) if kept[i]]
        given["visual_pos_masks"] = visual[None, places]
        given["deepstack_visual_embeds"] = [f[rows] for f in caught["deepstack_visual_embeds"]]
    with torch.no_grad():
        wanted = model.get_output_embeddings()(decoder(**given)[0])
    torch.testing.assert_close(found[0, places], wanted[0], **CLOSE)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2-vl"])
def test_eager_attention_and_beams(name):
    model = zoo.model(name)
    batch = prompts(name)
    sdpa = reduced(model)
    wanted = logits(sdpa.model, batch)
    view = reduced(model)
    view.model.set_attn_implementation("eager")
    real = batch["attention_mask"].bool() & kept_of(sdpa, batch)
    torch.testing.assert_close(logits(view.model, batch)[real], wanted[real], **CLOSE)
    beams = generate(sdpa.model, batch, num_beams=3)
    assert torch.equal(beams, generate(sdpa.model, batch, num_beams=3, use_cache=False))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen3-vl"])
def test_rows_with_different_numbers_of_images(name, masked):
    model = zoo.model(name)
    view = reduced(model, DPP(keep=0.25))
    batch = typed(name, two_images(5, name))
    if not masked:
        del batch["attention_mask"]
    together = logits(view.model, batch)
    kept = kept_of(view, batch)
    visual = batch["input_ids"] == zoo.IMAGE
    counts = [2 * kept_count(int(visual[1].sum()), 0.25), kept_count(int(visual[1].sum()), 0.25)]
    assert (kept & visual).sum(1).tolist() == counts
    assert installed(view.model).reduce_mask(visual).sum(1).tolist() == counts
    torch.testing.assert_close(together[kept], masked_original(model, batch, kept)[kept], **CLOSE)
    answers = generate(view.model, batch)
    assert torch.equal(answers, generate(view.model, batch, use_cache=False))
    for row in range(2):
        mine = slice(0, 2) if row == 0 else slice(2, 3)
        alone = {k: v[row : row + 1] for k, v in batch.items()}
        for images in {"pixel_values", "image_grid_thw"} & set(batch):
            alone[images] = torch.cat(batch[images].chunk(3)[mine])
        torch.testing.assert_close(logits(view.model, alone)[0], together[row], **CLOSE)
        assert torch.equal(generate(view.model, alone)[0], answers[row])


def test_attention_both_ways_stays_so():
    """PaliGemma without token types attends both ways wherever no mask is needed; filled-up rows need one."""
    model = zoo.model("paligemma")
    view = reduced(model, DPP(keep=0.25))
    batch = two_images()
    found = logits(view.model, batch)
    kept = kept_of(view, batch)
    torch.testing.assert_close(found[kept], masked_original(model, batch, kept)[kept], **CLOSE)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2-vl"])
def test_second_turn_continues_the_cache(name):
    """A cache from the first turn, then the whole conversation: only what is new is computed, and it is the same."""
    model = zoo.model(name)
    view = reduced(model)
    batch = prompts(name)
    first = view.model.generate(
        **batch, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
        suppress_tokens=[0, zoo.IMAGE, zoo.VIDEO],
    )  # fmt: skip
    cache = first.past_key_values
    asked = torch.full((3, 2), 7)
    ids = torch.cat([first.sequences, asked], dim=1)
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(3, 6)], dim=1)
    more = batch | {"input_ids": ids, "attention_mask": mask}
    for kind in ("mm_token_type_ids", "token_type_ids"):
        if kind in batch:
            more[kind] = torch.cat([batch[kind], batch[kind].new_zeros(3, 6)], dim=1)
    held = cache.get_mask_sizes(1, cache.is_sliding.index(False))[0] - 1
    assert cache.get_seq_length() == ids.shape[1] - 3 and held < cache.get_seq_length()
    later = {k: v for k, v in more.items() if k not in ("pixel_values", "image_grid_thw")}
    wanted = generate(view.model, more)
    for reused in (copy.deepcopy(cache), cache):
        assert torch.equal(generate(view.model, later, past_key_values=reused), wanted)


def test_cache_rows_move_together(llava):
    """Rows of a cache selected, repeated and cropped: the next token is that of the row it came from."""
    view = reduced(llava, Grid(keep=0.25))
    batch = two_images()
    batch["attention_mask"][1, :2] = 0
    with torch.no_grad():
        cache = view.model(**batch, use_cache=True).past_key_values
        moved_together(view, batch, cache, CLOSE)
        cache.reset()
        assert cache.get_seq_length() == 0 and type(cache) is tf.DynamicCache


def test_an_image_in_the_second_turn():
    model = zoo.model("llava")
    view = reduced(model, Grid(keep=0.25))
    batch = {k: v[:1] for k, v in two_images().items()} | {"pixel_values": two_images()["pixel_values"][:2]}
    whole = logits(view.model, batch)
    with torch.no_grad():
        head = {"input_ids": batch["input_ids"][:, :19], "pixel_values": batch["pixel_values"][:1]}
        cache = view.model(**head, use_cache=True).past_key_values
        tail = {"input_ids": batch["input_ids"][:, 19:], "pixel_values": batch["pixel_values"][1:]}
        rest = view.model(**tail, attention_mask=batch["attention_mask"], past_key_values=cache).logits
    assert cache.get_seq_length() == whole.shape[1]
    torch.testing.assert_close(rest, whole[:, 19:], **CLOSE)


@pytest.mark.parametrize("masked", [True, False])
def test_windows_count_original_distances(masked):
    """A decoder that makes its sliding masks itself (Mistral), window shorter than the sequence."""
    config = zoo.CONFIGS["llava"]()
    config.text_config = tf.MistralConfig(**zoo.TEXT, sliding_window=9)
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    view = reduced(model)
    batch = prompts("llava")
    found = logits(view.model, batch)
    kept = kept_of(view, batch)
    length = kept.shape[1]
    near = torch.ones(length, length).tril() - torch.ones(length, length).tril(-9)
    window = near.bool() & kept[:, None, :] & batch["attention_mask"].bool()[:, None, :]
    caught = {}
    decoder = model.get_submodule(view.decoder_path)
    handle = decoder.register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
    logits(model, batch)
    handle.remove()
    with torch.no_grad():
        hidden = decoder(inputs_embeds=caught["inputs_embeds"], attention_mask=window[:, None])[0]
        wanted = model.get_output_embeddings()(hidden)
    seen = kept & batch["attention_mask"].bool()
    torch.testing.assert_close(found[seen], wanted[seen], **CLOSE)
    if not masked:
        batch = single(batch, 0)
    assert torch.equal(generate(view.model, batch, 8), generate(view.model, batch, 8, use_cache=False))


def test_travels_with_copies_and_comes_off(llava):
    view = reduced(llava)
    batch = prompts("llava")
    wanted = logits(view.model, batch)
    twin = view_of(copy.deepcopy(view.model))
    assert torch.equal(logits(twin.model, batch), wanted)
    assert installed(twin.model) is not installed(view.model)
    assert installed(twin.model).attached_to(twin.model, twin.decoder_path)
    remove(view.model)
    assert installed(view.model) is None and torch.equal(logits(view.model, batch), logits(llava, batch))
    hooks = [h for m in view.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(isinstance(h, MethodType) and isinstance(h.__self__, Reduction) for h in hooks)
    assert torch.equal(logits(twin.model, batch), wanted), "the copy keeps its own"
    assert view.model.state_dict().keys() == twin.model.state_dict().keys() == llava.state_dict().keys()


def test_hidden_states_labels_and_gradients(llava):
    view = reduced(llava)
    batch = zoo.batch("llava", 3)
    out = view.model(**batch, output_hidden_states=True)
    kept = kept_of(view, batch)
    assert all(h.shape[:2] == kept.shape for h in out.hidden_states)
    assert bool((out.hidden_states[1][~kept] == 0).all()) and bool((out.hidden_states[1][kept] != 0).any())
    out.loss.backward()
    used = [p for n, p in view.model.named_parameters() if "language_model.layers" in n or "projector" in n]
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in used)


def test_relevance_looks_at_the_prompt_not_at_the_answer(llava):
    view = reduced(llava, DPP(keep=0.25, relevance="prompt"))
    batch = zoo.batch("llava", 3)
    logits(view.model, batch)
    kept = kept_of(view, batch)
    other = dict(batch)
    other["input_ids"] = torch.where(batch["labels"] == -100, batch["input_ids"], 11)
    logits(view.model, other)
    assert torch.equal(kept_of(view, other), kept), "another answer, the same tokens"
    asked = dict(batch)
    question = (batch["labels"] == -100) & (batch["input_ids"] != zoo.IMAGE) & batch["attention_mask"].bool()
    asked["input_ids"] = torch.where(question, 40, batch["input_ids"])
    logits(view.model, asked)
    assert not torch.equal(kept_of(view, asked), kept), "another question, other tokens"
    plain = reduced(llava, DPP(keep=0.25))
    logits(plain.model, batch)
    first = kept_of(plain, batch)
    logits(plain.model, asked)
    assert torch.equal(kept_of(plain, asked), first), "relevance none: the image alone decides"


def test_what_cannot_be_done_is_refused(llava):
    view = reduced(llava)
    batch = prompts("llava")
    with pytest.raises(ModelError, match="reduced already"):
        again = Reduction(Grid().choose, 0.5, zoo.IMAGE, {})
        install(view.model, view.decoder_path, again)
    with pytest.raises(UsageError, match="static cache"):
        generate(view.model, batch, cache_implementation="static")
    embeds = view.model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(UsageError, match="input_ids"):
        view.model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    with torch.no_grad():
        cache = view.model(**batch, use_cache=True).past_key_values
    with pytest.raises(UsageError, match="cropped into its images"):
        cache.crop(-12)


def test_text_alone_passes_untouched(llava):
    view = reduced(llava)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(view.model, {"input_ids": ids}), logits(llava, {"input_ids": ids}))
    assert torch.equal(generate(view.model, {"input_ids": ids}), generate(llava, {"input_ids": ids}))
