"""distill.logits with train: scales: integers stand, scales move, what is saved is what was validated."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from svlm import passes
from svlm.compress import storage
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.errors import Unmet
from svlm.compress.pipeline import apply_pass
from svlm.compress.runtime.grid import off_grid, quantize
from svlm.passes.distill._scales import Loose, loosened
from svlm.passes.distill.logits import Logits
from svlm.passes.quantize.rtn import RTN
from tests import zoo
from tests.passes.distill.test_logits import context, distilled, divergence

SCALES = Logits(steps=16, lr=2e-2, batch_size=2, train="scales")


def rounded(family: str, symmetric: bool = True, where: tuple[str, ...] = ("language",)) -> tuple[ModelView, ModelView]:
    """(student in 2 bits, teacher)."""
    model = zoo.model(family)
    teacher, student = view_of(copy.deepcopy(model)), view_of(model)
    for view in (teacher, student):
        view.storage_dtype = torch.bfloat16
        storage.round_to_storage(view)
    rtn = RTN(bits=2, group=8, symmetric=symmetric, where=where, search="none")
    apply_pass(rtn, student, context(teacher, []))
    return student, teacher


@pytest.mark.parametrize(
    "family, symmetric", [("llava", True), ("llava", False), ("qwen3-vl", True), ("blip-2-t5", False)]
)
def test_scales_move_and_integers_stand(family: str, symmetric: bool, tmp_path: Path) -> None:
    student, teacher = rounded(family, symmetric)
    batch = zoo.batch(family)
    before = divergence(student, teacher, batch)
    ints = {path: quantize(student.linear(path).module.weight, grid) for path, grid in student.grids.items()}
    old = {path: grid.scale.clone() for path, grid in student.grids.items()}
    rest = {k: v.clone() for k, v in student.model.state_dict().items() if k.removesuffix(".weight") not in ints}
    apply_pass(SCALES, student, context(teacher, [batch]))  # asks quantize.rtn's promise again
    after = divergence(student, teacher, batch)
    assert after < 0.8 * before, f"{before} -> {after}"
    assert any(not torch.equal(old[path], grid.scale) for path, grid in student.grids.items())
    for path, grid in student.grids.items():
        weight = student.linear(path).module.weight
        assert grid.scale.dtype == torch.bfloat16 and off_grid(weight, grid) == 0
        assert torch.equal(quantize(weight, grid), ints[path])
    assert all(torch.equal(v, rest[k]) for k, v in student.model.state_dict().items() if k in rest)
    assert not any("forward" in vars(m) for m in student.model.modules())
    storage.save(student, tmp_path / "m")
    again = storage.load_model(tmp_path / "m", find=passes.find)
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in student.model.state_dict().items())


def test_the_loss_that_is_kept_is_the_one_of_what_is_saved() -> None:
    student, teacher = rounded("llava")
    batch = zoo.batch("llava")
    notes = distilled(SCALES, student, context(teacher, [batch]))
    assert notes.numbers["kl_best"] == pytest.approx(divergence(student, teacher, batch), rel=1e-5)
    assert notes.numbers["trained_parameters"] == sum(grid.scale.numel() for grid in student.grids.values())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_weight_of_unmoved_scales_is_the_weight(symmetric: bool) -> None:
    student, _ = rounded("llava", symmetric)
    for path, grid in student.grids.items():
        linear = student.linear(path).module
        assert torch.equal(Loose.of(linear, grid).weight, linear.weight)


def test_the_gradient_is_that_of_the_scales() -> None:
    """Against differences of the loss in float64, away from where rounding to bfloat16 hides them."""
    student, _ = rounded("llava")
    path, grid = next(iter(student.grids.items()))
    linear = student.linear(path).module
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
    with loosened([linear], [grid]) as (loose,):
        linear(x).square().sum().backward()
    found = loose.move.grad
    assert found is not None
    parts = loose.ints.double().unflatten(1, (found.shape[1], -1))
    scale = grid.scale.double()
    bias = 0 if linear.bias is None else linear.bias.detach().double()

    def loss(move: torch.Tensor) -> float:
        weight = (parts * (scale * (1 + move))[..., None]).flatten(1)
        return float((x.double() @ weight.T + bias).square().sum())

    for place in ((0, 0), (3, found.shape[1] - 1)):
        step = torch.zeros_like(scale)
        step[place] = 1e-4
        assert float(found[place]) == pytest.approx((loss(step) - loss(-step)) / 2e-4, rel=0.02, abs=1e-2)


def test_without_quantized_linears_there_is_nothing_to_train() -> None:
    student, teacher = rounded("llava")
    with pytest.raises(Unmet, match="no scales to train"):
        Logits(train="scales", where="vision").requires(student, context(teacher, [zoo.batch("llava")]))
