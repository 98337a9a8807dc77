"""prune.structured, what: hidden. Against the whole model with the gone channels silent (tests/oracles/hidden.py)."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from svlm.compress.anatomy import AttentionGeometry, ModelView, view_of
from svlm.compress.errors import PromiseBroken, Unmet, WorkFailed
from svlm.compress.families import Family
from svlm.compress.runtime.grid import Grid
from svlm.passes.prune._groups import attention_of, mlp_of
from svlm.passes.prune._importance import best, near_widths
from svlm.passes.prune.structured import Structured
from tests import zoo
from tests.oracles.hidden import silence
from tests.passes.prune.test_structured import context, kept_rows, logits, pruned, reloaded

SMALL = Structured(ratio=0.5, multiple=4, what=("hidden",), importance="magnitude")
WIDE = {"language": 32, "vision": 24}
TIED = ("qwen2-vl", "qwen2.5-vl", "blip-2", "florence-2", "trocr")  # the config has no head_dim of its own
ALIKE = ("llava-next", "smolvlm", "qwen2.5-vl", "paligemma")  # in what is cut much like one of the others
CASES = [
    pytest.param(part, family, marks=[pytest.mark.slow] if family in ALIKE else [])
    for part, none in (("language", ("donut",)), ("vision", ("internvl", "florence-2", "donut", "blip-2-t5")))
    for family in zoo.FAMILIES
    if family not in none
]


def step_for(part: str, family: str) -> Structured:
    tied = family in TIED if part == "language" else family != "trocr"
    return replace(SMALL, where=part, what=("hidden", "heads") if tied else ("hidden",))


def stays(part: str, original: ModelView, view: ModelView) -> list[int]:
    """The stream's channels that stay, read off the embeddings."""
    if part == "language":
        return kept_rows(original.table.module.weight.T, view.table.module.weight.T)
    old, new = (
        next(m for m in v.tower.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))).weight for v in (original, view)
    )
    return kept_rows(old.flatten(1), new.flatten(1))


@torch.no_grad()
def silence_heads(original: ModelView, view: ModelView, stay: list[int], part: str) -> None:
    """Heads and inner MLP channels that are gone write nothing any more."""

    def silent(reader: str, old: str, new: str, size: int) -> None:
        whole, small = original.linear(old).module.weight, view.linear(new).module.weight
        if whole.shape[0] == small.shape[0]:
            return
        columns = stay if whole.shape[1] == WIDE[part] else range(whole.shape[1])
        if whole.shape[1] not in (WIDE[part], small.shape[1]):  # a merger: four tokens
            columns = [i + start for start in range(0, whole.shape[1], WIDE[part]) for i in stay]
        kept = [int((whole[:, list(columns)] == row).all(1).nonzero()[0]) for row in small]
        gone = torch.ones(size, dtype=torch.bool)
        gone[[i for i in kept if i < size]] = False
        original.linear(reader).module.weight[:, gone] = 0

    for old, now in zip(original.units, view.units, strict=True):
        pairs: list[tuple[AttentionGeometry | None, AttentionGeometry | None]]
        pairs = [(old.attention, now.attention), (old.cross_attention, now.cross_attention)]
        for was, new in pairs:
            if was and new:
                silent(was.o, was.qkv or was.q, new.qkv or new.q, original.linear(was.o).module.in_features)  # type: ignore[arg-type]
        if old.mlp:
            silent(old.mlp.down, old.mlp.up, mlp_of(now).up, old.mlp.width)


def same_factors(original: ModelView, view: ModelView) -> None:
    """Factors that follow the width by the config: part of the new model, not of what was cut."""
    theirs = dict(view.model.named_modules())
    for name, module in original.model.named_modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale.fill_(theirs[name].scalar_embed_scale)
        if hasattr(module, "model_dim"):
            module.model_dim = theirs[name].model_dim


