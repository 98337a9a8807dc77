"""The maths of quantize.round and quantize.hqq against naive oracles."""

from __future__ import annotations

import pytest
import torch

from svlm.compress.runtime.grid import Grid, dequantize, on_grid, quantize
from svlm.passes.quantize._gptq import gptq, inverse_factor
from svlm.passes.quantize._hqq import hqq, lp_errors, shrink
from svlm.passes.quantize._round import REACH, Rounding, compensated, descend, draws
from svlm.passes.quantize._rtn import absmax_grid, groups_of
from tests.oracles import hqq as hqq_oracle
from tests.oracles import signround

BF16 = torch.bfloat16
GRIDS = [(2, True), (2, False), (3, True), (3, False), (4, True), (4, False), (8, True)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Weights with a few outliers, in bfloat16 values."""
    return (random(*shape, seed=seed) ** 3 * 0.05).to(BF16).float()


def moved(w: torch.Tensor, grid: Grid) -> Rounding:
    """A rounding somewhere on the way."""
    rounding = Rounding(w, grid)
    rounding.shift.copy_((random(*rounding.shift.shape, seed=1) * 0.3).clamp(-0.5, 0.5))
    rounding.upper.copy_((1 + 0.2 * random(*rounding.upper.shape, seed=2)).clamp(*REACH))
    if grid.zero is not None:
        rounding.lower.copy_((1 + 0.2 * random(*rounding.lower.shape, seed=3)).clamp(*REACH))
    return rounding


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("group", [8, -1])
def test_a_rounding_starts_at_the_nearest_points_and_is_always_on_its_grid(
    bits: int, symmetric: bool, group: int
) -> None:
    w = heavy(6, 32)
    start = absmax_grid(w, bits, group, symmetric, BF16)
    rounding = Rounding(w, start)
    grid = rounding.grid()
    assert torch.equal(rounding.value(), dequantize(quantize(w, start), start))
    assert torch.equal(grid.scale, start.scale)
    if start.zero is not None and grid.zero is not None:
        assert torch.equal(grid.zero, start.zero)
    later = moved(w, start)
    assert on_grid(later.value(), later.grid()) and not torch.equal(later.value(), rounding.value())
    assert later.grid().scale.dtype == BF16


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("group", [8, -1])
def test_value_and_gradients_are_those_of_autograd(bits: int, symmetric: bool, group: int) -> None:
    w = heavy(5, 24, seed=4)
    start = absmax_grid(w, bits, group, symmetric, BF16)
    rounding = moved(w, start)
    shift = rounding.shift.reshape(w.shape).clone().requires_grad_()
    upper, lower = (t.clone().requires_grad_() for t in (rounding.upper, rounding.lower))
    wanted = signround.weight(w, shift, upper, lower, start.scale, start.zero, bits, group, BF16)
    assert torch.equal(rounding.value(), wanted.detach())
    slope = random(*w.shape, seed=5)
    learned = [shift, upper] if symmetric else [shift, upper, lower]
    slopes = torch.autograd.grad((wanted * slope).sum(), learned)
    found = rounding.gradients(slope)
    torch.testing.assert_close(found[0].reshape(w.shape), slopes[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], slopes[1], rtol=1e-3, atol=1e-5)
    if symmetric:
        assert found[2] is None
    else:
        assert found[2] is not None
        torch.testing.assert_close(found[2], slopes[2], rtol=1e-3, atol=1e-5)


def slopes_of(x: torch.Tensor, wanted: torch.Tensor):  # type: ignore[no-untyped-def]
    def loss(values: list[torch.Tensor]) -> float:
        return float((x @ values[0].T - wanted).square().mean())

    def slopes(values: list[torch.Tensor]) -> tuple[float, list[torch.Tensor | None]]:
        difference = x @ values[0].T - wanted
        return loss(values), [2 * difference.T @ x / difference.numel()]

    return slopes, loss


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("steps", [3, 20])
def test_the_descent_is_that_of_the_oracle(symmetric: bool, steps: int) -> None:
    w, x = heavy(4, 16, seed=6), random(40, 16, seed=7)
    start = absmax_grid(w, 3, 8, symmetric, BF16)
    rounding = Rounding(w, start)
    slopes, _ = slopes_of(x, x @ w.T)
    falling = iter(range(10, 0, -1))  # a judge that likes every later state better
    course = descend([rounding], slopes, lambda values: float(next(falling)), steps)
    wanted = signround.descend(w, x, x @ w.T, start.scale, start.zero, 3, 8, BF16, steps)
    assert course.kept == steps and course.skipped == 0
    assert torch.equal(rounding.value(), wanted)
    assert not torch.equal(wanted, dequantize(quantize(w, start), start))


def test_the_descent_finds_roundings_that_rounding_to_nearest_does_not() -> None:
    x = random(200, 32, seed=8) @ random(32, 32, seed=9)  # inputs that go together
    w = random(16, 32, seed=10).to(BF16).float()
    rounding = Rounding(w, absmax_grid(w, 3, 16, True, BF16))
    slopes, loss = slopes_of(x, x @ w.T)
    course = descend([rounding], slopes, loss, 200)
    assert course.kept > 0 and course.best < 0.7 * course.start
    assert loss([rounding.value()]) == course.best


def test_a_descent_never_ends_worse_than_it_started_and_counts_what_is_not_finite() -> None:
    w = heavy(4, 16)
    rounding = Rounding(w, absmax_grid(w, 4, 8, True, BF16))
    before = rounding.value()

    def uphill(values: list[torch.Tensor]) -> tuple[float, list[torch.Tensor | None]]:
        return 1.0, [-(values[0] - w)]

    course = descend([rounding], uphill, lambda values: float((values[0] - w).square().sum()), 20)
    assert course.kept == 0 and course.best == course.start and torch.equal(rounding.value(), before)

    def broken(values: list[torch.Tensor]) -> tuple[float, list[torch.Tensor | None]]:
        return 1.0, [torch.full_like(w, float("nan"))]

    course = descend([rounding], broken, lambda values: 1.0, 7)
    assert course.skipped == 7 and torch.equal(rounding.value(), before)
    course = descend([rounding], uphill, lambda values: float("nan"), 7)
    assert course.kept == 0 and torch.equal(rounding.value(), before)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_compensated_weight_rounds_to_the_solution_it_came_from(bits: int) -> None:
    x = random(300, 24, seed=11) @ random(24, 24, seed=12)
    h = (2 * x.T @ x / len(x)).double()
    w = heavy(10, 24, seed=13)
    solved = gptq(w, h, bits=bits, group=8, symmetric=True, dtype=BF16, scale_search=True)
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    factor, _ = inverse_factor(h[order][:, order], 0.01)
    assert factor is not None
    centre = compensated(w, solved.weight, factor, order)
    assert torch.equal(dequantize(quantize(centre, solved.grid), solved.grid), solved.weight)
    assert torch.equal(Rounding(centre, solved.grid).value(), solved.weight)
    torch.testing.assert_close(centre[:, order[0]], w[:, order[0]])  # nothing came before it
    assert not torch.allclose(centre, w)


def test_every_part_is_drawn_before_any_comes_again() -> None:
    drawn = draws(5, 2, torch.Generator().manual_seed(0))
    first = [i for _ in range(5) for i in next(drawn)]
    assert sorted(first[:5]) == sorted(first[5:]) == list(range(5)) and first[:5] != first[5:]
    again = draws(5, 2, torch.Generator().manual_seed(0))
    assert [i for _ in range(5) for i in next(again)] == first


@pytest.mark.parametrize(("bits", "symmetric"), [g for g in GRIDS if g[0] < 8])
def test_hqq_is_that_of_the_oracle(bits: int, symmetric: bool) -> None:
    w = heavy(4, 32, seed=14)
    grid = hqq(w, bits=bits, group=16, symmetric=symmetric, dtype=BF16)
    for r in range(4):
        for g in range(2):
            part = w[r, 16 * g : 16 * g + 16].tolist()
            scale, zero = hqq_oracle.group(part, bits, symmetric)
            mine = (float(grid.scale[r, g]), 0 if grid.zero is None else int(grid.zero[r, g]))
            if mine != (scale, zero):  # another one of two turns whose errors agree in float32
                errors = [hqq_oracle.error(part, s, z, bits, 0.7) for s, z in (mine, (scale, zero))]
                assert errors[0] == pytest.approx(errors[1], rel=1e-4), (mine, (scale, zero))


def test_shrink() -> None:
    error = torch.tensor([0.0, 0.01, -0.01, 1.0, -4.0])
    wanted = [hqq_oracle.shrunk(e, 0.7, 10.0) for e in error.tolist()]
    assert shrink(error, 0.7, 10.0).tolist() == pytest.approx(wanted) and wanted[:3] == [0, 0, 0]


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_no_group_gets_worse_and_many_get_better(bits: int, symmetric: bool) -> None:
    w = heavy(32, 128, seed=15)
    plain = absmax_grid(w, bits, 32, symmetric, BF16)
    fitted = hqq(w, bits=bits, group=32, symmetric=symmetric, dtype=BF16)
    before, after = (lp_errors(groups_of(w, 32), grid, 0.7) for grid in (plain, fitted))
    assert bool((after <= before).all())
    if bits < 8:  # there the plain grid is fine enough for all of them
        assert float((after < before).float().mean()) > 0.3
    rounded = dequantize(quantize(w, fitted), fitted)
    assert on_grid(rounded, fitted)
    assert float((w - rounded).abs().pow(0.7).sum()) == pytest.approx(float(after.sum()), rel=1e-4)


def test_a_group_of_zeros_and_a_constant_group() -> None:
    w = torch.cat([torch.zeros(2, 8), torch.full((2, 8), 0.5), torch.full((2, 8), -0.5)])
    for symmetric in (True, False):
        grid = hqq(w, bits=4, group=8, symmetric=symmetric, dtype=BF16)
        assert bool(torch.isfinite(grid.scale.float()).all() and (grid.scale > 0).all())
        rounded = dequantize(quantize(w, grid), grid)
        assert torch.equal(rounded[:2], w[:2])
        torch.testing.assert_close(rounded, w, rtol=0.01, atol=0)
