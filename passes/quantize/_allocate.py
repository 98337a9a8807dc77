"""Which choice each tensor takes, so that the costs are least and the bytes within a budget. Pure: numbers in, numbers out.

The multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11) by dynamic
programming over bytes. Bytes are counted in units that divide every difference between two choices of a tensor, which
makes the answer exact; where that takes more than `STATES` units the unit is larger, bytes are rounded up, and what
rounding left over is spent afterwards, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    """The knapsack in whole units: the least cost for every number of units up to `room`, one tensor after the other."""
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
