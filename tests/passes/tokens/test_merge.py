"""Merging and rewriting: what stays may become something else, differentiably, and Qwen3-VL's deep features with it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from svlm.compress.anatomy import view_of
from svlm.compress.runtime.images import Choice, runs
from svlm.compress.runtime.reduce import Reduction, install
from svlm.passes.tokens._select import grid_positions
from tests import zoo

from .helpers import IN_SEQUENCE, generate, kept_of, logits, prompts, shapes, single, two_images, typed

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def blend(images, k):
    """Tokens of an even grid, each mixed with the whole image by fixed weights that are not all alike."""
    g = torch.Generator().manual_seed(images.tokens)
    weights = torch.rand(k, images.tokens, generator=g)
    return Choice(images.same(grid_positions(images.shape, k)), weights.expand(len(images), -1, -1))


def carrying(model, **options):
    view = view_of(copy.deepcopy(model))
    options = {"choose": blend, "keep": 0.5, "per_image": view.per_image() or 0} | options
    install(view.model, view.decoder_path, Reduction(image_token_id=zoo.IMAGE, label={"pass": "test"}, **options))
    return SimpleNamespace(model=view.model, view=view, decoder=view.decoder)


def decoder_call(model, batch):
    """What the model gives its decoder."""
    caught = {}
    handle = view_of(model).decoder.register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
    logits(model, batch)
    handle.remove()
    return caught


@pytest.fixture(scope="module", params=IN_SEQUENCE)
def family(request):
    return request.param, zoo.model(request.param), prompts(request.param)


def test_merged_by_hand(family):
    """Each kept token's embedding, and each deep feature, is the mix; places, positions and masks are as chosen."""
    _, model, batch = family
    small = carrying(model)
    alone = single(batch, 0)
    full, short = decoder_call(model, alone), {}

    def catch(_module, _args, kwargs):
        short.update(kwargs)

    small.decoder.register_forward_pre_hook(catch, with_kwargs=True)  # after the reduction's own
    logits(small.model, alone)
    kept = kept_of(small.view, alone)[0]
    places = kept.nonzero().squeeze(1).tolist()
    visual = (alone["input_ids"][0] == zoo.IMAGE).tolist()
    mine = [i for i, is_visual in enumerate(visual) if is_visual]
    k = sum(visual[i] for i in places)
    weights = torch.rand(k, len(mine), generator=torch.Generator().manual_seed(len(mine)))

    def naive(values):
        return torch.stack([sum(weights[j, t] * values[t] for t in range(len(mine))) for j in range(k)])

    wanted = full["inputs_embeds"][0].clone()
    wanted[[i for i in places if visual[i]]] = naive(full["inputs_embeds"][0][mine])
    torch.testing.assert_close(short["inputs_embeds"][0], wanted[places], rtol=1e-5, atol=1e-5)
    if "deepstack_visual_embeds" in full:
        for deep, merged in zip(full["deepstack_visual_embeds"], short["deepstack_visual_embeds"], strict=True):
            torch.testing.assert_close(merged, naive(deep), rtol=1e-5, atol=1e-5)
        assert int(short["visual_pos_masks"].sum()) == k


def test_merged_generation_with_and_without_cache_and_one_by_one(family):
    _, model, batch = family
    small = carrying(model)
    together = generate(small.model, batch)
    assert torch.equal(together, generate(small.model, batch, use_cache=False))
    full = logits(small.model, batch)
    for row in range(3):
        alone = single(batch, row)
        torch.testing.assert_close(logits(small.model, alone)[0], full[row, -alone["input_ids"].shape[1] :], **CLOSE)
        assert torch.equal(generate(small.model, alone)[0], together[row])


@pytest.mark.parametrize("name", ["llava", "qwen3-vl"])
def test_gradients_reach_what_was_merged_away(name):
    small = carrying(zoo.model(name))
    batch = typed(name, zoo.batch(name, 2))
    reached = {}

    def watch(_module, _args, kwargs):
        for key in ("inputs_embeds", "deepstack_visual_embeds"):
            for i, value in enumerate([kwargs.get(key)] if key == "inputs_embeds" else kwargs.get(key) or ()):
                value.retain_grad()
                reached[f"{key}{i}"] = value

    small.decoder._forward_pre_hooks.clear()
    small.decoder.register_forward_pre_hook(watch, with_kwargs=True)  # before the reduction's own
    reduction = next(m for m in small.model.modules() if isinstance(m, Reduction))
    small.decoder.register_forward_pre_hook(reduction.shorten, with_kwargs=True)
    small.model(**batch).loss.backward()
    visual = batch["input_ids"] == zoo.IMAGE
    assert bool((reached["inputs_embeds0"].grad[visual].abs().sum(-1) > 0).all()), "of every visual token"
    deep = [value for key, value in reached.items() if key.startswith("deep")]
    assert len(deep) == (2 if name == "qwen3-vl" else 0)
    assert all(bool((value.grad.abs().sum(-1) > 0).all()) for value in deep)


