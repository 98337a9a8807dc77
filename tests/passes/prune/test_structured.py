"""prune.structured: exact, reloadable by stock transformers, GQA groups intact, refused where no config can say it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from svlm.calib.walk import Walk
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Context, Notes, evaluating
from svlm.compress.errors import PromiseBroken, SelectorError, Unmet, WorkFailed
from svlm.compress.runtime.grid import Grid
from svlm.passes.prune._groups import attention_of, mlp_of
from svlm.passes.prune._importance import best
from svlm.passes.prune.structured import Structured
from tests import zoo

everywhere = pytest.mark.parametrize("family", zoo.FAMILIES)
# the config of these ties head_dim to hidden_size / heads (or shares a position bias by head), so heads cannot go
NO_HEADS = ("qwen2-vl", "qwen2.5-vl", "blip-2", "blip-2-t5", "florence-2", "trocr", "donut")
WITH_HEADS = tuple(family for family in zoo.FAMILIES if family not in NO_HEADS)
SMALL = Structured(ratio=0.5, multiple=4)


def context(view: ModelView, *batches: Mapping[str, Tensor], scratch: Path | None = None) -> Context:
    @contextmanager
    def lend() -> Any:
        with evaluating(view.model):
            yield view

    return Context(batches, lambda where=None, **o: Walk(view, batches, where, scratch=scratch, **o), lend)


def pruned(step: Structured, view: ModelView, *batches: Mapping[str, Tensor], scratch: Path | None = None) -> Notes:
    ctx = context(view, *batches, scratch=scratch)
    step.requires(view, ctx)
    notes = step.apply(view, ctx)
    view.ledger.add(step, notes.record)
    step.ensures(view)
    return notes


def logits(view: ModelView, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return view.model(**batch, use_cache=False).logits


def kept_rows(before: Tensor, after: Tensor) -> list[int]:
    """Which rows of `before` the rows of `after` are."""
    return [int((before == row).all(1).nonzero()[0]) for row in after]


def reloaded(view: ModelView, folder: Path) -> ModelView:
    view.model.save_pretrained(folder)
    return view_of(tf.AutoModelForImageTextToText.from_pretrained(folder))


@everywhere
def test_equals_the_original_with_the_channels_silenced(family: str, tmp_path: Path) -> None:
    model, batch = zoo.build(family)
    original, view = view_of(copy.deepcopy(model)), view_of(model)
    notes = pruned(SMALL, view, batch)
    assert notes.numbers["groups_untraced"] == {} and notes.numbers["groups_traced"] >= 1
    removed = 0
    for old, new in zip(original.parts["language"], view.parts["language"], strict=True):
        if old.mlp is None:
            continue
        was, now = mlp_of(old), mlp_of(new)
        assert now.width == was.width // 2
        rows = original.linear(was.up).module.weight
        kept = kept_rows(rows, view.linear(now.up).module.weight)
        assert kept == sorted(set(kept)) and len(kept) == now.width
        gone = sorted(set(range(was.width)) - set(kept))
        with torch.no_grad():
            original.linear(was.down).module.weight[:, gone] = 0
        removed += len(gone) * (rows.shape[1] + view.linear(now.down).module.out_features)
    torch.testing.assert_close(logits(view, batch), logits(original, batch), rtol=1e-4, atol=1e-5)
    before = sum(p.numel() for p in original.model.parameters())
    assert sum(p.numel() for p in model.parameters()) <= before - removed
    assert all(p.is_contiguous() for p in model.parameters())
    again = reloaded(view, tmp_path)
    assert torch.equal(logits(again, batch), logits(view, batch))


@pytest.mark.parametrize("family", WITH_HEADS)
def test_heads_go_as_whole_groups_and_stock_transformers_reloads(family: str, tmp_path: Path) -> None:
    model, batch = zoo.build(family)
    original, view = view_of(copy.deepcopy(model)), view_of(model)
    pruned(replace(SMALL, what=("mlp", "heads")), view, batch)
    for old, new in zip(original.parts["language"], view.parts["language"], strict=True):
        was, now = attention_of(old), attention_of(new)
        share = was.n_heads // was.n_kv_heads
        assert (now.n_heads, now.n_kv_heads, now.head_dim) == (was.n_heads // 2, was.n_kv_heads // 2, was.head_dim)
        assert was.q and was.k and was.v and now.q and now.k and now.v
        rows = kept_rows(original.linear(was.q).module.weight, view.linear(now.q).module.weight)
        pairs = kept_rows(original.linear(was.k).module.weight, view.linear(now.k).module.weight)
        heads = sorted({row // was.head_dim for row in rows})
        groups = sorted({row // was.head_dim for row in pairs})
        assert heads == [group * share + i for group in groups for i in range(share)], "a group lost its query heads"
        gone = torch.ones(original.linear(was.o).module.in_features, dtype=torch.bool)
        gone[rows] = False
        channels = kept_rows(original.linear(mlp_of(old).up).module.weight, view.linear(mlp_of(new).up).module.weight)
        with torch.no_grad():
            original.linear(was.o).module.weight[:, gone] = 0
            silent = sorted(set(range(mlp_of(old).width)) - set(channels))
            original.linear(mlp_of(old).down).module.weight[:, silent] = 0
    torch.testing.assert_close(logits(view, batch), logits(original, batch), rtol=1e-4, atol=1e-5)
    again = reloaded(view, tmp_path)
    assert torch.equal(logits(again, batch), logits(view, batch))
    fresh = zoo.model(family).generation_config
    fresh.max_new_tokens, fresh.do_sample, fresh.min_new_tokens = 3, False, 3
    prompt = {k: v for k, v in batch.items() if k != "labels"}
    assert torch.equal(
        model.generate(**prompt, generation_config=fresh), again.model.generate(**prompt, generation_config=fresh)
    )


def test_query_heads_go_from_every_group_where_that_comes_nearer() -> None:
    """One key-value head for all: no whole group can go; three heads would not divide a Llama's hidden size."""
    config = zoo.CONFIGS["llava"]()
    config.text_config.num_key_value_heads = 1
    view = view_of(tf.AutoModelForImageTextToText.from_config(config).eval())
    batch = zoo.batch("llava")
    notes = pruned(replace(SMALL, ratio=0.25, what=("heads",)), view, batch)
    assert notes.numbers["query_heads"] == [2] and notes.numbers["kv_heads"] == [1]
    assert view.model.config.text_config.num_attention_heads == 2
    assert attention_of(view.parts["language"][0]).n_kv_heads == 1
    assert torch.isfinite(logits(view, batch)).all()


