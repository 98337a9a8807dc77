"""The walk: exact for every family, sees what the body changed, survives a kill bit for bit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from svlm.calib.replay import relays
from svlm.calib.stats import AbsMax, Hessian, MeanSquare
from svlm.calib.walk import Walk
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.errors import WorkFailed
from svlm.compress.families import Family
from svlm.compress.unknown import draft_row
from tests import zoo

everywhere = pytest.mark.parametrize("family", zoo.FAMILIES)
BATCHES = 2


def batches(family: str) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(family, samples=2, seed=0), zoo.batch(family, samples=3, seed=1)][:BATCHES]


def every_part(view: ModelView) -> list[str]:
    return [part for part, units in view.parts.items() if any(unit.linears for unit in units)]


def logits(view: ModelView, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return view.model(**batch, use_cache=False).logits


def replayed(walk: Walk) -> list[torch.Tensor]:
    return [walk.replay(i).logits for i in range(len(walk.batches))]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def untouched(model: nn.Module) -> bool:
    return not any("forward" in module.__dict__ for module in model.modules())


# ------------------------------------------------------------------------------------------------------------ exactness


@everywhere
def test_an_empty_walk_reproduces_the_models_own_forward(family: str) -> None:
    view, data = view_of(zoo.model(family)), batches(family)
    wanted = [logits(view, batch) for batch in data]
    walk = Walk(view, data, every_part(view))
    visited = []
    for unit in walk:
        visited.append(unit.name)
        assert same(replayed(walk), wanted), f"before {unit.name}"
    assert same(replayed(walk), wanted)
    assert visited == [unit.name for unit in view.units if unit.linears] == list(walk.notes)
    assert len(walk) == len(visited) and untouched(view.model)


@everywhere
def test_what_the_body_changes_is_seen_by_all_later_units(family: str) -> None:
    view, data = view_of(zoo.model(family)), batches(family)
    before = [logits(view, batch) for batch in data]
    # a tied head is also the embedding that everything before it has already seen
    walk = Walk(view, data, [part for part in every_part(view) if part != "head" or not view.tied_embeddings])
    for unit in walk:
        assert same(replayed(walk), [logits(view, batch) for batch in data]), f"before {unit.name}"
        with torch.no_grad():
            for ref in unit.linears:
                ref.module.weight.mul_(0.9)
    assert same(replayed(walk), [logits(view, batch) for batch in data])
    assert not same(replayed(walk), before)


@everywhere
def test_inputs_are_those_of_the_model_and_outputs_those_of_the_unit(family: str) -> None:
    """Starting in the middle: what comes before is passed through as one."""
    view, data = view_of(zoo.model(family)), batches(family)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        ref.module.register_forward_pre_hook(lambda _m, args, path=ref.path: seen.setdefault(path, []).append(args[0]))
        for ref in view.linears("language")
    ]
    for batch in data:
        logits(view, batch)
    for handle in handles:
        handle.remove()
    visited = []
    for unit in Walk(view, data, "language"):
        visited.append(unit.name)
        for ref, stat in unit.observe(AbsMax, token_weights="uniform").items():
            weights = [torch.ones(x.shape[:-1], dtype=torch.bool) for x in seen[ref.path]]
            if ref.unit.tokens != "image" and not (ref.role in ("cross.k", "cross.v") and ref.unit.cross == "image"):
                kind = ref.unit.cross if ref.role in ("cross.k", "cross.v") else ref.unit.tokens
                weights = [~view.token_masks(batch, kind).padding for batch in data]
            rows = torch.cat([x.reshape(*w.shape, -1)[w] for x, w in zip(seen[ref.path], weights)])
            assert torch.equal(stat.value, rows.abs().amax(0)), ref.path
        calls = list(unit.inputs())
        assert len(calls) == len(list(unit.outputs())) == len(data)
        assert not any(tensor.requires_grad for tensor in _tensors(calls))
    assert visited == [unit.name for unit in view.parts["language"]]


def _tensors(tree: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_a_drafted_row_walks_exactly() -> None:
    model, data = zoo.model("llava"), batches("llava")
    view = view_of(model, rows=[Family.from_json(draft_row(model))])
    walk = Walk(view, data, every_part(view))
    for unit in walk:
        with torch.no_grad():
            unit.linears[0].module.weight.mul_(0.9)
    assert same(replayed(walk), [logits(view, batch) for batch in data])


def test_text_only_batches_between_images() -> None:
    view = view_of(zoo.model("llava"))
    text = zoo.text_batch(0, 2, torch.Generator().manual_seed(3))
    data = [text, zoo.batch("llava"), text]
    walk = Walk(view, data, ["vision", "connector", "language"])
    for unit in walk:
        assert len(list(unit.inputs())) == (3 if unit.part == "language" else 1)
        with torch.no_grad():
            unit.linears[0].module.weight.mul_(0.9)
    assert same(replayed(walk), [logits(view, batch) for batch in data])


def test_no_sample_reaches_the_vision_tower() -> None:
    view = view_of(zoo.model("llava"))
    text = zoo.text_batch(0, 2, torch.Generator().manual_seed(3))
    with pytest.raises(WorkFailed, match="no sample reaches"):
        next(iter(Walk(view, [text], "vision")))
    assert untouched(view.model)


def test_hooks_on_blocks_run_once_a_forward() -> None:
    """A pass may have put hooks on a block; replays keep them in force and do not apply them twice."""
    view, data = view_of(zoo.model("llava")), batches("llava")
    block = view.model.model.language_model.layers[0]
    block.register_forward_hook(lambda _m, _a, out: out * 1.5)
    wanted = [logits(view, batch) for batch in data]
    walk = Walk(view, data, "language")
    for _ in walk:
        assert same(replayed(walk), wanted)


def test_fewer_visual_tokens_in_the_language_model() -> None:
    from svlm.compress.runtime.images import Choice
    from svlm.compress.runtime.reduce import Reduction, install

    view, data = view_of(zoo.model("llava")), batches("llava")

    def longest(images: Any, k: int) -> Choice:
        return Choice(images.features.norm(dim=-1).topk(k).indices.sort().values)

    chosen = Reduction(longest, 0.25, zoo.IMAGE, {"name": "norm"})
    install(view.model, view.decoder_path, chosen)
    wanted = [logits(view, batch) for batch in data]
    walk = Walk(view, data, every_part(view))
    for unit in walk:
        for mode in ("balanced", "uniform", "text"):
            stats = unit.observe(Hessian, token_weights=mode)
            if unit.name in ("language.blocks[1]", "head"):
                masks = [view.token_masks(batch) for batch in data]
                kept = sum(int(m.text.sum()) for m in masks)
                kept += sum(sum(view.visual_tokens(batch)) for batch in data) if mode != "text" else 0
                assert {stat.tokens for stat in stats.values()} == {kept}
    assert same(replayed(walk), wanted)


# ----------------------------------------------------------------------------------------------------------- efficiency


def test_the_work_grows_with_the_units_not_with_their_square() -> None:
    view, data = view_of(zoo.model("llava")), batches("llava")
    counts: dict[str, int] = {}

    def counting(name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return forward(*args, **kwargs)

        return run

    for unit in view.units:
        mlp = [ref.module for ref in unit.linears if ref.role == "mlp.down"]
        for module in mlp:
            module.forward = counting(unit.name, module.forward)  # type: ignore[method-assign]
    for unit in Walk(view, data, ["vision", "connector", "language"]):
        unit.observe(Hessian)
    last = counts.pop("language.blocks[2]")
    # the probe's one forward, and one run a batch after the body; observing stops before the last linear
    assert counts.pop("connector") == 1 + (1 + BATCHES) + 1, "its batches run together, after a try beside them apart"
    assert set(counts.values()) == {1 + BATCHES} and last <= 1 + BATCHES


def test_a_block_hands_its_arguments_on_where_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself runs for the first block alone; how many blocks later it runs no more, and a mask is seen."""
    runs = []
    whole = Walk._forward
    monkeypatch.setattr(Walk, "_forward", lambda self, batch: runs.append(1) or whole(self, batch))
    data = batches("smolvlm")
    after = [len(runs) for _ in Walk(view_of(zoo.model("smolvlm")), data, "language")]
    assert len(after) == 3 and after[0] == after[-1]
    x, y, mask = torch.ones(2), torch.ones(2), torch.ones(1)
    assert relays(((x,), {"mask": mask}), (y, None), ((y,), {"mask": mask}))
    for changed in (((y,), {"mask": mask.clone()}), ((y.clone(),), {"mask": mask}), ((y,), {}), ((), {"mask": mask})):
        assert not relays(((x,), {"mask": mask}), (y, None), changed)


