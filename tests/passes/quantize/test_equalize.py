"""Equalized input channels: the scale against a loop, the function kept in every family, what stays, the gain."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from svlm.compress.anatomy import view_of
from svlm.passes.quantize._equalize import POWER, column_scale, equalize
from svlm.passes.quantize._fold import fold, pairs_of
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.quantize.mixed import Mixed
from tests import zoo
from tests.passes.quantize.helpers import batches, fresh, run


def logits(model: Any, data: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten() for batch in data])


def test_the_scale_equals_a_loop_over_columns() -> None:
    w = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.01, 30.0, 0.0, 2.0])
    size = [math.sqrt(sum(float(v) ** 2 for v in w[:, j]) / 7) for j in range(5)]
    raw = {j: s**-0.5 for j, s in enumerate(size) if s}
    middle = math.prod(raw.values()) ** (1 / len(raw))
    wanted = torch.tensor([raw[j] / middle if j in raw else 1.0 for j in range(5)])
    torch.testing.assert_close(column_scale(w, 0.5), wanted, rtol=1e-5, atol=0)
    even = w[:, [0, 1, 2, 4]] * column_scale(w[:, [0, 1, 2, 4]], 1.0)
    torch.testing.assert_close(even.square().mean(0), even.square().mean().expand(4))
    assert torch.equal(column_scale(torch.zeros(3, 4)), torch.ones(4))
    w[0, 1] = float("nan")
    assert bool(column_scale(w).isfinite().all()) and float(column_scale(w)[1]) == 1


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_logits_stay_in_every_family(family: str) -> None:
    view, data = view_of(zoo.model(family)), [zoo.batch(family)]
    view.storage_dtype = torch.float32
    before, state = logits(view.model, data), copy.deepcopy(view.model.state_dict())
    refs = [ref for unit in view.units if unit.part != "head" for ref in unit.linears]
    assert equalize(view, refs) >= 6
    changed = [k for k, v in view.model.state_dict().items() if not torch.equal(v, state[k])]
    assert len(changed) >= 6
    torch.testing.assert_close(logits(view.model, data), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


def test_what_is_not_selected_is_left_alone() -> None:
    view, state = fresh(), fresh().model.state_dict()
    only_q = view.linears("language.blocks[0].attn.q")
    down = view.linears("language.blocks[0].mlp.down")  # its writer, `up`, would be rounded when it is saved
    assert equalize(view, [*only_q, *down]) == 0
    assert all(torch.equal(v, state[k]) for k, v in view.model.state_dict().items())
    mlp = view.linears("language.blocks[0].mlp")
    assert equalize(view, mlp) == 3, "gate and up behind the norm, down behind up"


def spread() -> Any:
    """A model whose channels differ in size, as outlier channels make them, with the function of `fresh`."""
    view = fresh(dtype=torch.float32)
    make = torch.Generator().manual_seed(0)
    for unit in view.units:
        for pair in pairs_of(view, unit, unit.linears):
            width = pair.targets[0].module.in_features
            if not isinstance(view.model.get_submodule(pair.source), nn.Linear):
                fold(view, pair, torch.exp(torch.randn(width, generator=make)))
    return view


@pytest.mark.parametrize("asymmetric", [0.0, 0.25])
def test_gptq_gains_where_channels_differ(asymmetric: float) -> None:
    wanted = logits(fresh(dtype=torch.float32).model, batches())
    found = {}
    for on in (True, False):
        step = GPTQ(bits=3, group=8, equalize=on, asymmetric=asymmetric, token_weights="uniform")
        view, notes = run(step, spread())
        assert (notes.numbers["linears_equalized"] > 0) == on
        found[on] = float((logits(view.model, batches()) - wanted).square().mean())
    assert found[True] < 0.7 * found[False], found


def test_mixed_tries_what_it_will_round() -> None:
    view, notes = run(Mixed(bits=3.0, choices=(2, 3, 4), group=8, where=("language",)), spread())
    assert notes.numbers["linears_equalized"] > 0
    again = [ref for ref in view.linears("language.blocks[0].mlp") if ref.role in ("mlp.gate", "mlp.up")]
    left = column_scale(torch.cat([ref.module.weight.detach() for ref in again]), POWER)
    before = [spread().linear(ref.path).module.weight.detach() for ref in again]
    assert float(left.log().std()) < 0.5 * float(column_scale(torch.cat(before), POWER).log().std())
