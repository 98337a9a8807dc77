"""prune.layers: what is left is the model with its blocks skipped; config, caches and layer numbers say the same."""

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

from svlm import passes
from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Context, evaluating
from svlm.compress.errors import PromiseBroken, Unmet
from svlm.compress.pipeline import apply_pass, ask_promises
from svlm.compress.preflight import needs_all_blocks
from svlm.compress.recipe import Recipe
from svlm.passes.prune.layers import FILE, Layers
from svlm.passes.quantize.rtn import RTN
from tests import zoo

RANDOM = Layers(criterion="random")
QUICK = ("llava", "gemma3", "qwen2.5-vl", "florence-2", "blip-2-t5")  # of the vision towers
CASES = [
    pytest.param(family, part, marks=pytest.mark.slow if part == "vision" and family not in QUICK else ())
    for family in zoo.FAMILIES
    for part in ("vision", "language")
]


def context(
    view: ModelView, teacher: ModelView, *batches: Mapping[str, Tensor], scratch: Path | None = None
) -> Context:
    @contextmanager
    def lend() -> Any:
        with evaluating(teacher.model):
            yield teacher

    return Context(
        batches, lambda where=None, **o: Walk(view, batches, where, scratch=scratch, **o), lend, 0, scratch=scratch
    )


def both(family: str) -> tuple[ModelView, ModelView, dict[str, Tensor]]:
    """The original, a copy to prune, a batch."""
    model, batch = zoo.build(family)
    return view_of(copy.deepcopy(model)), view_of(model), batch


def logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def skipped(view: ModelView, names: list[str], batch: Mapping[str, Tensor]) -> Tensor:
    """Logits with these blocks returning what they are given."""
    before = {}
    for unit in view.units:
        if unit.name in names:
            before[unit.module] = unit.module.forward
            unit.module.forward = _idle(unit.module.forward)
    try:
        return logits(view.model, batch)
    finally:
        for module in before:
            del module.__dict__["forward"]


def _idle(forward: Any) -> Any:
    def idle(*args: Any, **named: Any) -> Any:
        given, out = args[0] if args else named["hidden_states"], forward(*args, **named)
        return (given, *out[1:]) if isinstance(out, tuple) else given

    return idle


def make_idle(view: ModelView, name: str) -> None:
    """The block adds nothing to what it is given."""
    (unit,) = (unit for unit in view.units if unit.name == name)
    for ref in unit.linears:
        if ref.role in ("attn.o", "mlp.down"):
            ref.module.weight.data.zero_()
            if ref.module.bias is not None:
                ref.module.bias.data.zero_()


@pytest.mark.parametrize(("family", "part"), CASES)
def test_stock_transformers_loads_what_is_left(family: str, part: str, tmp_path: Path) -> None:
    original, view, batch = both(family)
    step = replace(RANDOM, where=(part,))
    try:
        notes = apply_pass(step, view, context(view, original, batch))
    except Unmet as error:
        assert (family, part) in {("florence-2", "vision"), ("donut", "vision"), ("blip-2-t5", "language")}, error
        return
    assert notes.numbers["parameters"] < notes.numbers["parameters_before"]
    ((path, (was, now)),) = notes.numbers["blocks"].items()
    assert now == was - 1 == len(view.model.get_submodule(path))
    view.model.save_pretrained(tmp_path)
    again, info = tf.AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again, batch), logits(view.model, batch))
    if family in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl"):  # their generate wants the processor's other tensors as well
        return
    given = {k: v for k, v in batch.items() if k != "labels"}
    for use_cache in (True, False):
        answers = [
            m.generate(**given, max_new_tokens=4, do_sample=False, use_cache=use_cache) for m in (view.model, again)
        ]
        assert torch.equal(*answers)
        if use_cache:
            cached = answers[0]
        else:
            assert torch.equal(cached, answers[0]), "layer numbers of the cache"


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2.5-vl", "trocr"])
@pytest.mark.parametrize("part", ["vision", "language"])
def test_it_is_the_model_with_the_block_skipped(family: str, part: str) -> None:
    original, view, batch = both(family)
    notes = apply_pass(replace(RANDOM, where=(part,)), view, context(view, original, batch))
    wanted = skipped(original, notes.numbers["removed"], batch)
    torch.testing.assert_close(logits(view.model, batch), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("criterion", ["kl", "influence"])
@pytest.mark.parametrize("name", ["language.blocks[1]", "vision.blocks[0]"])
def test_a_block_that_does_nothing_goes_first(criterion: Any, name: str) -> None:
    original, view, batch = both("llava")
    for one in (original, view):
        make_idle(one, name)
    wanted = logits(original.model, batch)
    step = Layers(criterion=criterion, where=(name.split(".")[0],))
    notes = apply_pass(step, view, context(view, original, batch))
    # LLaVA reads the state before the last vision block, which does nothing to the answers either
    assert notes.numbers["removed"] in ([name], ["vision.blocks[2]"] if criterion == "kl" else [name])
    torch.testing.assert_close(logits(view.model, batch), wanted, rtol=1e-5, atol=1e-6)


def test_greedy_is_a_brute_force_search_step_by_step(tmp_path: Path) -> None:
    original, view, batch = both("smolvlm")
    where = ("language", "vision")
    p = logits(original.model, batch)[:, :-1].log_softmax(-1)
    mask = batch["labels"][:, 1:] != -100

    def lost(names: list[str]) -> float:
        q = skipped(original, names, batch)[:, :-1].log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1)[mask].mean())

    removed: list[str] = []
    for _ in range(3):
        left = [u.name for u in original.select(where) if u.name not in removed and u.index is not None]
        left = [n for n in left if sum(m.split(".")[0] == n.split(".")[0] for m in left) > 1]
        removed.append(min(left, key=lambda name: lost([*removed, name])))
    notes = apply_pass(Layers(count=3, where=where), view, context(view, original, batch, scratch=tmp_path))
    assert notes.numbers["removed"] == removed
    for i, scores in enumerate(notes.numbers["kl"]):
        assert scores[removed[i]] == pytest.approx(lost(removed[: i + 1]), rel=1e-3)
    assert [row["removed"] for row in json.loads((tmp_path / FILE).read_text())] == removed