@pytest.mark.parametrize("family", NO_HEADS)
def test_heads_that_no_stock_config_can_express_are_refused_untouched(family: str) -> None:
    model, batch = zoo.build(family)
    view = view_of(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(Unmet, match="no stock config"):
        replace(SMALL, what=("heads",)).requires(view, context(view, batch))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


TIED = ("qwen2-vl", "qwen2.5-vl", "blip-2", "florence-2", "trocr")  # hidden width and heads go together


@everywhere
def test_a_quarter_of_mlp_and_heads_and_stock_transformers_reloads(family: str, tmp_path: Path) -> None:
    """Of T5's position bias and Donut's joined widths no config says fewer heads: their MLPs alone."""
    model, batch = zoo.build(family)
    view = view_of(model)
    quarter = Structured(ratio=0.25, multiple=4, what=("mlp", "heads", "hidden")[: 2 + (family in TIED)])
    if family in ("blip-2-t5", "donut"):
        with pytest.raises(Unmet, match="no stock config"):
            quarter.requires(view, context(view, batch))
        quarter = replace(quarter, what=("mlp",))
    notes = pruned(quarter, view, batch)
    assert notes.numbers["mlp_width"] == [36]
    if "heads" in quarter.what:
        share = 4 // notes.numbers["kv_heads_before"][0]
        assert notes.numbers["query_heads"] == [4 - share], "a whole group"
    assert torch.equal(logits(reloaded(view, tmp_path), batch), logits(view, batch))


@pytest.mark.parametrize("family", ["blip-2", "blip-2-t5"])
def test_connectors_that_are_stacks_are_pruned(family: str, tmp_path: Path) -> None:
    model, batch = zoo.build(family)
    view = view_of(model)
    pruned(replace(SMALL, where="connector"), view, batch)
    assert {mlp_of(unit).width for unit in view.parts["connector"] if unit.mlp} == {20}
    assert torch.equal(logits(reloaded(view, tmp_path), batch), logits(view, batch))


def test_a_pooling_head_that_nothing_reads_follows_the_tower(tmp_path: Path) -> None:
    model, batch = zoo.build("llava-onevision")
    view = view_of(model)
    notes = pruned(replace(SMALL, where="vision"), view, batch)
    assert notes.numbers["idle_dimensions"] == 3
    assert torch.equal(logits(reloaded(view, tmp_path), batch), logits(view, batch))


def test_vision_heads_go_alone_where_the_config_says_their_width(tmp_path: Path) -> None:
    model, batch = zoo.build("trocr")
    view = view_of(model)
    pruned(replace(SMALL, where="vision", what=("heads",)), view, batch)
    assert {attention_of(unit).n_heads for unit in view.parts["vision"]} == {1}
    assert torch.equal(logits(reloaded(view, tmp_path), batch), logits(view, batch))


@pytest.mark.parametrize("family", ["llava", "gemma3", "smolvlm", "qwen2.5-vl", "internvl", "qwen3-vl"])
def test_vision_towers_are_pruned_where_their_config_says_the_width(family: str, tmp_path: Path) -> None:
    model, batch = zoo.build(family)
    view = view_of(model)
    pruned(replace(SMALL, where="vision.mlp", importance="magnitude"), view, batch)
    assert {mlp_of(unit).width for unit in view.parts["vision"]} == {20}
    assert torch.equal(logits(reloaded(view, tmp_path), batch), logits(view, batch))


@everywhere
def test_rebuild_gives_a_fresh_model_the_shapes(family: str) -> None:
    model, batch = zoo.build(family)
    view, step = view_of(model), SMALL if family in NO_HEADS else replace(SMALL, what=("mlp", "heads"))
    notes = pruned(step, view, batch)
    record = json.loads(json.dumps(notes.record))
    fresh = view_of(zoo.model(family, seed=1))
    step.rebuild(fresh, record)
    fresh.model.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, batch), logits(view, batch))
    fresh.ledger.add(step, record)
    step.ensures(fresh)
    shapes = [p.shape for p in fresh.model.parameters()]
    step.rebuild(fresh, record)
    assert [p.shape for p in fresh.model.parameters()] == shapes
    assert torch.equal(logits(fresh, batch), logits(view, batch)), "rebuilding twice changes nothing"


