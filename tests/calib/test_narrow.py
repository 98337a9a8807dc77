"""Calibration in bfloat16: for every family near what float32 says, float32 between units, only where it pays."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from svlm.calib import narrow
from svlm.calib.balance import measure
from svlm.calib.stats import MeanSquare
from svlm.calib.walk import Walk
from svlm.compress import mapped
from svlm.compress.anatomy import ModelView, view_of
from tests import zoo


@pytest.fixture
def with_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "has_matrix_unit", lambda device: True)


def stored(family: str, dtype: torch.dtype = torch.bfloat16) -> ModelView:
    """A tiny model whose weights are numbers of `dtype`."""
    view = view_of(zoo.model(family))
    with torch.no_grad():
        for parameter in view.model.parameters():
            parameter.copy_(parameter.to(dtype))
    view.storage_dtype = dtype
    return view


def walked(view: ModelView, data: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """E[x^2] of every linear but the head's; what comes to a unit is float32."""
    parts = [part for part, units in view.parts.items() if part != "head" and any(unit.linears for unit in units)]
    found = {}
    for unit in Walk(view, data, parts):
        kinds = {leaf.dtype for leaf in tree_leaves(list(unit.inputs())) if isinstance(leaf, torch.Tensor)}
        assert torch.bfloat16 not in kinds, unit.name
        found |= {ref.path: stat.mean for ref, stat in unit.observe(MeanSquare, token_weights="uniform").items()}
    return found


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_statistics_of_every_family_are_near_those_in_float32(family: str, with_matrix_unit: None) -> None:
    data = [zoo.batch(family, samples=2, seed=0), zoo.batch(family, samples=3, seed=1)]
    view = stored(family)
    assert narrow.narrow_dtype(view) is torch.bfloat16
    here = walked(view, data)
    view.storage_dtype = torch.float32
    wanted = walked(view, data)
    assert narrow.narrow_dtype(view) is None and here.keys() == wanted.keys()
    apart = {path: float((here[path] - wanted[path]).norm() / wanted[path].norm()) for path in wanted}
    assert 0 < max(apart.values()) < 0.05, max(apart, key=apart.__getitem__)


def test_gradient_ratios_are_near_those_in_float32(with_matrix_unit: None) -> None:
    view, data = stored("smolvlm"), [zoo.batch("smolvlm", samples=3, seed=0)]
    here = measure(view, data).ratios
    view.storage_dtype = torch.float32
    wanted = measure(view, data).ratios
    for kind, ratios in wanted.items():
        assert here[kind] == pytest.approx(ratios, rel=0.05)


def test_a_resumed_walk_sees_the_same_bits(tmp_path: Path, with_matrix_unit: None) -> None:
    """In one go each block is handed what the one before it made; resumed, the model runs up to the first one left."""
    data = [zoo.batch("smolvlm", samples=2, seed=0), zoo.batch("smolvlm", samples=3, seed=1)]

    def visit(scratch: Path | None, most: int = 99) -> dict[str, torch.Tensor]:
        seen = {}
        for unit in islice(Walk(stored("smolvlm"), data, ["vision", "language"], scratch=scratch), most):
            seen |= {ref.path: stat.mean for ref, stat in unit.observe(MeanSquare).items()}
            for ref in unit.linears:
                ref.module.weight.data.mul_(0.5)
        return seen

    wanted = visit(None)
    for most in (2, 99):
        found = visit(tmp_path, most)
        assert all(torch.equal(mean, wanted[path]) for path, mean in found.items())
    assert 0 < len(found) < len(wanted)


def test_only_what_takes_statistics_multiplies_in_16_bits(with_matrix_unit: None) -> None:
    view, data = stored("smolvlm"), [zoo.batch("smolvlm")]
    unit = next(iter(Walk(view, data, "language")))
    call = next(unit.inputs())
    (plain,) = unit.outputs()
    assert torch.equal(first(plain), first(unit.unit.module(*call[0], **call[1])))
    assert torch.equal(first(plain), first(unit.run(call, {})))
    narrowed = narrow.narrowed(unit.unit.module.forward, unit.unit, torch.bfloat16)(*call[0], **call[1])
    assert first(narrowed).dtype is torch.float32 and not torch.equal(first(narrowed), first(plain))


def test_where_it_is_not_worth_it() -> None:
    assert not narrow.has_matrix_unit(torch.device("meta"))
    view = stored("smolvlm", torch.float16)
    assert narrow.narrow_dtype(view) is None
    head = view.parts["head"][0]
    assert narrow.narrowed(head.module.forward, head, torch.bfloat16) == head.module.forward
    before = [unit.module.__dict__.get("forward") for unit in view.units]
    with narrow.narrowing(view.units, torch.bfloat16):
        assert all("forward" in unit.module.__dict__ for unit in view.units if unit.part != "head")
    assert [unit.module.__dict__.get("forward") for unit in view.units] == before


@pytest.mark.parametrize("room", [True, False])
def test_weights_of_many_units_lie_in_a_file_or_are_made_at_every_call(
    room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = stored("smolvlm")
    mapped.map_weights(view.model)
    for module in (mapped, narrow):
        monkeypatch.setattr(module, "LARGE", 1)
    if not room:
        monkeypatch.setattr(mapped, "_most_files", lambda: 0)
    own = {ref.path: ref.module.weight for unit in view.units for ref in unit.linears}
    with narrow.narrow_weights(view.parts["vision"], torch.bfloat16, away=True):
        for ref in view.linears("vision"):
            weight = ref.module.weight
            assert mapped.is_mapped(weight) and torch.equal(weight, own[ref.path].to(weight.dtype))
            assert weight.dtype is (torch.bfloat16 if room else torch.float32)
    assert all(ref.module.weight is own[ref.path] for unit in view.units for ref in unit.linears)


def first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out
