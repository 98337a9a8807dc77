"""Kill and resume: a walk with scratch ends with the same bits as one that was never disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from svlm.calib.stats import Hessian
from svlm.calib.walk import Walk
from svlm.calib.walk_unit import WalkUnit
from svlm.compress import disk
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.errors import WorkFailed
from svlm.compress.runtime.activations import Activation, install
from svlm.compress.runtime.grid import Grid
from tests import zoo


def batches(family: str, sizes: tuple[int, ...] = (2, 3)) -> list[dict[str, torch.Tensor]]:
    """Those of one size have one shape, and run together."""
    return [zoo.batch(family, samples=size, seed=seed) for seed, size in enumerate(sizes)]


def every_part(view: ModelView) -> list[str]:
    return [part for part, units in view.parts.items() if any(unit.linears for unit in units)]


def logits(view: ModelView, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return view.model(**batch, use_cache=False).logits


def body(view: ModelView, walk: Walk, stop_after: int | None = None) -> Iterator[str]:
    """Something that depends on all that came before, bit for bit: weights, a grid, notes."""
    for number, unit in enumerate(walk):
        yield unit.name
        if number == stop_after:
            return
        stats = unit.observe(Hessian)
        with torch.no_grad():
            for ref, stat in stats.items():
                ref.module.weight.add_(torch.tanh(stat.matrix).mean(0), alpha=0.01)
                rows = ref.module.out_features
                scale = stat.matrix.diagonal().mean().repeat(rows)[:, None]
                zero = torch.zeros(rows, 1, dtype=torch.int32) if ref.role == "attn.q" else None
                view.grids[ref.path] = Grid(4, -1, zero is None, scale, zero)
            if unit.unit.module.state_dict().get("lambda_1") is not None:
                unit.unit.module.lambda_1.mul_(1.1)
        unit.notes["trace"] = float(stats[unit.linears[0]].matrix.trace())


def state(view: ModelView) -> dict[str, torch.Tensor]:
    tensors = dict(view.model.state_dict())
    for path, grid in view.grids.items():
        tensors[f"{path}:scale"] = grid.scale
        if grid.zero is not None:
            tensors[f"{path}:zero"] = grid.zero
    return tensors


@pytest.mark.parametrize("family", ["llava", "qwen3-vl", "internvl", "donut", "florence-2"])
@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("sizes", [(2, 3), (2, 2, 2)])
def test_a_killed_walk_goes_on_bit_for_bit(family: str, stop: int, sizes: tuple[int, ...], tmp_path: Path) -> None:
    calm, data = view_of(zoo.model(family)), batches(family, sizes)
    whole = Walk(calm, data, every_part(calm))
    names = list(body(calm, whole))

    first = view_of(zoo.model(family))
    walk = Walk(first, data, every_part(first), scratch=tmp_path)
    assert list(body(first, walk, stop)) == names[: stop + 1]
    again = view_of(zoo.model(family))
    walk = Walk(again, data, every_part(again), scratch=tmp_path)
    assert list(body(again, walk)) == names[stop:], "finished units are not yielded again"
    assert walk.notes == whole.notes and list(walk.notes) == names
    wanted, found = state(calm), state(again)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert {p: (g.bits, g.group, g.symmetric) for p, g in calm.grids.items()} == {
        p: (g.bits, g.group, g.symmetric) for p, g in again.grids.items()
    }
    done = view_of(zoo.model(family))
    assert list(body(done, Walk(done, data, every_part(done), scratch=tmp_path))) == []
    assert all(torch.equal(wanted[name], tensor) for name, tensor in state(done).items())


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_restored_units_that_round_their_inputs_run_as_they_did(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last run of each unit, which its successor is given, is of the same batches together, and the same bits."""
    ran: list[tuple[str, list[tuple[int, ...]], list[torch.Tensor]]] = []
    replay = WalkUnit.replay

    def watched(self: WalkUnit, run: Any, last: bool = False) -> Any:
        if last:
            ran.append((self.name, [one.batches for one in self._runs], [one.call[0][0].clone() for one in self._runs]))
        return replay(self, run, last)

    monkeypatch.setattr(WalkUnit, "replay", watched)
    data, where = batches(family, (2, 2, 2)), ["vision", "connector", "language"]

    def walk(view: ModelView, stop: int = -1, **options: Any) -> None:
        for number, unit in enumerate(Walk(view, data, where, **options)):
            if number == stop:
                return
            unit.observe(Hessian)
            for ref in unit.linears:
                view.activations[ref.path] = Activation()
                install(ref.module, Activation())

    walk(view_of(zoo.model(family)))
    calm, names = list(ran), [name for name, _, _ in ran]
    assert any(len(batch) == 3 for _, each, _ in calm for batch in each)
    for stop in range(1, len(names) + 1):
        scratch = tmp_path / str(stop)
        walk(view_of(zoo.model(family)), stop, scratch=scratch)
        ran.clear()
        walk(view_of(zoo.model(family)), scratch=scratch)
        assert [(name, each) for name, each, _ in ran] == [(name, each) for name, each, _ in calm]
        assert all(
            torch.equal(a, b) for mine, theirs in zip(ran, calm, strict=True) for a, b in zip(mine[2], theirs[2])
        )