def test_channels_that_fire_least_are_those_that_go() -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    seen: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, []).append(args[0])

    handles = [
        view.linear(mlp_of(unit).down).module.register_forward_pre_hook(note(mlp_of(unit).down))
        for unit in view.parts["language"]
    ]
    logits(view, batch)
    for handle in handles:
        handle.remove()
    original = copy.deepcopy(model)
    text = view.token_masks(batch).text
    pruned(replace(SMALL, token_weights="text"), view, batch)
    for unit in view.parts["language"]:
        mean = seen[mlp_of(unit).down][0][text].abs().double().mean(0)
        rows = original.get_submodule(mlp_of(unit).up).weight
        assert kept_rows(rows, view.linear(mlp_of(unit).up).module.weight) == best(mean, 24)


def test_random_follows_its_seed_and_taylor_the_gradient() -> None:
    batch = zoo.batch("llava")

    def up(step: Structured) -> Tensor:
        view = view_of(zoo.model("llava"))
        pruned(step, view, batch)
        return view.linear(mlp_of(view.parts["language"][0]).up).module.weight

    chance = replace(SMALL, importance="random")
    assert torch.equal(up(chance), up(chance))
    assert not torch.equal(up(chance), up(replace(chance, seed=1)))
    model = zoo.model("llava")
    model.requires_grad_(False)
    view = view_of(model)
    before = up(replace(SMALL, importance="taylor"))
    mlp = mlp_of(view.parts["language"][0])
    down = view.linear(mlp.down).module.weight.requires_grad_(True)
    view.model(**batch).loss.backward()
    assert down.grad is not None
    scores = (down.detach() * down.grad).double().sum(0).abs()
    assert kept_rows(view.linear(mlp.up).module.weight, before) == best(scores, 24)