class Gain(nn.Module):
    """A rewrite with a parameter: prompt tokens and kept tokens of images are scaled."""

    def __init__(self, value):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(value))
        self.seen = []

    def forward(self, embeds, call, chosen):
        self.seen.append((call.prompt.clone(), [one.kept.clone() for one in chosen]))
        touched = call.prompt.flatten().clone()
        for one in chosen:
            touched[one.kept.flatten()] = True
        return torch.where(touched.view(call.prompt.shape)[..., None], embeds * self.gain, embeds)


def test_rewriting_that_changes_nothing_is_bit_identical(family):
    _, model, batch = family
    small = carrying(model, keep=1.0, rewrite=Gain(1.0))
    assert torch.equal(logits(small.model, batch), logits(model, batch))
    assert torch.equal(generate(small.model, batch), generate(model, batch))
    assert len(small.view.decoder.visual_token_reduction.rewrite.seen) > 0


def test_a_rewrite_is_the_models_own_and_trains():
    batch = zoo.batch("llava", 2)
    small = carrying(zoo.model("llava"), count=3, rewrite=Gain(2.0))
    name = next(key for key in small.model.state_dict() if key.endswith("rewrite.gain"))
    assert name.startswith(small.view.decoder_path)
    caught = {}
    small.decoder.register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
    out = small.model(**batch)
    full = decoder_call(zoo.model("llava"), batch)["inputs_embeds"]
    prompt, kept = small.decoder.visual_token_reduction.rewrite.seen[-1]
    assert torch.equal(
        prompt, (batch["labels"] == -100) & (batch["input_ids"] != zoo.IMAGE) & batch["attention_mask"].bool()
    )
    assert kept[0].shape == (2, 3) and small.view.visual_tokens(batch) == [3, 3]
    stay = kept_of(small.view, batch)
    scale = torch.where(prompt[..., None], 2.0, 1.0)
    text = stay & (batch["input_ids"] != zoo.IMAGE)
    places = stay.nonzero()[:, 1].view(2, -1)
    found = torch.zeros_like(full).scatter(1, places[..., None].expand(-1, -1, 32), caught["inputs_embeds"])
    torch.testing.assert_close(found[text], (full * scale)[text])
    out.loss.backward()
    gain = small.decoder.visual_token_reduction.rewrite.gain
    assert gain.grad is not None and float(gain.grad.abs()) > 0


def test_images_side_by_side_are_told_apart():
    visual = torch.tensor(
        [[0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool
    )
    whole = {places.shape[1]: places.tolist() for places in runs(visual)}
    assert whole == {2: [[12, 13]], 4: [[8, 9, 10, 11]], 6: [[1, 2, 3, 4, 5, 6]], 9: [list(range(15, 24))]}
    apart = {places.shape[1]: places.tolist() for places in runs(visual, 3)}
    assert apart[3] == [[1, 2, 3], [4, 5, 6], [15, 16, 17], [18, 19, 20], [21, 22, 23]]
    assert apart[2] == [[12, 13]] and apart[4] == [[8, 9, 10, 11]]


def test_two_images_without_text_between_are_two():
    batch = two_images(2)
    small = carrying(zoo.model("llava"), keep=0.26)
    logits(small.model, batch)
    kept = kept_of(small.view, batch) & (batch["input_ids"] == zoo.IMAGE)
    assert [kept[0, 2:18].sum(), kept[0, 18:34].sum()] == [4, 4], "4 of each 16, not 8 of 32"
    assert small.view.visual_tokens(batch) == [8, 4]


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_the_shape_of_a_picture_is_told_by_its_positions(name):
    """Two pictures of 12 tokens, 2 x 6 and 4 x 3: each is given with its own rows and columns."""
    seen = []

    def note(images, k):
        seen.append((images.grid, len(images), images.shape))
        return Choice(images.same(grid_positions(images.shape, k)))

    small, batch = carrying(zoo.model(name), choose=note), shapes(name)
    answers = generate(small.model, batch)
    assert set(seen) == {((2, 6), 1, (2, 6)), ((4, 3), 1, (4, 3))}
    assert torch.equal(answers, generate(small.model, batch, use_cache=False))
    for row in range(2):
        patches = {"pixel_values": batch["pixel_values"][48 * row :][:48]}
        alone = {k: v[row : row + 1] for k, v in batch.items()} | patches
        torch.testing.assert_close(logits(small.model, alone)[0], logits(small.model, batch)[row], **CLOSE)
