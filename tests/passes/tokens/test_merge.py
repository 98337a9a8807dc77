"""tokens.merge: what the tower computes, what reads it, what later passes and the saved model see."""

from __future__ import annotations

import copy

import pytest
import torch

from svlm import passes
from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.anatomy import view_of
from svlm.compress.base import Context
from svlm.compress.errors import PromiseBroken, SelectorError, Unmet
from svlm.compress.pipeline import apply_pass, ask_promises
from svlm.compress.runtime.merge import GROUPS, installed, merging_of, remove
from svlm.passes.prune.layers import Layers
from svlm.passes.prune.structured import Structured
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.tokens.grid import Grid
from svlm.passes.tokens.merge import Merge
from tests import zoo
from tests.oracles import tome as oracle

from .helpers import ELSEWHERE, IN_SEQUENCE, generate, logits, prompts, single, two_images

REFUSED = {
    "qwen2-vl": "rotates",
    "qwen2.5-vl": "rotates",
    "qwen3-vl": "rotates",
    "blip-2": "no attention mask",
    "blip-2-t5": "no attention mask",
    "florence-2": "no attention",
    "donut": "windows",
}
MERGED = [family for family in (*IN_SEQUENCE, *ELSEWHERE) if family not in REFUSED]
CONSTANT = Merge(keep=0.5, schedule="constant")


def context(view, *batches):
    return Context(batches, lambda where=None, **o: Walk(view, batches, where, **o), lambda: None)


def with_merging(family: str, step: Merge = CONSTANT, model=None, batch=None):
    view = view_of(zoo.model(family) if model is None else model)
    batch = zoo.batch(family) if batch is None else batch
    apply_pass(step, view, context(view, batch))
    return view


def features(view, batch):
    """What the tower returns: all hidden states."""
    with torch.no_grad():
        return view.tower(batch["pixel_values"], output_hidden_states=True)


# ---------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("schedule", ["constant", "decreasing"])
def test_the_tower_is_the_naive_one(schedule, proportional):
    """Every hidden state of a CLIP tower: layer by layer, one image at a time, from the weights."""
    step = Merge(keep=0.5, schedule=schedule, proportional=proportional)
    model, batch = zoo.model("llava").double(), zoo.batch("llava")
    batch["pixel_values"] = batch["pixel_values"].double()
    view = with_merging("llava", step, model, batch)
    found = features(view, batch).hidden_states
    by_block = {"constant": [13, 11, 8], "decreasing": [12, 9, 8]}[schedule]
    assert [len(t.unique(dim=0)) - 1 for t in (h[0] for h in found[1:])] == by_block
    for i in range(2):
        x = found[0][i]
        assert len(x) == 17
        sizes, patches = [1.0] * 17, [[token] for token in range(17)]
        for number, layer in enumerate(model.model.vision_tower.encoder.layers):
            seen = sizes if proportional else [1.0] * len(sizes)
            with torch.no_grad():
                x, groups = oracle.clip_layer(layer, x, seen, 1 + by_block[number], 1, sizes)
            sizes = [sum(sizes[token] for token in group) for group in groups]
            patches = [[patch for token in group for patch in patches[token]] for group in groups]
            assert patches[0] == [0], "CLS is merged with nothing"
            for token, members in enumerate(patches):
                for patch in members:
                    torch.testing.assert_close(found[number + 1][i, patch], x[token], rtol=1e-9, atol=1e-9)
        assert sum(sizes) == 17 and max(sizes) > 1


@pytest.mark.parametrize("family", MERGED)
def test_keep_all_is_the_original_bit_for_bit(family):
    model, batch = zoo.build(family)
    wanted = logits(copy.deepcopy(model), batch)
    view = with_merging(family, Merge(keep=1.0), model, batch)
    assert installed(view.model)
    assert torch.equal(logits(view.model, batch), wanted)
    assert torch.equal(logits(copy.deepcopy(view.model), batch), wanted)


@pytest.mark.parametrize("family", MERGED)
def test_the_halves_of_a_block_make_the_block(family):
    """A block that is asked in two halves, with nothing merged in between, returns what it returns whole."""
    from svlm.compress.runtime.merge import _Halves
    from svlm.passes.tokens._tower import inside

    view = view_of(zoo.model(family))
    unit = next(unit for unit in view.units if unit.part == "vision")
    hidden = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(4))
    given = () if family == "internvl" else (None,)
    with torch.no_grad():
        call = _Halves(unit.module, inside(unit), type(unit.module).forward, given, {})
        between, keys = call.attention(hidden, None)
        assert keys.shape == (2, 9, 12)
        assert not torch.allclose(between, hidden)
        torch.testing.assert_close(call.mlp(between), unit.module(hidden, *given), rtol=1e-6, atol=1e-6)
    assert all("forward" not in module.__dict__ for module in unit.module.modules())