def test_memory_is_let_go() -> None:
    view, data = view_of(zoo.model("qwen2-vl")), batches("qwen2-vl")
    walk = Walk(view, data, ["vision", "connector", "language"])
    for unit in walk:
        real = [path for path, memo in walk._memos.items() if any(t.stride() != (0,) * t.ndim for t in _tensors(memo))]
        assert len(real) <= 2, f"{unit.name}: only the last block and the finished tower are kept, not {real}"


@pytest.mark.parametrize(("family", "kept"), [("llava", False), ("smolvlm", False), ("blip-2", True)])
def test_a_tower_that_only_the_connector_reads_is_let_go_with_it(family: str, kept: bool) -> None:
    view, data = view_of(zoo.model(family)), batches(family)
    wanted = [logits(view, batch) for batch in data]
    walk = Walk(view, data, ["connector", "language"])
    held = {}
    for unit in walk:
        memo = walk._memos.get(view.tower_path)
        held[unit.part] = memo is not None and any(t.stride() != (0,) * t.ndim for t in _tensors(memo))
    assert held == {"connector": True, "language": kept} and same(replayed(walk), wanted)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_progress_and_gradients_outside() -> None:
    class Told:
        def __init__(self) -> None:
            self.lines: list[str] = []

        def start(self, what: str, total: int) -> None:
            self.lines.append(f"{what} {total}")

        def step(self, n: int = 1, note: str = "") -> None:
            self.lines.append(note)

        def done(self) -> None:
            self.lines.append("done")

    view, told = view_of(zoo.model("llava")), Told()
    view.model.train()
    for unit in Walk(view, batches("llava"), "language", name="hessians", progress=told):
        assert torch.is_grad_enabled() and view.model.training, "the body has its own mode"
        unit.observe(MeanSquare)
    assert told.lines == ["hessians 3", *(f"language.blocks[{i}]" for i in range(3)), "done"]