def test_a_half_written_unit_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(zoo.model("llava"))
    with monkeypatch.context() as m:
        count = []

        def dies(source: Any, target: Any) -> None:
            count.append(target)
            if len(count) == 3:  # the head, one unit, and then
                raise KeyboardInterrupt
            _replace(source, target)

        _replace = disk.os.replace
        m.setattr(disk.os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            list(body(view, Walk(view, batches("llava"), "language", scratch=tmp_path)))
    fresh = view_of(zoo.model("llava"))
    walk = Walk(fresh, batches("llava"), "language", scratch=tmp_path)
    assert list(body(fresh, walk)) == ["language.blocks[1]", "language.blocks[2]"]


def test_scratch_of_another_walk_is_not_used(tmp_path: Path) -> None:
    def run(where: str, data: list[Any], name: str = "walk") -> list[str]:
        view = view_of(zoo.model("llava"))
        return list(body(view, Walk(view, data, where, scratch=tmp_path, name=name)))

    data = batches("llava")
    blocks = [f"language.blocks[{i}]" for i in range(3)]
    assert run("language", data) == blocks
    assert run("language", data) == []
    assert run("language", data, name="second") == blocks, "each walk has a folder of its own"
    assert run("language.blocks[1:]", data) == blocks[1:]
    other = [{**batch, "pixel_values": batch["pixel_values"] + 1e-3} for batch in data]
    assert run("language", other) == blocks
    assert run("language", other) == []


def test_a_unit_that_became_smaller_is_restored(tmp_path: Path) -> None:
    def narrow(walk: Walk) -> list[str]:
        names = []
        for unit in walk:
            names.append(unit.name)
            mlp = unit.unit.module.mlp
            with torch.no_grad():
                for linear in (mlp.gate_proj, mlp.up_proj):
                    linear.weight.data, linear.out_features = linear.weight[:16].clone(), 16
                mlp.down_proj.weight.data, mlp.down_proj.in_features = mlp.down_proj.weight[:, :16].clone(), 16
        return names

    data = batches("llava")
    views = [view_of(zoo.model("llava")) for _ in range(2)]
    assert len(narrow(Walk(views[0], data, "language.blocks[1:]", scratch=tmp_path))) == 2
    assert narrow(Walk(views[1], data, "language.blocks[1:]", scratch=tmp_path)) == []
    for view in views:
        view.refresh()
        assert [unit.mlp.width for unit in view.parts["language"] if unit.mlp] == [48, 16, 16]
        assert view.units[-2].linears[-1].module.in_features == 16
    assert torch.equal(logits(views[0], data[0]), logits(views[1], data[0]))


def test_notes_must_be_json(tmp_path: Path) -> None:
    view = view_of(zoo.model("llava"))
    with pytest.raises(WorkFailed, match="notes are not JSON"):
        for unit in Walk(view, batches("llava"), "language", scratch=tmp_path):
            unit.notes["tensor"] = torch.zeros(1)
