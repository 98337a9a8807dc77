"""What the tests of quantizing passes share: a tiny model in bfloat16, a context, a run, and a run that is killed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Context, Notes, Pass
from svlm.compress.pipeline import apply_pass
from tests import zoo

BF16 = torch.bfloat16
ALL = ("vision", "connector", "language")


def fresh(family: str = "llava", dtype: torch.dtype = BF16) -> ModelView:
    view = view_of(zoo.model(family))
    view.storage_dtype = dtype
    storage.round_to_storage(view)
    return view


def batches(family: str = "llava") -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(family, samples=3, seed=seed) for seed in range(3)]


def context(view: ModelView, data: Any = None, scratch: Path | None = None) -> Context:
    data = batches() if data is None else data
    return Context(data, lambda where=None, **o: Walk(view, data, where, scratch=scratch, **o), lambda: nullcontext())


def run(
    step: Pass, view: ModelView | None = None, data: Any = None, scratch: Path | None = None
) -> tuple[ModelView, Notes]:
    view = view or fresh()
    return view, apply_pass(step, view, context(view, data, scratch))


def weights(view: ModelView, where: Any = None) -> dict[str, torch.Tensor]:
    return {ref.path: ref.module.weight.detach().clone() for ref in view.linears(where)}


class Killed(BaseException):
    pass


class Doomed:
    """A walk that ends before its unit number `units`, as that of a killed process."""

    def __init__(self, walk: Walk, units: int) -> None:
        self.walk, self.units = walk, units

    def __iter__(self) -> Any:
        for number, unit in enumerate(self.walk):
            if number == self.units:
                raise Killed
            yield unit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.walk, name)


def check_resumes(step: Pass, units: int, scratch: Path) -> None:
    """Killed before unit number `units`, `step` goes on to the same notes, weights, grids and activations."""
    calm, wanted = run(step)
    dead, data = fresh(), batches()
    doomed = Context(data, lambda where, **o: Doomed(Walk(dead, data, where, scratch=scratch, **o), units), nullcontext)
    with pytest.raises(Killed):
        step.apply(dead, doomed)
    view, notes = run(step, scratch=scratch)
    assert notes == wanted and view.grids.keys() == calm.grids.keys() and view.activations == calm.activations
    state = calm.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in view.model.state_dict().items())
    assert all(torch.equal(grid.scale, calm.grids[path].scale) for path, grid in view.grids.items())
    step.ensures(view)
