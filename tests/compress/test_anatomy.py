"""Anatomy: every claim of a family's row and of its blocks' layouts, held against a real forward of a tiny model."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.errors import SelectorError
from svlm.compress.inspect import inspect_table
from tests import zoo

everywhere = pytest.mark.parametrize("family", zoo.FAMILIES)
PARTS = {"vision", "connector", "language", "head"}
WITHOUT_CONNECTOR = {"trocr", "donut"}
ENCODER_DECODER = {"trocr", "donut", "florence-2", "blip-2-t5"}


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


# ---------------------------------------------------------------------------------------------------------- the parts


@everywhere
def test_parts_are_found_and_every_linear_is_reached_exactly_once(family: str) -> None:
    model = zoo.model(family)
    view = view_of(model)
    assert set(view.parts) == PARTS - ({"connector"} if family in WITHOUT_CONNECTOR else set())
    assert isinstance(view.tower, nn.Module) and view.decoder is model.get_submodule(view.decoder_path)
    reached = [ref.path for unit in view.units for ref in unit.linears]
    assert len(reached) == len(set(reached))
    ignored = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in reached:
            assert any(fnmatchcase(name, pattern) for pattern in view.family.ignored), name
            ignored.add(name)
    for ref in view.linears(list(view.parts) if family != "gemma3" else ["vision", "language", "head"]):
        assert ref.module is model.get_submodule(ref.path) and ref in ref.unit.stages[ref.stage]
    # what is ignored does not matter to the language model
    batch = zoo.batch(family)
    before = logits(model, batch)
    with torch.no_grad():
        for name in ignored:
            model.get_submodule(name).weight.add_(1.0)
    assert torch.equal(logits(model, batch), before)
    assert bool(ignored) == (family in {"llava-onevision", "trocr"})


@everywhere
def test_every_linear_of_a_unit_matters(family: str) -> None:
    """The unit's linears feed the logits: none is listed that the forward leaves aside."""
    model, batch = zoo.build(family)
    view = view_of(model)
    model(**batch, use_cache=False).logits.square().sum().backward()
    unused = {ref.path for ref in view.linears("*.*") if ref.module.weight.grad is None}
    # LLaVA reads the second last vision layer: the last one runs, and its output goes nowhere
    last = {p for p in unused if family in {"llava", "llava-next"} and ".layers.2." in p and "vision_tower" in p}
    assert unused == last


