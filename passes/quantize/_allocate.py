"""Which choice each tensor takes: least costs within a budget of bytes. Pure: numbers in, numbers out.

The multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11) by dynamic
programming over bytes. Bytes are counted in units that divide every difference between two choices of a tensor, which
makes the answer exact; where that takes more than `STATES` units the unit is larger, bytes are rounded up, and what
rounding left over is spent afterwards, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

STATES = 50_000  # units of bytes that the table has at most


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The choice of each tensor with the least sum of costs whose sum of sizes is at most `budget`.

    Args:
        costs: for each tensor the cost of each of its choices. sizes: the same for bytes.

    Raises:
        ValueError: even the smallest choices take more than `budget`.
    """
    least = [min(row) for row in sizes]
    room = budget - sum(least)
    if room < 0:
        raise ValueError(f"the smallest choices take {sum(least)} bytes, {-room} more than {budget}")
    steps = [size - low for row, low in zip(sizes, least) for size in row]
    unit = max(math.gcd(*steps), -(-room // STATES), 1)
    picks = _table(costs, [[-(-(s - low) // unit) for s in row] for row, low in zip(sizes, least)], room // unit)
    return _spend(picks, costs, sizes, budget)


def _table(costs: Sequence[Sequence[float]], units: Sequence[Sequence[int]], room: int) -> list[int]:
    """The knapsack in whole units: the least cost for every number of them up to `room`, tensor after tensor."""
    room = min(room, sum(max(row) for row in units))
    best = torch.zeros(room + 1, dtype=torch.float64)
    taken: list[torch.Tensor] = []
    for row, needs in zip(costs, units):
        now = torch.full_like(best, torch.inf)
        pick = torch.zeros(room + 1, dtype=torch.int8)
        for choice, (cost, need) in enumerate(zip(row, needs)):
            if need > room:
                continue
            trial = best[: room + 1 - need] + cost
            better = trial < now[need:]
            now[need:][better] = trial[better]
            pick[need:][better] = choice
        best = now
        taken.append(pick)
    picks, left = [], room
    for pick, needs in zip(reversed(taken), reversed(units)):
        choice = int(pick[left])
        picks.append(choice)
        left -= needs[choice]
    return picks[::-1]


def _spend(
    picks: list[int], costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """`picks` with the single changes that lower the cost most for as long as bytes are left for one."""
    picks = list(picks)
    left = budget - sum(row[pick] for row, pick in zip(sizes, picks))
    while True:
        gains = [
            (costs[i][pick] - costs[i][choice], i, choice)
            for i, pick in enumerate(picks)
            for choice in range(len(costs[i]))
            if costs[i][choice] < costs[i][pick] and sizes[i][choice] - sizes[i][pick] <= left
        ]
        if not gains:
            return picks
        _, i, choice = max(gains)
        left -= sizes[i][choice] - sizes[i][picks[i]]
        picks[i] = choice


def costs_of(effects: Mapping[str, torch.Tensor], errors: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """What each choice of each tensor costs: its error times what such an error of this tensor does to the answers.

    A measured effect depends on few tokens and on which way the rounding went by chance. The quotient of effect and
    error hardly depends on the choice, so its geometric mean over the choices stands for all of them. Temperatures
    count alike: the effects of each are taken as shares of what all tensors together do to it. Choices go from few bits
    to many, and a later one never costs more.

    Args:
        effects: path -> [temperatures, choices], see calib/curvature.py. errors: path -> the error of each choice.
    """
    costs: dict[str, torch.Tensor] = {}
    for path, effect in effects.items():
        error = torch.tensor(errors[path], dtype=torch.float64)
        known = (error > 0) & (effect > 0)  # a linear that no token reaches has neither
        mean = torch.where(known, (effect / error).log(), 0.0).sum(1) / known.sum(1).clamp(min=1)
        costs[path] = torch.where(known.any(1), mean.exp(), 0.0)[:, None] * error
    whole = sum((cost.sum(1) for cost in costs.values()), torch.zeros(1, dtype=torch.float64))
    shares = {path: (cost / whole.clamp(min=1e-300)[:, None]).sum(0) for path, cost in costs.items()}
    return {path: share.flip(0).cummax(0).values.flip(0).tolist() for path, share in shares.items()}
