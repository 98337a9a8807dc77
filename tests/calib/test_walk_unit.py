"""One unit in the hands of a pass: statistics of its linears' inputs, what it remembers, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from svlm.calib.stats import Hessian, MeanSquare, modality_weights
from svlm.calib.walk import Walk
from svlm.compress.anatomy import LinearRef, ModelView, view_of
from svlm.compress.errors import SelectorError, WorkFailed
from tests import zoo

from .test_walk import batches, every_part, everywhere, logits, replayed, same, untouched


@pytest.mark.parametrize("mode", ["balanced", "uniform", "text"])
def test_observed_hessians_are_those_of_the_naive_loop(mode: Any) -> None:
    view, data = view_of(zoo.model("llava")), batches("llava")
    walk = Walk(view, data, ["vision.blocks[1]", "language.blocks[1]"])
    for unit in walk:
        found = unit.observe(lambda: Hessian(torch.float64), token_weights=mode)
        wanted = {ref: naive_hessian(view, ref, data, mode) for ref in unit.linears}
        assert set(found) == set(wanted)
        for ref, stat in found.items():
            torch.testing.assert_close(stat.matrix, wanted[ref], rtol=1e-9, atol=1e-9)
        by_stage = {stage: {id(found[ref]) for ref in unit.linears if ref.stage == stage} for stage in range(4)}
        assert all(len(ids) == 1 for ids in by_stage.values()) and len(set.union(*by_stage.values())) == 4
        assert untouched(view.model)


def naive_hessian(view: ModelView, ref: LinearRef, data: list[Any], mode: Any) -> torch.Tensor:
    caught: list[torch.Tensor] = []
    handle = ref.module.register_forward_pre_hook(lambda _m, args: caught.append(args[0].double()))
    total, weight = torch.zeros(ref.module.in_features, ref.module.in_features, dtype=torch.float64), 0.0
    for batch in data:
        logits(view, batch)
        x = caught.pop()
        w = torch.ones(x.shape[:2])
        if ref.unit.part == "language":
            w = modality_weights(view.token_masks(batch), mode)
        for sample in range(x.shape[0]):
            for token in range(x.shape[1]):
                total += float(w[sample, token]) * 2 * torch.outer(x[sample, token], x[sample, token])
                weight += float(w[sample, token])
    handle.remove()
    return total / weight


def test_padding_never_counts() -> None:
    view = view_of(zoo.model("llava"))
    clean, dirty = zoo.batch("llava"), zoo.batch("llava")
    dirty["input_ids"] = torch.where(dirty["attention_mask"] == 0, 77, dirty["input_ids"])
    found = []
    for batch in (clean, dirty):
        stats: dict[str, torch.Tensor] = {}
        for unit in Walk(view, [batch], "language"):
            stats |= {ref.path: stat.mean for ref, stat in unit.observe(MeanSquare).items()}
        found.append(stats)
    for path, mean in found[0].items():
        torch.testing.assert_close(found[1][path], mean, rtol=1e-6, atol=1e-9)


def test_observe_sees_the_unit_as_it_now_is() -> None:
    """True-sequential: after the first stage has changed, the second stage's inputs have changed too."""
    view, data = view_of(zoo.model("llava")), batches("llava")
    unit = next(iter(Walk(view, data, "language.blocks[0]")))
    first, *_, last = unit.stages
    before = {ref: stat.matrix for ref, stat in unit.observe(Hessian).items()}
    with torch.no_grad():
        for ref in first:
            ref.module.weight.mul_(1.3)
    after = {ref: stat.matrix for ref, stat in unit.observe(Hessian).items()}
    assert all(torch.equal(before[ref], after[ref]) for ref in first)
    assert not torch.allclose(before[last[0]], after[last[0]])
    (alone,) = unit.observe(Hessian, last).items()
    assert torch.equal(alone[1].matrix, after[last[0]])


@everywhere
def test_what_has_settled_does_not_run_again_and_nothing_else_changes(family: str) -> None:
    """Statistics and the model's answers are bit for bit those of a walk that computes everything anew."""
    data, found, logit, runs = batches(family), [], [], [0, 0]
    for settling in (0, 1):
        view = view_of(zoo.model(family))

        def count(*_: Any, settling: int = settling) -> None:
            runs[settling] += 1

        for unit in view.units:
            for ref in unit.linears:
                patch = ref.module.forward
                ref.module.__dict__["forward"] = lambda x, patch=patch, count=count: (count(), patch(x))[1]
        walk = Walk(view, data, every_part(view))
        found.append([])
        for unit in walk:
            for stage in unit.stages:
                found[-1] += [stat.mean for stat in unit.observe(MeanSquare, stage, "uniform").values()]
                with torch.no_grad():
                    for ref in stage:
                        ref.module.weight.mul_(1.1)
                if settling:
                    unit.settle(stage)
        logit.append(replayed(walk))
    assert same(*found) and same(*logit)
    assert runs[1] < runs[0]


def test_only_what_nothing_can_change_any_more_is_remembered() -> None:
    view, data = view_of(zoo.model("llava")), batches("llava")
    unit = next(iter(Walk(view, data, "language.blocks[0]")))
    attention = unit.stages[0] + unit.stages[1]
    unit.observe(Hessian)
    for settled, wanted in ((unit.stages[0], []), (unit.stages[1], ["self_attn"]), (unit.stages[2], ["self_attn"])):
        unit.settle(settled)
        assert [name for name, _ in unit._finished()] == wanted
    unit.observe(Hessian, unit.stages[-1])
    with torch.no_grad():
        for ref in attention:
            ref.module.weight.zero_()  # against what was promised: nobody looks there any more
    (kept,) = unit._remembered.values()
    assert len(kept) == len(data) and all(bool(call[0][0].any()) for call in kept)
    view.units[view.units.index(unit.unit)].module.self_attn.register_forward_hook(lambda *_: None)
    assert [name for name, _ in unit._finished()] == [], "what hooks do would be left out"


def test_selected_linears_only() -> None:
    view, data = view_of(zoo.model("llava")), batches("llava")
    for unit in Walk(view, data, ["language.blocks[1:].mlp.down", "language.attn.k"]):
        roles = [ref.role for ref in unit.linears]
        assert roles == (["attn.k"] if unit.name.endswith("[0]") else ["attn.k", "mlp.down"])
        assert [len(stage) for stage in unit.stages] == [1] * len(roles)
        assert set(unit.observe(Hessian)) == set(unit.linears)
        with pytest.raises(ValueError, match="is not in"):
            unit.observe(Hessian, [view.linear("lm_head")])
    with pytest.raises(SelectorError):
        Walk(view, data, "language.blocks[8]")


def test_a_layout_that_lists_a_linear_that_is_not_called() -> None:
    view, data = view_of(zoo.model("llava")), batches("llava")
    unit = next(iter(Walk(view, data, "language.blocks[0]")))
    mlp = unit.unit.module.mlp
    mlp.forward = lambda x: mlp.up_proj(x)[..., :32]
    with pytest.raises(WorkFailed, match="not called"):
        unit.observe(Hessian)


def test_a_block_that_writes_into_its_input_is_refused() -> None:
    view, data = view_of(zoo.model("llava")), batches("llava")
    unit = next(iter(Walk(view, data, "language.blocks[0]")))
    unit.unit.module.input_layernorm.forward = lambda x: x.add_(1)
    with pytest.raises(WorkFailed, match="in place"):
        list(unit.outputs())