def test_a_unit_that_is_called_twice_in_a_forward() -> None:
    """The second arrival counts too: two calls a batch are caught, and both are remembered."""
    view, data = view_of(zoo.model("llava")), batches("llava")
    get_image_features = view.model.model.get_image_features

    def twice(*args: Any, **kwargs: Any) -> Any:
        get_image_features(*args, **{**kwargs, "pixel_values": kwargs["pixel_values"] + 1})
        return get_image_features(*args, **kwargs)

    view.model.model.get_image_features = twice
    wanted = [logits(view, batch) for batch in data]
    walk = Walk(view, data, every_part(view))
    for unit in walk:
        assert len(list(unit.inputs())) == (4 if unit.part in ("vision", "connector") else 2)
        assert same(replayed(walk), wanted), unit.name
    assert same(replayed(walk), wanted)


def test_every_second_of_a_walk_belongs_to_one_kind_of_work(tmp_path: Path) -> None:
    view = view_of(zoo.model("llava"))
    seconds: dict[str, float] = {}
    walk = Walk(view, [zoo.batch("llava", samples=2)], "language", scratch=tmp_path, seconds=seconds)
    began = time.perf_counter()
    for unit in walk:
        unit.observe(Hessian, token_weights="gradient")
        time.sleep(0.05)
    spent = time.perf_counter() - began
    assert set(seconds) == {"forward", "statistics", "balance", "solve", "write"}
    assert min(seconds.values()) > 0 and seconds["solve"] >= 0.15 and sum(seconds.values()) <= spent
    assert sum(seconds.values()) > 0.5 * spent
