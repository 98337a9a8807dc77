"""quantize.round and quantize.hqq on tiny models: what they refuse, count, promise, and keep across a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from svlm.calib.walk import Walk
from svlm.compress.anatomy import ModelView
from svlm.compress.base import Pass
from svlm.compress.errors import PromiseBroken, Unmet
from svlm.compress.pipeline import apply_pass
from svlm.compress.runtime.grid import on_grid
from svlm.passes.quantize import _round
from svlm.passes.quantize._parts import first, parts_of
from svlm.passes.quantize._round import descend
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.quantize.hqq import HQQ
from svlm.passes.quantize.round import Round
from svlm.passes.quantize.rtn import RTN
from tests import zoo
from tests.passes.quantize.helpers import ALL, batches, check_resumes, context, fresh, run, weights

QUICK = {"bits": 3, "group": 8, "steps": 20, "batch_size": 3}


def test_settings_that_no_model_could_take() -> None:
    for bad in (
        {"bits": 5},
        {"group": 0},
        {"bits": 8, "symmetric": False},
        {"steps": 0},
        {"batch_size": 0},
        {"rate": 0.0},
    ):
        with pytest.raises(ValueError, match=r"bits|group|steps|batch_size|rate"):
            Round(**bad)
    for wrong in ({"bits": 8}, {"norm": 1.0}, {"norm": 0.0}, {"iterations": 0}, {"beta": 0.0}, {"kappa": 0.9}):
        with pytest.raises(ValueError, match=r"bits|norm|iterations|beta"):
            HQQ(**wrong)


@pytest.mark.parametrize("step", [Round(group=16), HQQ(group=16)], ids=["round", "hqq"])
def test_what_is_refused_before_a_weight_is_touched(step: Pass) -> None:
    view = fresh()
    before = weights(view)
    with pytest.raises(Unmet, match="does not divide"):
        apply_pass(step, view, context(view))
    assert not view.grids and all(torch.equal(w, before[path]) for path, w in weights(view).items())


def test_only_round_needs_samples() -> None:
    with pytest.raises(Unmet, match="needs calibration data"):
        run(Round(**QUICK), data=[])
    view, notes = run(HQQ(bits=4, group=8), data=[])
    assert notes.numbers["linears"] == len(view.linears(ALL)) == len(view.grids)
    assert not HQQ.needs_data and Round.needs_data


@pytest.mark.parametrize("step", [Round(**QUICK), HQQ(bits=3, group=8)], ids=["round", "hqq"])
def test_a_touched_weight_breaks_the_promise(step: Pass) -> None:
    view, _ = run(step)
    step.ensures(view)
    ref = view.linears("language.blocks[1].mlp")[0]
    with torch.no_grad():
        ref.module.weight[0, :4] *= 1.07
    with pytest.raises(PromiseBroken, match="3-bit grid") as caught:
        step.ensures(view)
    assert caught.value.where == ref.path


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_lowers_the_error_norm_of_rounding(symmetric: bool) -> None:
    original = weights(fresh(), ALL)

    def lost(view: ModelView) -> float:
        return sum(float((original[path] - w).abs().pow(0.7).sum()) for path, w in weights(view, ALL).items())

    plain, _ = run(RTN(bits=3, group=8, symmetric=symmetric, search="none"))
    fitted, notes = run(HQQ(bits=3, group=8, symmetric=symmetric))
    assert lost(fitted) < 0.97 * lost(plain)
    assert notes.numbers["norm_left"] == pytest.approx(lost(fitted) / lost(plain), rel=1e-3)


def block_errors(view: ModelView, name: str) -> float:
    """How far the block is from what it was, on the inputs that the original gives it; text and images count half."""
    data, plain = batches(), fresh()
    unit = next(iter(Walk(plain, data, name)))
    mine = next(u for u in view.units if u.name == name)
    total = 0.0
    for (args, kwargs), target, (_, w) in zip(unit.inputs(), unit.outputs(), unit.rows(), strict=True):
        with torch.no_grad():
            found = first(mine.module(*args, **kwargs))
        assert w is not None
        total += float(((found - first(target)).square().sum(-1) * w).sum())
    return total


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_learned_block_is_nearer_to_the_original_than_where_it_started(bits: int, symmetric: bool) -> None:
    kind: dict[str, Any] = {"bits": bits, "group": 8, "symmetric": symmetric, "where": ("language.blocks[0]",)}
    kind["token_weights"] = "balanced"  # as `block_errors` counts
    nearest, _ = run(RTN(**kind, search="importance"))
    solved, _ = run(GPTQ(**kind, refine=0))
    from_nearest, _ = run(Round(**kind, steps=60, init="rtn"))
    from_solved, notes = run(Round(**kind, steps=60, init="gptq"))
    name = "language.blocks[0]"
    errors = [block_errors(view, name) for view in (nearest, from_nearest, solved, from_solved)]
    assert errors[1] < errors[0] and errors[3] < errors[2], errors
    assert 0 < notes.numbers["mean_loss_left"] < 1 and notes.numbers["blocks_left_at_start"] == 0
    for path, weight in weights(from_solved, ("language.blocks[0]",)).items():
        assert on_grid(weight, from_solved.grids[path])


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    where = ("language.blocks[0]",)
    one, two, other = (run(Round(**QUICK | {"batch_size": 1, "seed": seed, "where": where}))[0] for seed in (0, 0, 1))
    a, b, c = (weights(view, where) for view in (one, two, other))
    assert all(torch.equal(a[path], b[path]) for path in a)
    assert any(not torch.equal(a[path], c[path]) for path in a)


def test_weights_of_tokens_reach_the_loss() -> None:
    where = ("language.blocks[0]",)
    found = [weights(run(Round(**QUICK | {"token_weights": mode, "where": where}))[0], where) for mode in
             ("balanced", "uniform", "text")]  # fmt: skip
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert any(not torch.equal(found[a][path], found[b][path]) for path in found[a])


@pytest.mark.parametrize("init", ["rtn", "gptq"])
def test_a_killed_pass_resumes_at_the_finished_block_with_the_same_weights(init: Any, tmp_path: Path) -> None:
    step = Round(**QUICK | {"steps": 6, "batch_size": 1, "init": init})
    check_resumes(step, 5, tmp_path)


def test_a_block_that_no_token_reaches_and_one_that_is_not_finite_are_counted() -> None:
    view = fresh()
    block = next(unit for unit in view.units if unit.name == "language.blocks[1]").module
    block.post_attention_layernorm.weight.data.zero_()  # nothing reaches the MLP of this block
    _, notes = run(Round(**QUICK | {"where": ("language",)}), view)
    assert notes.numbers["rounded_to_nearest"] == 3, "gate, up, down"
    data = batches()
    data[0]["pixel_values"] = data[0]["pixel_values"] * float("inf")
    broken = fresh()
    _, notes = run(
        Round(**QUICK | {"where": ("language.blocks[0]",), "init": "rtn", "token_weights": "balanced"}),
        broken,
        data=data,
    )
    assert notes.numbers["blocks_without_finite_loss"] == 1 and notes.numbers["blocks_left_at_start"] == 1


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_batches_are_split_only_where_a_unit_allows_it(family: str) -> None:
    view = fresh(family)
    data = [zoo.batch(family, samples=3)]
    split = {}
    for unit in Walk(view, data):
        parts, whole = parts_of(unit, 1, "balanced")
        calls = list(unit.inputs())
        assert whole in (0, len(calls))
        assert len(parts) == (len(calls) if whole else 3 * len(calls))
        targets = [first(out) for out in unit.outputs()]
        assert sum(part.target.numel() for part in parts) == sum(t.numel() for t in targets)
        for part in parts:  # an unchanged unit has nothing to lose
            with torch.no_grad():
                assert float(part.loss(unit, {})) <= 1e-6 * float(part.target.square().sum())
        split[unit.name] = not whole
    assert any(split.values()), split
    if family in ("llava", "gemma3", "paligemma"):
        assert all(split.values()), split
    if family == "qwen2-vl":  # the patches of all pictures are one packed sequence
        assert not split["vision.blocks[0]"] and split["language.blocks[0]"]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_all_parts_of_all_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = fresh(family)
    parts = [part for part in ALL if view.parts.get(part) and any(unit.linears for unit in view.parts[part])]
    step = Round(bits=3, group=-1, where=tuple(parts), steps=2, batch_size=1)
    before = weights(view, step.where)
    wants = {name: p.requires_grad for name, p in view.model.named_parameters()}
    reached: list[bool] = []

    def watching(roundings: Any, slopes: Any, *rest: Any) -> Any:
        value, found = slopes([rounding.value() for rounding in roundings])
        reached.extend(g is not None and bool(torch.isfinite(g).all() and g.any()) for g in found)
        assert value > 0
        return descend(roundings, slopes, *rest)

    monkeypatch.setattr(_round, "descend", watching)
    _, notes = run(step, view, data=[zoo.batch(family)])
    assert len(reached) == len(before) and all(reached), "the loss of a block reaches every linear in it"
    assert set(view.grids) == set(before)
    assert notes.numbers["blocks_without_finite_loss"] == notes.numbers["skipped_steps"] == 0
    assert all(p.grad is None and p.requires_grad == wants[name] for name, p in view.model.named_parameters())
    assert all(isinstance(ref.module.weight, torch.nn.Parameter) for ref in view.linears(step.where))
