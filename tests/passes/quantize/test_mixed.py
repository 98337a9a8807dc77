"""quantize.mixed on tiny models: its budget, what it does with it, what it refuses, keeps and promises."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from svlm import passes
from svlm.calib import curvature as curvature_module
from svlm.calib.balance import Balance
from svlm.calib.stats import MeanSquare
from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Context
from svlm.compress.errors import PromiseBroken, SelectorError, Unmet
from svlm.compress.pipeline import apply_pass, ask_promises
from svlm.compress.runtime.grid import packed_bytes
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.quantize.mixed import Mixed
from svlm.passes.quantize.rtn import RTN
from tests import zoo
from tests.passes.quantize.helpers import BF16, Doomed, Killed, context, fresh, weights

SOME = ("connector", "language.blocks[0:2]")
QUICK: dict[str, Any] = {"group": 8, "refine": 0, "scale_search": False, "where": SOME}
DATA = [zoo.batch("llava", samples=3, seed=seed) for seed in range(2)]


def used(view: ModelView) -> int:
    return sum(packed_bytes(tuple(view.weight(path).shape), grid) for path, grid in view.grids.items())


def lent(view: ModelView, scratch: Path | None = None) -> Context:
    """A context as the workbench makes it: the walks of a pass share the gradient ratios."""
    balance = Balance(view, DATA, scratch)

    def walk(where: Any = None, **options: Any) -> Walk:
        return Walk(view, DATA, where, scratch=scratch, balance=balance, **options)

    return Context(DATA, walk, nullcontext, scratch=scratch)


def run(step: Any, view: ModelView | None = None) -> tuple[ModelView, Any]:
    view = view or fresh()
    return view, apply_pass(step, view, context(view, DATA))


def test_settings_that_no_model_could_take() -> None:
    for wrong, word in (
        ({"choices": (4, 2)}, "choices"),
        ({"choices": ()}, "choices"),
        ({"choices": (2, 5)}, "bits"),
        ({"bits": 1.5}, "from 2 to 8"),
        ({"budget_mb": 0.0}, "budget_mb"),
        ({"budget_mb": float("inf")}, "budget_mb"),
        ({"group": 0}, "group"),
        ({"damp": 0.0}, "damp"),
    ):
        with pytest.raises(ValueError, match=word):
            Mixed(**wrong)


def test_the_ladder_adds_half_a_bit_and_ends() -> None:
    step, rungs = Mixed(bits=3.0, choices=(2, 4)), []
    while step is not None:
        rungs.append(step.bits)
        step = step.weaker()
    assert rungs == [3.0, 3.5, 4.0] and Mixed(budget_mb=1.0).weaker() is None


@pytest.mark.parametrize(("bits", "symmetric"), [(2.75, True), (5.0, False)])
def test_the_budget_is_used_up_and_never_exceeded(bits: float, symmetric: bool) -> None:
    step = Mixed(bits=bits, symmetric=symmetric, **QUICK)
    view, notes = run(step)
    numbers = notes.numbers
    assert 0.99 * numbers["budget_bytes"] <= used(view) == numbers["bytes"] <= numbers["budget_bytes"]
    assert numbers["linears"] == len(view.grids) == len(view.linears(SOME))
    counted = sum(n for row in numbers["linears_by_bits"].values() for n in row.values())
    assert counted == len(view.grids) and len({g.bits for g in view.grids.values()}) > 1
    assert all(g.symmetric == (symmetric or g.bits == 8) for g in view.grids.values())
    recorded = {path: tuple(kind) for path, kind in notes.record["grids"].items()}
    assert recorded == {path: (g.bits, g.group, g.symmetric) for path, g in view.grids.items()}


def test_whole_bits_cost_what_a_uniform_model_costs_and_halves_lie_halfway() -> None:
    def budget(bits: float) -> int:
        step, view = Mixed(bits=bits, **QUICK | {"group": 16}), fresh()
        return step._budget(view, step._sizes(view))

    for bits in (3, 4):
        assert budget(bits) == used(run(GPTQ(bits=bits, **QUICK | {"group": 16}))[0])
    assert budget(3.5) == (budget(3) + budget(4)) // 2
    wanted = budget(3.25)
    view, notes = run(Mixed(budget_mb=wanted / 1e6, **QUICK | {"group": 16}))
    assert notes.numbers["budget_bytes"] == wanted and used(view) <= wanted


def test_with_one_choice_it_is_gptq_bit_for_bit() -> None:
    settings = {"group": 8, "refine": 1, "damp": 0.02, "token_weights": "balanced", "where": SOME}
    mixed, notes = run(Mixed(bits=3, choices=(3,), **settings))
    plain, other = run(GPTQ(bits=3, **settings))
    found = weights(mixed, SOME)
    assert all(torch.equal(w, found[path]) for path, w in weights(plain, SOME).items())
    assert notes.numbers["average_bits"] == 3 and notes.numbers["budget_used"] == 1.0
    assert notes.numbers["mean_relative_error"] == other.numbers["mean_relative_error"]


def test_what_the_answers_do_not_depend_on_gets_the_fewest_bits_and_what_they_hang_on_more() -> None:
    path, found = "model.language_model.layers.0.mlp.down_proj", []
    for strength in (0.05, 5.0):
        view = fresh()  # LLaVA reads the second last layer of its tower
        with torch.no_grad():
            view.weight(path).mul_(strength)
        storage.round_to_storage(view)
        parts = ("vision.blocks[1:].mlp", "language.blocks[0].mlp")
        run(Mixed(bits=3.0, equalize=False, **QUICK | {"where": parts}), view)
        assert {g.bits for name, g in view.grids.items() if "vision_tower.encoder.layers.2" in name} == {2}
        found.append(view.grids[path].bits)
    assert found[0] < found[1]


def test_budgets_that_cannot_be_met_are_refused_with_what_could_be() -> None:
    view = fresh()
    ctx = context(view, DATA)
    with pytest.raises(Unmet, match="the budget is below 2 bits") as low:
        Mixed(budget_mb=0.001, group=8).requires(view, ctx)
    assert "budget_mb" in str(low.value)
    with pytest.raises(Unmet, match="more than 4 bits for every"):
        Mixed(budget_mb=1.0, choices=(2, 4), group=8).requires(view, ctx)
    with pytest.raises(Unmet, match="needs answers"):
        bare = [{k: v for k, v in batch.items() if k != "labels"} for batch in DATA]
        Mixed(token_weights="balanced", group=8).requires(view, context(view, bare))
    assert not view.grids


def test_a_budget_that_no_step_fits_into_is_explained() -> None:
    view = fresh()
    where = ("language.blocks[0].mlp.down",)
    _, notes = run(Mixed(bits=3.9, choices=(2, 4), **QUICK | {"where": where}), view)
    assert notes.numbers["budget_used"] < 0.99 and notes.numbers["linears_by_bits"] == {"language": {"2": 1}}
    assert "down_proj from 2 to 4 bits, takes" in notes.numbers["budget_left"]


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_embeddings_and_head_share_the_budget_and_come_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    view, data = fresh(family), [zoo.batch(family, samples=2)]
    step = Mixed(bits=4, **QUICK | {"where": (*SOME, "embeddings", "head")})
    notes = apply_pass(step, view, context(view, data))
    tied = view.table.head is not None
    assert view.table.path in view.grids and len(view.grids) == len(view.linears(SOME)) + (1 if tied else 2)
    assert notes.numbers["linears_by_bits"]["embeddings"] == {str(view.grids[view.table.path].bits): 1}
    assert 0.99 * notes.numbers["budget_bytes"] <= used(view) <= notes.numbers["budget_bytes"]
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    before = view.model.state_dict()
    assert all(torch.equal(before[name], t) for name, t in again.model.state_dict().items())
    assert ask_promises(again, passes.find) == (["quantize.mixed"], None)
    assert notes.numbers["stock_transformers"].startswith("does not load it")


def test_stock_transformers_loads_several_kinds_of_linears(tmp_path: Path) -> None:
    view, notes = run(Mixed(bits=3.5, **QUICK))
    assert notes.numbers["stock_transformers"] == "loads it" and len({g.bits for g in view.grids.values()}) > 1
    storage.save(view, tmp_path / "saved")
    stock = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=BF16)
    with torch.no_grad():
        stock(**{k: v.to(BF16) if v.is_floating_point() else v for k, v in DATA[0].items()})  # unpacks now
    for ref in view.linears(SOME):
        assert torch.equal(stock.get_submodule(ref.path).weight.float(), ref.module.weight), ref.path


def test_the_promise_knows_every_linear_s_bits_and_the_bytes() -> None:
    step = Mixed(bits=3.5, **QUICK)
    view, _ = run(step)
    step.ensures(view)
    path, grid = next(iter(view.grids.items()))
    view.grids[path] = type(grid)(grid.bits + 1, grid.group, grid.symmetric, grid.scale, grid.zero)
    with pytest.raises(PromiseBroken, match=f"grid of {grid.bits} bits"):
        step.ensures(view)
    view.grids[path] = grid
    with torch.no_grad():
        view.weight(path)[0, 0] += 1e-3
    with pytest.raises(PromiseBroken, match="weights on a"):
        step.ensures(view)


def test_a_killed_run_measures_nothing_again_and_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Mixed(bits=3.5, **QUICK | {"where": (*SOME, "embeddings")})
    whole, view = fresh(), fresh()
    apply_pass(step, whole, lent(whole))
    calm = lent(view, tmp_path)

    def doomed(where: Any = None, **options: Any) -> Any:
        walk = calm.walk(where, **options)
        return Doomed(walk, 1) if (tmp_path / "costs.json").is_file() else walk

    with pytest.raises(Killed):
        apply_pass(step, view, dataclasses.replace(calm, walk=doomed))
    assert (tmp_path / "gptq" / "00000.safetensors").is_file()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(curvature_module, "curvature", never)
    resumed = fresh()
    apply_pass(step, resumed, lent(resumed, tmp_path))
    wanted = whole.model.state_dict()
    assert all(torch.equal(wanted[name], t) for name, t in resumed.model.state_dict().items())


@pytest.mark.parametrize("step", [Mixed(where=()), RTN(where=())])
def test_an_empty_selector_selects_nothing_and_says_so(step: Any) -> None:
    view = fresh()
    with pytest.raises(SelectorError, match="empty"):
        step.requires(view, context(view, DATA))


def test_a_walk_that_starts_at_the_head_measures_the_same_gradients() -> None:
    """What stands in for finished modules has no gradient, and the head comes after all blocks."""
    view = view_of(zoo.model("gemma3"))
    batches = [zoo.batch("gemma3", samples=3)]
    plain = Balance(view, batches).measured()
    balance = Balance(view, batches)
    for unit in Walk(view, batches, "head", balance=balance):
        unit.observe(MeanSquare, token_weights="gradient")
    found = balance.known()
    assert found is not None and found.ratios["attn"] == pytest.approx(plain.ratios["attn"], rel=1e-4)
    assert len(found.ratios["mlp"]) == len(view.parts["language"]) > 0