@everywhere
def test_layouts_agree_with_a_trace(family: str) -> None:
    """Linears of a stage get the same tensor; stages run in order, each linear once; a stage's norm makes its input."""
    model, batch = zoo.build(family)
    view = view_of(model)
    order: list[str] = []
    inputs: dict[str, torch.Tensor] = {}
    normed: dict[str, torch.Tensor] = {}
    refs = {ref.path: ref for unit in view.units for ref in unit.linears}

    def note(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            order.append(path)
            inputs[path] = args[0]

        return hook

    def note_norm(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: torch.Tensor) -> None:
            normed[path] = out

        return hook

    handles = [ref.module.register_forward_pre_hook(note(path)) for path, ref in refs.items()]
    norms = {ref.norm for ref in refs.values() if ref.norm}
    handles += [model.get_submodule(path).register_forward_hook(note_norm(path)) for path in norms]
    logits(model, batch)
    for handle in handles:
        handle.remove()
    assert sorted(order) == sorted(refs), "each linear is called exactly once"
    for unit in view.units:
        stages = [refs[path].stage for path in order if refs[path].unit is unit]
        assert all(a <= b for a, b in pairwise(stages)), unit.name
        for stage in unit.stages:
            first = inputs[stage[0].path]
            assert all(inputs[ref.path] is first for ref in stage), stage
            for ref in stage:
                if ref.norm:
                    out = normed[ref.norm]  # or a view of it
                    assert out.data_ptr() == first.data_ptr() and out.shape == first.shape, ref
        leads = [inputs[stage[0].path] for stage in unit.stages]
        assert len({id(x) for x in leads}) == len(leads), f"{unit.name}: two stages share one input"


@everywhere
def test_units_run_in_forward_order(family: str) -> None:
    """A unit never needs a later one: changing unit k leaves the inputs of all units before it as they were."""
    model, batch = zoo.build(family)
    view = view_of(model)
    probe = view.units[len(view.units) // 2]
    if not probe.linears:
        probe = view.units[view.units.index(probe) + 1]
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Any:
        return lambda _module, args, kwargs: seen.setdefault(name, []).append(
            next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
        )

    for unit in view.units:
        unit.module.register_forward_pre_hook(note(unit.name), with_kwargs=True)
    logits(model, batch)
    with torch.no_grad():
        for ref in probe.linears:
            ref.module.weight.mul_(1.5)
    logits(model, batch)
    for unit in view.units[: view.units.index(probe) + 1]:
        first, second = seen[unit.name]
        assert torch.equal(first, second), unit.name
    changed = [u for u in view.units if not torch.equal(*seen[u.name])]
    assert changed and view.units[-1] in changed


@everywhere
def test_geometry(family: str) -> None:
    view = view_of(zoo.model(family))
    language = view.parts["language"]
    assert all(unit.attention and unit.mlp for unit in language)
    for unit in view.units:
        for kind, geometry in (("attn", unit.attention), ("cross", unit.cross_attention)):
            if geometry is None:
                continue
            parts = [part for part in ("q", "k", "v", "qkv") if getattr(geometry, part)]
            sizes = {part: view.linear(getattr(geometry, part)).module for part in parts}
            heads, width = geometry.n_heads, geometry.head_dim
            assert view.linear(geometry.o).module.in_features == heads * width
            assert view.linear(geometry.o).role == f"{kind}.o"
            if geometry.qkv:
                assert sizes["qkv"].out_features == (heads + 2 * geometry.n_kv_heads) * width
            else:
                assert sizes["q"].out_features == heads * width
                assert sizes["k"].out_features == sizes["v"].out_features == geometry.n_kv_heads * width
            assert view.model.get_submodule(geometry.module)
        if unit.mlp is not None:
            assert view.linear(unit.mlp.up).module.out_features == unit.mlp.width
            assert view.linear(unit.mlp.down).module.in_features == unit.mlp.width
    attention = language[0].attention
    assert attention is not None
    grouped = family not in ENCODER_DECODER | {"blip-2"}
    assert (attention.n_heads, attention.n_kv_heads) == ((4, 2) if grouped else (4, 4))
    assert attention.rotary is grouped
    crossing = [unit.name for unit in view.units if unit.cross_attention]
    assert bool(crossing) == (family in ENCODER_DECODER | {"blip-2"})


@everywhere
def test_smoothing_pairs_keep_the_function(family: str) -> None:
    """Divide what leaves the first of a pair and multiply what enters the others: the logits stay."""
    model, batch = zoo.build(family)
    view = view_of(model)
    before = logits(model, batch)
    pairs = [pair for unit in view.units for pair in view.smoothing_pairs(unit)]
    assert pairs
    with torch.no_grad():
        for source, targets in pairs:
            module = model.get_submodule(source)
            width = view.linear(targets[0]).module.in_features
            scale = torch.rand(width) + 0.5
            if isinstance(module, nn.Linear):
                module.weight.div_(scale[:, None])
            elif "Gemma" in type(module).__name__:  # its weight is an offset from 1
                module.weight.copy_((1 + module.weight) / scale - 1)
            else:
                module.weight.div_(scale)
            if getattr(module, "bias", None) is not None:
                module.bias.div_(scale)
            for path in targets:
                view.linear(path).module.weight.mul_(scale)
    after = logits(model, batch)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- the tokens


@everywhere
def test_token_masks(family: str) -> None:
    model, batch = zoo.build(family)
    view = view_of(model)
    masks = view.token_masks(batch)
    assert logits(model, batch).shape[:2] == masks.text.shape, "masks are of the tokens that the logits belong to"
    assert not (masks.vision & masks.text).any() and not (masks.padding & (masks.vision | masks.text)).any()
    assert (masks.vision | masks.text | masks.padding).all()
    assert (masks.answer & ~masks.text).sum() == 0
    assert torch.equal(masks.answer, batch["labels"] != -100)
    counts = view.visual_tokens(batch)
    if family in ENCODER_DECODER:
        assert not masks.vision.any() and masks.padding.tolist()[0][-1] and view.family.seq2seq
    else:
        assert masks.vision.sum(1).tolist() == counts
        assert masks.padding.sum(1).tolist() == [0, 1] and masks.padding[1, 0], "padding is on the left"
    if "input_ids" in batch:
        prompt = view.token_masks(batch, "prompt")
        assert torch.equal(prompt.vision, batch["input_ids"] == zoo.IMAGE)
        assert view.image_token_id == zoo.IMAGE
    else:
        assert view.image_token_id is None
    assert counts[0] > 0 and view.per_image() in (None, counts[0])


def test_padding_that_looks_like_an_image_is_padding() -> None:
    view = view_of(zoo.model("llava"))
    ids = torch.tensor([[zoo.IMAGE, 5, zoo.IMAGE, 7]])
    masks = view.token_masks({"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1]])})
    assert masks.vision.tolist() == [[False, False, True, False]]
    assert masks.padding.tolist() == [[True, False, False, False]] and not masks.answer.any()


def test_visual_tokens_after_a_token_pass() -> None:
    from svlm.compress.runtime.images import Choice
    from svlm.compress.runtime.reduce import Reduction, install

    view = view_of(zoo.model("llava"))
    chosen = Reduction(lambda images, k: Choice(images.same(torch.arange(k))), 0.25, zoo.IMAGE, {"name": "first"})
    install(view.model, view.decoder_path, chosen)
    assert view.visual_tokens(zoo.batch("llava")) == [4, 4]


# ------------------------------------------------------------------------------------------------------- the selectors


@pytest.fixture(scope="module")
def llava() -> ModelView:
    return view_of(zoo.model("llava"))


@pytest.mark.parametrize(
    ("where", "count"),
    [
        (None, 18 + 2 + 21),
        ("vision", 18),
        (["vision", "head"], 19),
        ("language.blocks[1:]", 14),
        ("language.blocks[0,2].attn", 8),
        ("language.blocks[-1].mlp", 3),
        ("language.mlp", 9),
        ("language.mlp.down", 3),
        ("vision.attn.q", 3),
        ("connector", 2),
        ("*.language_model.layers.*.mlp.*", 9),
        (["language.attn.q", "language.attn"], 12),
    ],
)
def test_selectors(llava: ModelView, where: Any, count: int) -> None:
    found = llava.linears(where)
    assert len(found) == count == len({ref.path for ref in found})
    order = [ref.path for unit in llava.units for ref in unit.linears]
    assert [ref.path for ref in found] == sorted((ref.path for ref in found), key=order.index)
    assert set(llava.select(where)) == {ref.unit for ref in found}


@pytest.mark.parametrize(
    "where",
    ["langauge", "language.blocks[7]", "vision.blocks[x]", "language.blocks[9:]", "head.attn", "*.nothing", "a b", []],
)
def test_a_selector_that_matches_nothing_says_what_there_is(llava: ModelView, where: Any) -> None:
    with pytest.raises(SelectorError) as error:
        llava.linears(where)
    assert "blocks" in str(error.value)


def test_units_by_name() -> None:
    view = view_of(zoo.model("qwen3-vl"))
    assert [ref.path for ref in view.linears("connector.merger")] == [
        "model.visual.merger.linear_fc1",
        "model.visual.merger.linear_fc2",
    ]
    assert len(view.linears("connector.blocks[0]")) == 2 and len(view.linears("connector")) == 6
    with pytest.raises(SelectorError):
        view.linear("model.visual.nowhere")


# --------------------------------------------------------------------------------------------------------- and the rest


def test_refresh_sees_new_shapes_and_modules() -> None:
    model = zoo.model("llava")
    view = view_of(model)
    old = view.linear("model.language_model.layers.0.mlp.up_proj")
    mlp = model.model.language_model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(16, 32)
    view.refresh()
    new = view.linear(old.path)
    assert new.module is mlp.up_proj and old.module is not mlp.up_proj
    assert new.unit.mlp is not None and new.unit.mlp.width == 16
    assert view.units[5].mlp is not None and view.units[5].mlp.width == 48


def test_tied_embeddings() -> None:
    assert not view_of(zoo.model("llava")).tied_embeddings
    assert view_of(zoo.model("paligemma")).tied_embeddings


@everywhere
def test_inspect_table(family: str) -> None:
    model, batch = zoo.build(family)
    view = view_of(model)
    view.storage_dtype = torch.bfloat16
    table = inspect_table(view, batch)
    assert json.loads(json.dumps(table)) == table
    assert table["parameters"] == sum(p.numel() for p in model.parameters())
    assert table["bytes"] == 2 * table["parameters"] == sum(part["bytes"] for part in table["parts"].values())
    assert table["visual_tokens"] == view.visual_tokens(batch)[0]
    assert {name: row["blocks"] for name, row in table["parts"].items() if row["blocks"]} == {
        part: n for part, units in view.parts.items() if (n := sum(u.index is not None for u in units))
    }
    assert table["tied_embeddings"] is view.tied_embeddings and table["smoothing_pairs"] > 0
    assert bool(table["ignored"]) == (family in {"llava-onevision", "trocr"})
    assert table["norms"] >= 10 and table["parts"]["language"]["heads"] in ("4", "4/2")
