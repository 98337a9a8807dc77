"""The knapsack with several choices as one would write it first: every combination is looked at."""

import itertools


def allocate(costs, sizes, budget):
    """The least sum of costs that fits into the budget, and None where nothing fits."""
    best = None
    for picks in itertools.product(*(range(len(row)) for row in costs)):
        if sum(row[i] for row, i in zip(sizes, picks)) <= budget:
            cost = sum(row[i] for row, i in zip(costs, picks))
            best = cost if best is None else min(best, cost)
    return best