@pytest.mark.parametrize("family", MERGED)
def test_works_on_fewer_tokens_and_returns_all(family):
    """Linears of the later blocks are given fewer rows; whatever reads the tower finds every patch."""
    model, batch = zoo.build(family)
    plain = view_of(copy.deepcopy(model))
    view = with_merging(family, CONSTANT, model, batch)
    rows: dict[str, int] = {}
    for unit in view.parts["vision"]:
        for ref in unit.linears:
            ref.module.register_forward_hook(
                lambda module, args, out, name=f"{unit.index} {ref.role}": rows.__setitem__(name, args[0].shape[-2])
            )
    pixels = {"pixel_values": batch["pixel_values"].reshape(-1, 3, 16, 16)}
    before, after = features(plain, pixels), features(view, pixels)
    prefix = before.last_hidden_state.shape[1] - 16
    assert [rows[f"{i} attn.q"] - prefix for i in range(3)] == [16, 13, 11]
    assert [rows[f"{i} attn.k"] - prefix for i in range(3)] == [16, 13, 11]
    assert [rows[f"{i} mlp.up"] - prefix for i in range(3)] == [13, 11, 8]
    assert [rows[f"{i} mlp.down"] - prefix for i in range(3)] == [13, 11, 8]
    for old, new in zip(before.hidden_states, after.hidden_states, strict=True):
        assert old.shape == new.shape
    assert before.last_hidden_state.shape == after.last_hidden_state.shape
    assert not torch.allclose(before.last_hidden_state, after.last_hidden_state)
    assert len(after.last_hidden_state[0].unique(dim=0)) == 8 + prefix


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_refused_by_name(family):
    model, batch = zoo.build(family)
    view = view_of(model)
    with pytest.raises(Unmet, match=REFUSED[family]) as caught:
        Merge().requires(view, context(view, batch))
    assert view.family.name in str(caught.value)
    assert not installed(model)


def test_without_proportional_attention_no_mask_is_needed():
    view = with_merging("blip-2", Merge(proportional=False))
    batch = zoo.batch("blip-2")
    assert not torch.allclose(logits(view.model, batch), logits(zoo.model("blip-2"), batch))


@pytest.mark.parametrize(
    "step,match",
    [
        (Merge(where=("language",)), "one stack"),
        (Merge(keep=0.25, where=("vision.blocks[1]",)), "half of its tokens"),
        (Merge(keep=0.1, schedule="constant"), "half of its tokens"),
    ],
)
def test_settings_that_cannot_work(step, match):
    view = view_of(zoo.model("llava"))
    with pytest.raises(Unmet, match=match):
        step.requires(view, context(view, zoo.batch("llava")))
    with pytest.raises(SelectorError):
        Merge(where=("vision.blocks[9]",)).requires(view, context(view, zoo.batch("llava")))
    words = {k: v for k, v in zoo.batch("llava").items() if k != "pixel_values"}
    with pytest.raises(Unmet, match="no fit sample with a picture"):
        Merge().requires(view, context(view, words))


def test_chosen_blocks_alone_merge():
    view = with_merging("llava", Merge(keep=0.5, schedule="constant", where=("vision.blocks[1:]",)))
    blocks = view.model.model.vision_tower.encoder.layers
    assert [merging and merging.left for merging in map(merging_of, blocks)] == [None, 0.75, 0.5]
    with pytest.raises(Unmet, match="merged already"):
        Merge().requires(view, context(view, zoo.batch("llava")))
    remove(view.model)
    batch = zoo.batch("llava")
    assert torch.equal(logits(view.model, batch), logits(zoo.model("llava"), batch))
    assert not installed(view.model)


