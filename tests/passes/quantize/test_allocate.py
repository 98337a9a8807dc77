"""The knapsack solver against every combination, and the costs that it is given."""

from __future__ import annotations

import math
import random

import pytest
import torch

from svlm.passes.quantize import _allocate
from svlm.passes.quantize._allocate import allocate, costs_of
from tests.oracles.allocate import allocate as every_combination


def problem(seed: int, tensors: int = 6) -> tuple[list[list[float]], list[list[int]]]:
    draw = random.Random(seed)
    costs, sizes = [], []
    for _ in range(tensors):
        weights, scale = draw.choice([64, 96, 160, 224]) * draw.randint(1, 9), math.exp(draw.gauss(0, 2))
        sizes.append([weights * bits // 8 + 16 for bits in (2, 3, 4, 8)])
        costs.append(sorted((scale * 4.0**-bits * draw.uniform(0.5, 2) for bits in (2, 3, 4, 8)), reverse=True))
    return costs, sizes


@pytest.mark.parametrize("seed", range(6))
def test_no_combination_within_the_budget_is_better(seed: int) -> None:
    costs, sizes = problem(seed)
    least, most = (sum(kind(row) for row in sizes) for kind in (min, max))
    for share in (0.0, 0.1, 0.37, 0.5, 0.93, 1.0, 2.0):
        budget = least + int(share * (most - least))
        picks = allocate(costs, sizes, budget)
        assert sum(row[i] for row, i in zip(sizes, picks)) <= budget
        found = sum(row[i] for row, i in zip(costs, picks))
        assert found == pytest.approx(every_combination(costs, sizes, budget), rel=1e-12)


def test_a_table_that_is_too_large_is_coarse_never_over_the_budget_and_spends_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_allocate, "STATES", 40)
    for seed in range(20):
        costs, sizes = problem(seed)
        budget = int(0.5 * (sum(map(min, sizes)) + sum(map(max, sizes))))
        picks = allocate(costs, sizes, budget)
        used = sum(row[i] for row, i in zip(sizes, picks))
        assert used <= budget
        further = [row[j] - row[i] for row, cost, i in zip(sizes, costs, picks) for j in range(4) if cost[j] < cost[i]]
        assert all(more > budget - used for more in further), "a step that fits was left out"
        found = sum(row[i] for row, i in zip(costs, picks))
        assert found <= 1.5 * every_combination(costs, sizes, budget)


def test_sizes_without_a_common_divisor() -> None:
    costs, sizes = [[5.0, 1.0], [4.0, 2.0], [3.0, 0.5]], [[7, 18], [11, 24], [5, 22]]
    for budget in range(23, 66):
        picks = allocate(costs, sizes, budget)
        found = sum(row[i] for row, i in zip(costs, picks))
        assert found == every_combination(costs, sizes, budget)


def test_a_budget_below_the_smallest_choices_is_refused() -> None:
    with pytest.raises(ValueError, match="1 more than 11"):
        allocate([[1.0, 0.0], [1.0, 0.0]], [[5, 9], [7, 8]], 11)


def test_a_cost_is_the_error_times_what_an_error_of_the_tensor_does() -> None:
    errors = {"a": [8.0, 2.0, 0.5], "b": [8.0, 2.0, 0.5]}
    noise = torch.tensor([2.0, 0.5, 1.0])  # geometric mean 1
    effects = {path: scale * noise * torch.tensor(errors[path]).repeat(2, 1) for path, scale in (("a", 1), ("b", 3))}
    effects = {path: effect.double() for path, effect in effects.items()}
    costs = costs_of(effects, errors)
    assert costs["a"] == pytest.approx([2 * e / 42 for e in errors["a"]], rel=1e-6)
    assert costs["b"] == pytest.approx([3 * c for c in costs["a"]], rel=1e-6)
    effects = {path: torch.stack([row[0], 1000 * row[1]]) for path, row in effects.items()}
    assert costs_of(effects, errors)["a"] == pytest.approx(costs["a"]), "temperatures count alike"


def test_more_bits_never_cost_more_and_what_does_nothing_costs_nothing() -> None:
    errors = {"a": [4.0, 1.0, 1.5], "silent": [0.0, 0.0, 0.0], "cut off": [4.0, 2.0, 1.0]}
    nothing = torch.zeros(1, 3, dtype=torch.float64)
    costs = costs_of({"a": torch.ones(1, 3).double(), "silent": nothing, "cut off": nothing}, errors)
    assert costs["a"] == sorted(costs["a"], reverse=True) and costs["a"][1] == costs["a"][2] > 0
    assert costs["silent"] == costs["cut off"] == [0.0, 0.0, 0.0]