def test_rounds_that_are_done_are_not_measured_again(tmp_path: Path) -> None:
    original, calm, batch = both("llava")
    wanted = apply_pass(Layers(count=2), calm, context(calm, original, batch))
    _, view, _ = both("llava")
    rows = [{"removed": wanted.numbers["removed"][0], "scores": wanted.numbers["kl"][0]}]
    (tmp_path / FILE).write_text(json.dumps(rows))
    assert apply_pass(Layers(count=2), view, context(view, original, batch, scratch=tmp_path)) == wanted


def test_deep_stack_keeps_the_blocks_that_it_reads() -> None:
    original, view, batch = both("qwen3-vl")
    notes = apply_pass(replace(RANDOM, where=("vision",)), view, context(view, original, batch))
    assert set(notes.numbers["stay"]) == {"vision.blocks[0]", "vision.blocks[1]"}
    assert view.model.config.vision_config.deepstack_visual_indexes == [0, 1]
    original, view, batch = both("qwen2.5-vl")
    removed = []
    while view.model.config.vision_config.depth > 1:
        removed += apply_pass(replace(RANDOM, where=("vision",)), view, context(view, original, batch)).numbers[
            "removed"
        ]
    assert view.model.config.vision_config.fullatt_block_indexes == [0], removed


def test_twice_the_kept_blocks_are_counted_from_the_start() -> None:
    original, view, batch = both("llava")
    gone = []
    for _ in range(2):
        step = Layers()
        names = apply_pass(step, view, context(view, original, batch)).numbers["removed"]
        left = [i for i in range(3) if i not in gone]
        gone.append(left[int(names[0][-2])])
    kept = [i for i in range(3) if i not in gone]
    assert view.ledger.record_of(Layers())["kept"]["language"] == kept
    block = view.model.model.language_model.layers[0]
    first = original.model.model.language_model.layers[kept[0]]
    assert torch.equal(block.mlp.up_proj.weight, first.mlp.up_proj.weight)
    assert block.self_attn.layer_idx == 0
    with pytest.raises(Unmet, match="last one"):
        Layers().requires(view, context(view, original, batch))


def test_what_is_known_by_path_follows(tmp_path: Path) -> None:
    """Quantized blocks keep their grids under their new numbers, in the ledger and on disk."""
    original, view, batch = both("llava")
    view.storage_dtype = torch.bfloat16
    storage.round_to_storage(view)
    ctx = context(view, original, batch)
    rtn = RTN(bits=4, group=-1, where=("language.blocks[2]",), search="none")
    apply_pass(rtn, view, ctx)
    apply_pass(Layers(criterion="influence", where=("language.blocks[0]",)), view, ctx)
    ask_promises(view, passes.find)
    assert {path.split(".layers.")[1].split(".")[0] for path in view.grids} == {"1"}
    storage.save(view, tmp_path / "m")
    again = storage.load_model(tmp_path / "m", find=passes.find)
    assert (
        torch.equal(logits(again.model, batch), logits(view.model, batch)) and again.grids.keys() == view.grids.keys()
    )


def test_refusals_and_the_promise() -> None:
    original, view, batch = both("llava")
    ctx = context(view, original, batch)
    with pytest.raises(Unmet, match="cannot remove 4"):
        Layers(count=4).requires(view, ctx)
    with pytest.raises(Unmet, match="needs fit samples"):
        Layers().requires(view, context(view, original))
    with pytest.raises(ValueError, match="count"):
        Layers(count=0)
    with pytest.raises(Unmet, match="cannot remove 1"):
        Layers(where=("connector",)).requires(view, ctx)
    assert Layers(count=2).weaker() == Layers() and Layers().weaker() is None
    step = Layers()
    apply_pass(step, view, ctx)
    layers = view.model.model.language_model.layers
    layers.append(copy.deepcopy(layers[0]))
    with pytest.raises(PromiseBroken, match="3, at most 2"):
        step.ensures(view)


def test_a_rehearsal_has_all_the_blocks_where_two_would_not_do() -> None:
    for row in (
        {"prune.layers": {}},
        {"quantize.rtn": {"where": "*.layers.3.*"}},
        {"quantize.rtn": {"where": "vision.blocks[3]"}},
    ):
        assert needs_all_blocks(Recipe.from_json({"passes": [{"repeat": {"times": 2, "passes": [row]}}]}, passes.find))
    assert not needs_all_blocks(Recipe.from_json({"passes": ["quantize.gptq", "prune.structured"]}, passes.find))