@pytest.mark.parametrize("part, family", CASES)
def test_equals_the_whole_model_with_the_channels_silent(part: str, family: str, tmp_path: Path) -> None:
    model, batch = zoo.build(family)
    original, view = view_of(copy.deepcopy(model)), view_of(model)
    step = step_for(part, family)
    notes = step.apply(view, context(view, batch))
    view.ledger.add(step, notes.record)
    step.ensures(view)
    stay, width = stays(part, original, view), WIDE[part]
    assert len(stay) == width // 2 == notes.numbers[f"{part}_hidden"] and stay == sorted(set(stay))
    for old, new in zip(original.parts[part], view.parts[part], strict=True):
        if old.attention:
            assert attention_of(new).head_dim == attention_of(old).head_dim
    silence_heads(original, view, stay, part)
    same_factors(original, view)
    skip = "qformer" if part == "vision" else ""
    silence(original.model, [unit.module for unit in original.parts[part] if unit.stack], width, stay, skip)
    torch.testing.assert_close(logits(view, batch), logits(original, batch), rtol=1e-4, atol=1e-5)
    traces = notes.numbers["groups_traced"], notes.numbers["groups_untraced"]
    assert traces[0] >= 1 or family == "gemma3", traces
    assert view.tied_embeddings == original.tied_embeddings
    assert all(p.is_contiguous() for p in model.parameters())
    again = reloaded(view, tmp_path)
    assert torch.equal(logits(again, batch), logits(view, batch))
    if family not in ("llava", "gemma3", "qwen3-vl", "blip-2-t5"):
        return
    fresh = view_of(zoo.model(family, seed=1))
    record = json.loads(json.dumps(notes.record))
    step_for(part, family).rebuild(fresh, record)
    assert fresh.tied_embeddings == view.tied_embeddings
    fresh.model.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, batch), logits(view, batch))


