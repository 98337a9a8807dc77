"""Batches of one shape run together: the same statistics, and only where a unit treats its samples apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from svlm.calib import joined
from svlm.calib.joined import Joined, alone, apart
from svlm.calib.stats import Hessian
from svlm.calib.walk import Walk
from svlm.compress.anatomy import ModelView, view_of
from tests import zoo

from .test_walk import every_part, everywhere, logits, replayed

COUNT = 3


def alike(family: str) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(family, samples=2, seed=seed) for seed in range(COUNT)]


def walked(view: ModelView, data: list[Any]) -> tuple[dict[str, list[tuple[int, ...]]], list[torch.Tensor], Walk]:
    """Which batches ran together in each unit, and every Hessian; each unit is changed on the way."""
    runs, found = {}, []
    walk = Walk(view, data, [part for part in every_part(view) if part != "head"])  # it may be the embedding as well
    for unit in walk:
        runs[unit.name] = [one.batches for one in unit._runs]
        assert len(list(unit.inputs())) == sum(len(batch) for batch in unit._calls)
        found += [stat.matrix for stat in unit.observe(Hessian).values()]
        with torch.no_grad():
            for ref in unit.linears:
                ref.module.weight.mul_(0.9)
    return runs, found, walk


@everywhere
def test_batches_of_one_shape_run_together_and_nothing_else_changes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, data = view_of(zoo.model(family)), alike(family)
    runs, found, walk = walked(view, data)
    for mine, theirs in zip(replayed(walk), [logits(view, batch) for batch in data], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(joined, "MOST_TOKENS", 0)
    separate, wanted, _ = walked(view_of(zoo.model(family)), data)
    assert all(len(batches) == 1 for each in separate.values() for batches in each)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    together = {name for name, each in runs.items() if any(len(batches) == COUNT for batches in each)}
    assert {name for name in runs if name.startswith("language.blocks")} <= together, "prompts of one length"


def test_others_stay_apart() -> None:
    states, mask = torch.randn(2, 5, 4), torch.ones(2, 5)
    first: Any = ((states,), {"mask": mask, "scale": 0.5, "places": torch.arange(5)})

    def together(**changes: Any) -> bool:
        given = changes.pop("states", states.clone())
        second = ((given,), first[1] | changes)
        return len(joined.joined([[first], [second]], ["", ""])) == 1

    assert together() and together(mask=torch.zeros(2, 5)) and together(places=torch.arange(5))
    assert together(states=torch.randn(3, 5, 4), mask=torch.ones(3, 5)), "another number of samples"
    assert not together(states=torch.randn(2, 6, 4)) and not together(mask=torch.ones(2, 6))
    assert not together(places=torch.arange(1, 6)) and not together(scale=0.25) and not together(more=1)
    assert not together(scale=True) and not together(cache=object()) and not together(states=states[0])
    assert not together(states=states.double()) and not together(mask=None)
    marked = states.clone()
    marked.groups = 1  # type: ignore[attr-defined]
    assert not together(states=marked), "what travels with a tensor would be lost"
    one, two = joined.joined([[first], [first]], ["a", "b"])
    assert one.batches == (0,) and two.batches == (1,), "tokens of another kind"
    assert [run.batches for run in joined.joined([[first], [first, first], [], [first]], [""] * 4)] == [
        (0,), (1,), (1,), (3,),
    ]  # fmt: skip


def test_what_is_one_a_sample_in_one_batch_and_not_in_the_other_keeps_them_apart() -> None:
    def call(samples: int) -> Any:
        return ((torch.randn(samples, 5, 4),), {"places": torch.arange(2.0)})

    runs = joined.joined([[call(n)] for n in (2, 2, 3, 3)], [""] * 4)
    assert [one.batches for one in runs] == [(0, 1), (2, 3)]
    assert [len(one.call[1]["places"]) for one in runs] == [4, 2]


def test_no_more_tokens_than_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "MOST_TOKENS", 20)
    call: Any = ((torch.randn(2, 5, 4),), {})
    assert [one.batches for one in joined.joined([[call]] * 5, [""] * 5)] == [(0, 1), (2, 3), (4,)]


def test_what_a_joined_call_returns_is_cut_where_the_batches_meet() -> None:
    calls: list[list[Any]] = [[((torch.full((n, 3, 2), float(n)),), {"scale": torch.ones(5)})] for n in (1, 2, 3)]
    (one,) = joined.joined(calls, [""] * 3)
    assert one.samples == (1, 2, 3) and one.call[0][0].shape == (6, 3, 2)
    out = (one.call[0][0] * 2, None, {"loss": torch.tensor(1.0)})
    for part, (call,) in zip(one.split(out), calls, strict=True):
        assert torch.equal(part[0], call[0][0] * 2) and part[1] is None and part[2]["loss"] == 1.0
        assert part[0].untyped_storage().data_ptr() == out[0].untyped_storage().data_ptr(), "no copies"
    after = one.relayed(out)
    assert after.call[0][0] is out[0] and after.call[1] is one.call[1] and after.batches == one.batches
    assert [run.call for run in alone(calls)] == [call for (call,) in calls]


@pytest.mark.parametrize(
    "run",
    [lambda x: x - x.mean(0), lambda x: x[:1], lambda x: x.reshape(2, -1), lambda x: x * len(x), lambda x: refuse(x)],
)
def test_a_unit_that_mixes_samples_is_found_out(run: Any) -> None:
    torch.manual_seed(0)
    calls: list[list[Any]] = [[((torch.randn(2, 3, 4),), {})] for _ in range(2)]
    (one,) = joined.joined(calls, [""] * 2)
    assert isinstance(one, Joined) and apart(lambda call: call[0][0].exp(), one, calls, 1e-3)
    assert not apart(lambda call: run(call[0][0]), one, calls, 1e-3)


def refuse(x: torch.Tensor) -> torch.Tensor:
    if len(x) > 2:
        raise ValueError("two samples at most")
    return x


@pytest.mark.parametrize("which", [(0, 1, 2), (1,)])
def test_a_block_that_mixes_samples_is_called_batch_by_batch(which: tuple[int, ...]) -> None:
    view, data = view_of(zoo.model("llava")), alike("llava")
    for number in which:
        mlp: Any = view.model.model.language_model.layers[number].mlp  # type: ignore[union-attr]
        mlp.forward = lambda x, own=mlp.forward: own(x) * x.shape[0]
    runs, _, walk = walked(view, data)
    assert all(runs[f"language.blocks[{number}]"] == [(0,), (1,), (2,)] for number in which)
    for mine, theirs in zip(replayed(walk), [logits(view, batch) for batch in data], strict=True):
        assert torch.equal(mine, theirs)


def test_units_with_hooks_are_called_batch_by_batch_and_count_right() -> None:
    view, data = view_of(zoo.model("llava")), alike("llava")
    seen: list[int] = []
    layers: Any = view.model.model.language_model.layers
    assert isinstance(layers, nn.ModuleList)
    layers[1].mlp.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
    runs, _, _ = walked(view, data)
    assert runs["language.blocks[1]"] == [(0,), (1,), (2,)] and len(runs["language.blocks[0]"]) == 1
    assert set(seen) == {1, 2}, "the probe's one sample, and the batches' two"