def test_a_killed_walk_goes_on(tmp_path: Path) -> None:
    """The importance of finished blocks is read back, not measured again; the result is the same."""
    batch = zoo.batch("llava")
    whole = view_of(zoo.model("llava"))
    pruned(SMALL, whole, batch)

    class Stop(Exception):
        pass

    first = view_of(zoo.model("llava"))
    ctx = context(first, batch, scratch=tmp_path)

    def dying(where: Any = None, **options: Any) -> Any:
        walk = Walk(first, [batch], where, scratch=tmp_path, **options)

        class Dying:
            notes = walk.notes

            def __iter__(self) -> Any:
                for i, block in enumerate(walk):
                    if i == 2:
                        raise Stop
                    yield block

        return Dying()

    with pytest.raises(Stop):
        SMALL.apply(first, replace(ctx, walk=dying))
    second, visited = view_of(zoo.model("llava")), []

    def counted(where: Any = None, **options: Any) -> Any:
        walk = Walk(second, [batch], where, scratch=tmp_path, **options)

        class Counted:
            notes = walk.notes

            def __iter__(self) -> Any:
                for block in walk:
                    visited.append(block.name)
                    yield block

        return Counted()

    SMALL.apply(second, replace(context(second, batch), walk=counted))
    assert visited == ["language.blocks[2]"]
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_promise_is_broken_by_wider_weights_and_by_the_config() -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    pruned(SMALL, view, batch)
    model.config.text_config.intermediate_size = 48
    with pytest.raises(PromiseBroken, match="config"):
        SMALL.ensures(view)
    model.config.text_config.intermediate_size = 24
    SMALL.ensures(view)
    down = view.linear(mlp_of(view.parts["language"][1]).down).module
    down.weight = torch.nn.Parameter(torch.zeros(32, 48))
    with pytest.raises(PromiseBroken, match=r"layers\.1\.mlp\.down_proj"):
        SMALL.ensures(view)


def test_pruning_twice_keeps_both_promises() -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    pruned(SMALL, view, batch)
    second = replace(SMALL, ratio=0.34)
    pruned(second, view, batch)
    assert model.config.text_config.intermediate_size == 16
    SMALL.ensures(view)


def test_refusals_name_what_to_change() -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    ctx = context(view, batch)
    with pytest.raises(Unmet, match="rounds to nothing") as caught:
        Structured(ratio=0.3, multiple=64).requires(view, ctx)
    assert "multiple" in caught.value.change and "48 channels" in caught.value.found
    with pytest.raises(Unmet, match="no stock config"):
        replace(SMALL, where="language.blocks[1:]").requires(view, ctx)
    with pytest.raises(Unmet, match="no mlp"):
        replace(SMALL, where="language.attn").requires(view, ctx)
    with pytest.raises(SelectorError):
        replace(SMALL, where="language.blocks[9]").requires(view, ctx)
    path = mlp_of(view.parts["language"][2]).down
    view.grids[path] = Grid(4, -1, True, torch.ones(32, 1), None)
    with pytest.raises(Unmet, match="quantized already") as caught:
        SMALL.requires(view, ctx)
    assert caught.value.where == path
    del view.grids[path]
    with pytest.raises(Unmet, match="fit samples"):
        SMALL.requires(view, context(view))
    replace(SMALL, importance="magnitude").requires(view, context(view))


def test_an_anatomy_that_forgets_a_consumer_is_caught_by_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from svlm.passes.prune import _groups, _plan

    model, batch = zoo.build("llava")
    view = view_of(model)
    honest = _groups.mlp_group

    def forgetful(mlp: Any, chosen: Any) -> Any:
        return {k: v for k, v in honest(mlp, chosen).items() if k[0] != mlp.gate}

    before = [p.shape for p in model.parameters()]
    monkeypatch.setattr(_plan, "mlp_group", forgetful)
    with pytest.raises(WorkFailed, match="disagree"):
        SMALL.apply(view, context(view, batch))
    assert [p.shape for p in model.parameters()] == before


@pytest.mark.parametrize(
    "settings", [{"ratio": 0.0}, {"ratio": 1.0}, {"multiple": 0}, {"what": ()}, {"what": ("mlp", "mlp")}]
)
def test_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Structured(**settings)


def test_the_ladder_halves_the_ratio() -> None:
    ratios, step = [], Structured(ratio=0.4)
    while (milder := step.weaker()) is not None:
        ratios.append(milder.ratio)
        step = milder
    assert ratios == [0.2, 0.1, 0.05]