@pytest.mark.parametrize(
    "part, family, why",
    [
        ("vision", "llava", "add heads"),
        ("language", "qwen2-vl", "add heads"),
        ("vision", "florence-2", "no residual stream of one width"),
        ("vision", "donut", "no residual stream of one width"),
        ("language", "donut", "enc_to_dec_proj"),
        ("vision", "internvl", "q_norm"),
    ],
)
def test_what_no_config_says_is_refused_untouched(part: str, family: str, why: str) -> None:
    model, batch = zoo.build(family)
    view = view_of(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    what = ("hidden", "heads") if family == "internvl" else ("hidden",)
    with pytest.raises(Unmet, match=why):
        replace(SMALL, where=part, what=what).requires(view, context(view, batch))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_channels_that_are_small_behind_the_norms_go() -> None:
    model, batch = zoo.build("llava")
    view, original = view_of(model), view_of(copy.deepcopy(model))
    total = torch.zeros(32, dtype=torch.float64)
    text = view.token_masks(batch).text

    def note(module: Any, args: Any, out: Tensor) -> None:
        total.add_(out[text].abs().double().mean(0))

    for unit in original.parts["language"]:
        for stage in unit.stages:
            if stage[0].norm:
                original.model.get_submodule(stage[0].norm).register_forward_hook(note)
    logits(original, batch)
    pruned(replace(SMALL, importance="minitron", token_weights="text"), view, batch)
    assert stays("language", original, view) == best(total, 16)


def test_taylor_and_random_choose_hidden_channels() -> None:
    batch = zoo.batch("llava")

    def kept(step: Structured) -> list[int]:
        view = view_of(zoo.model("llava"))
        original = view_of(copy.deepcopy(view.model))
        pruned(step, view, batch)
        return stays("language", original, view)

    chance = replace(SMALL, importance="random")
    assert kept(chance) == kept(chance) != kept(replace(chance, seed=1))
    view = view_of(zoo.model("llava"))
    scores = torch.zeros(32, dtype=torch.float64)
    view.model(**batch).loss.backward()
    for unit in view.parts["language"]:
        for ref in unit.linears:
            if ref.role.split(".")[1] in ("q", "k", "v", "gate", "up"):
                assert ref.module.weight.grad is not None
                scores += (ref.module.weight.detach() * ref.module.weight.grad).double().sum(0)
    assert kept(replace(SMALL, importance="taylor")) == best(scores.abs(), 16)


def test_both_streams_heads_and_mlps_in_one_pass(tmp_path: Path) -> None:
    """All at once, a walk that reaches the mergers whose width follows the tower's, save and stock reload."""
    model, batch = zoo.build("qwen3-vl")
    view = view_of(model)
    everything = replace(SMALL, where=("vision", "language"), what=("mlp", "heads", "hidden"), importance="minitron")
    notes = pruned(everything, view, batch)
    assert notes.numbers["mlps_tied_to_hidden"] == 3
    assert (notes.numbers["vision_hidden"], notes.numbers["language_hidden"]) == (12, 16)
    assert {mlp_of(u).width for u in view.parts["language"]} == {24}
    assert torch.equal(logits(reloaded(view, tmp_path), batch), logits(view, batch))


def test_an_embedding_scale_that_follows_the_width_is_told() -> None:
    model, batch = zoo.build("gemma3")
    view = view_of(model)
    notes = pruned(SMALL, view, batch)
    assert notes.numbers["factors"] == {
        "model.language_model.embed_tokens.scalar_embed_scale": [pytest.approx(32**0.5), pytest.approx(16**0.5)]
    }


def test_refusals_name_what_to_change() -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    ctx = context(view, batch)
    with pytest.raises(Unmet, match="all blocks") as caught:
        replace(SMALL, where="language.blocks[1:]").requires(view, ctx)
    assert "language" in caught.value.change
    with pytest.raises(Unmet, match="no hidden"):
        replace(SMALL, where="connector").requires(view, ctx)
    with pytest.raises(Unmet, match="rounds to nothing"):
        replace(SMALL, multiple=64).requires(view, ctx)
    view.grids[view.table.path] = Grid(4, -1, True, torch.ones(zoo.VOCAB, 1), None)
    with pytest.raises(Unmet, match="quantized already"):
        SMALL.requires(view, ctx)


def test_a_width_that_the_config_does_not_bear_gives_way_to_the_nearest() -> None:
    """Llama's hidden size is to be a multiple of its head count, though its heads have a width of their own."""
    config = zoo.CONFIGS["llava"]()
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 4, 4
    view = view_of(tf.AutoModelForImageTextToText.from_config(config).eval())
    notes = pruned(replace(SMALL, ratio=0.2, multiple=2), view, zoo.batch("llava"))
    assert notes.numbers["language_hidden"] == 24, "26 is no multiple of four heads; 28 removes less than 24 is off"
    assert near_widths(192, 0.17, 16) == (160, 144) and near_widths(64, 0.99, 64) == (64,)
    config = zoo.CONFIGS["llava"]()
    config.text_config.hidden_size, config.text_config.head_dim = 36, 8
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 6, 3
    joint = view_of(tf.AutoModelForImageTextToText.from_config(config).eval())
    both = replace(SMALL, ratio=0.2, multiple=4, what=("hidden", "heads"))
    notes = pruned(both, joint, zoo.batch("llava"))
    assert (notes.numbers["language_hidden"], notes.numbers["query_heads"]) == (28, [4]), (
        "28 is one of four, not of six"
    )
    hopeless = replace(SMALL, ratio=0.2, multiple=13)
    fresh = view_of(zoo.model("llava"))
    with pytest.raises(Unmet, match="not a multiple"):
        hopeless.requires(fresh, context(fresh, zoo.batch("llava")))


def test_a_row_that_names_the_wrong_keys_is_refused_or_caught() -> None:
    model, batch = zoo.build("qwen3-vl")
    row = Family.from_json({"extends": "qwen3-vl", "widths": {"language": ["vision_config.out_hidden_size"]}})
    view = view_of(model, rows=[row])
    with pytest.raises(Unmet, match="would not change"):
        SMALL.requires(view, context(view, batch))
    empty = view_of(model, rows=[Family.from_json({"extends": "qwen3-vl", "widths": {}})])
    with pytest.raises(Unmet, match="no stock config") as caught:
        SMALL.requires(empty, context(empty, batch))
    assert "widths" in caught.value.where
    assert Family.from_json(row.to_json()).widths == {"language": ("vision_config.out_hidden_size",)}


def test_a_trace_that_finds_more_than_the_cut_stops_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from svlm.passes.prune import _plan

    view, batch = view_of(zoo.model("llava")), zoo.batch("llava")
    honest = _plan._members
    monkeypatch.setattr(_plan, "_members", lambda v, s: {m for m in honest(v, s) if m[0] != "lm_head"})
    before = [p.shape for p in view.model.parameters()]
    with pytest.raises(WorkFailed, match="lm_head"):
        SMALL.apply(view, context(view, batch))
    assert [p.shape for p in view.model.parameters()] == before


def test_promise_is_broken_by_a_wider_config() -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    pruned(SMALL, view, batch)
    model.config.text_config.hidden_size = 32
    with pytest.raises(PromiseBroken, match="config"):
        SMALL.ensures(view)


def test_generation_and_a_later_pass_go_on() -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    pruned(SMALL, view, batch)
    pruned(replace(SMALL, what=("mlp",)), view, batch)
    SMALL.ensures(view)
    how = tf.GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    prompt = {k: v for k, v in batch.items() if k != "labels"}
    assert model.generate(**prompt, generation_config=how).shape[1] == batch["input_ids"].shape[1] + 3