def test_padded_patches_change_nothing():
    """What lies in the padding of a picture reaches none of its real patches, and is merged with none of them."""
    batch = {k: v for k, v in zoo.batch("smolvlm", 3).items() if k != "labels"}
    mask = torch.ones(3, 1, 16, 16, dtype=torch.bool)
    mask[1, :, :, 8:] = False  # the right half of the second picture
    batch["pixel_attention_mask"] = mask
    view = with_merging("smolvlm", CONSTANT, batch=batch)
    outputs = []
    block = view.model.model.vision_model.encoder.layers[-1]
    block.register_forward_hook(lambda module, args, out: outputs.append(getattr(out, GROUPS)))
    tower = []
    view.tower.register_forward_hook(lambda module, args, out: tower.append(out.last_hidden_state))
    found = logits(view.model, batch)
    real = mask[1, 0].unfold(0, 4, 4).unfold(1, 4, 4)[:, :, 0, 0].flatten()
    ids, sizes = outputs[0].ids, outputs[0].sizes
    assert not set(ids[1, real].tolist()) & set(ids[1, ~real].tolist())
    assert len(set(ids[1, ~real].tolist())) < len(set(ids[1, real].tolist())), "padding is merged first"
    assert float(sizes[1].sum()) == 8 and float(sizes[0].sum()) == 16
    other = {**batch, "pixel_values": batch["pixel_values"].clone()}
    other["pixel_values"][1, :, :, :, 8:] = 7.0
    logits(view.model, other)
    torch.testing.assert_close(tower[0][1, real], tower[1][1, real])
    assert not torch.allclose(tower[0][1, ~real], tower[1][1, ~real])
    alone = {k: v[:1] for k, v in batch.items()}
    torch.testing.assert_close(logits(view.model, alone), found[:1], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- the model around it


@pytest.mark.parametrize("family", [family for family in MERGED if family in IN_SEQUENCE])
def test_generates_alike_in_batches_and_with_a_cache(family):
    view = with_merging(family)
    batch = prompts(family)
    answers = generate(view.model, batch)
    assert torch.equal(answers, generate(view.model, batch, use_cache=False))
    assert torch.equal(answers[2], generate(view.model, single(batch, 2))[0])
    torch.testing.assert_close(
        logits(view.model, batch)[2, -3:], logits(view.model, single(batch, 2))[0, -3:], rtol=1e-4, atol=1e-4
    )


def test_two_images_in_a_prompt():
    view = with_merging("llava")
    batch = two_images()
    answers = generate(view.model, batch)
    assert torch.equal(answers, generate(view.model, batch, use_cache=False))
    second = {k: v[1:] if k != "pixel_values" else v[2:] for k, v in batch.items()}
    torch.testing.assert_close(logits(view.model, second), logits(view.model, batch)[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_saved_and_loaded_with_what_came_after(family, tmp_path):
    """Merging, then fewer tokens for the decoder, narrower blocks, four bits: every promise holds, from disk too."""
    model, batch = zoo.build(family)
    view = view_of(model)
    steps = [
        Merge(),
        Grid(keep=0.5),
        Structured(ratio=0.5, multiple=4, what=("mlp",), where=("vision",)),
        GPTQ(bits=4, group=-1, where=("vision", "language"), token_weights="gradient"),
    ]
    for step in steps:
        apply_pass(step, view, context(view, batch))
    storage.round_to_storage(view)
    kept, broken = ask_promises(view, passes.find)
    assert kept == [step.name for step in steps] and broken is None
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    assert ask_promises(again, passes.find)[1] is None
    prompt = prompts(family)
    torch.testing.assert_close(logits(again.model, prompt), logits(view.model, prompt), rtol=1e-5, atol=1e-5)
    answers = generate(view.model, prompt)
    assert torch.equal(answers, generate(again.model, prompt))
    assert torch.equal(answers, generate(again.model, prompt, use_cache=False))


def test_promise():
    view = with_merging("llava")
    CONSTANT.ensures(view)
    block = view.model.model.vision_tower.encoder.layers[1]
    own = block.__dict__.pop("forward")
    with pytest.raises(PromiseBroken, match=r"layers\.1"):
        CONSTANT.ensures(view)
    block.__dict__["forward"] = own
    CONSTANT.ensures(view)
    merging_of(block).left = 0.9
    with pytest.raises(PromiseBroken, match=r"0\.9 instead"):
        CONSTANT.ensures(view)
    remove(view.model)
    with pytest.raises(PromiseBroken, match="merges none"):
        CONSTANT.ensures(view)


def test_a_block_is_taken_out_later(tmp_path):
    """One that merges none may go; the promise notices one that merges, and what is saved is what runs."""
    model, batch = zoo.build("paligemma")
    step = Merge(keep=0.5, schedule="constant", where=("vision.blocks[:2]",))
    view = with_merging("paligemma", step, model, batch)
    apply_pass(Layers(count=1, where=("vision.blocks[2]",), criterion="random"), view, context(view, batch))
    step.ensures(view)
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    torch.testing.assert_close(logits(again.model, batch), logits(view.model, batch), rtol=1e-5, atol=1e-5)
    for gone, broken in ((0, False), (1, True)):
        view = with_merging("paligemma", step, zoo.model("paligemma"), batch)
        apply_pass(Layers(count=1, where=(f"vision.blocks[{gone}]",), criterion="random"), view, context(view, batch))
        assert torch.isfinite(logits(view.model, batch)).all()
        if broken:
            with pytest.raises(PromiseBroken, match="taken out"):
                step.ensures(view)
        else:
            step.ensures(view)  # the other one merges down to the same number
        storage.save(view, tmp_path / str(gone))
        again = storage.load_model(tmp_path / str(gone), find=passes.find)
        torch.testing.assert_close(logits(again.model, batch), logits(view.model, batch), rtol=1e-5, atol=1e-5)
