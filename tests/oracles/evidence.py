"""Score intervals by trying likelihoods, sign flips by counting all of them, Holm by closed testing.

Run as a script it prints the figures of scipy (1.17) that the tests hold: `permutation_test` and `t.ppf`.
"""

from __future__ import annotations

import itertools
import math


def likelihood(b: int, c: int, n: int, lost: float, gained: float) -> float:
    """log-likelihood of b losses and c gains among n pairs."""
    kept = 1 - lost - gained
    total = 0.0
    for count, share in ((b, lost), (c, gained), (n - b - c, kept)):
        if count:
            total += count * math.log(share) if share > 0 else -math.inf
    return total


def score(b: int, c: int, n: int, loss: float) -> float:
    """Tango's statistic of a hypothetical loss: the likeliest shares with it, found by narrowing a grid."""
    low, high = max(0.0, -loss), (1 - loss) / 2
    for _ in range(12):
        grid = [low + (high - low) * k / 40 for k in range(41)]
        best = max(range(41), key=lambda k: likelihood(b, c, n, grid[k] + loss, grid[k]))
        low, high = grid[max(0, best - 1)], grid[min(40, best + 1)]
    gained = (low + high) / 2
    variance = n * (2 * gained + loss - loss**2)
    return (n * loss - (b - c)) / math.sqrt(max(variance, 1e-300))


def interval(b: int, c: int, n: int, z: float) -> tuple[float, float]:
    """Least and largest loss whose statistic lies within z, by bisection."""
    ends = []
    for sign in (-1, 1):
        inside, outside = (b - c) / n, float(sign)
        for _ in range(40):
            middle = (inside + outside) / 2
            if sign * score(b, c, n, middle) < z:
                inside = middle
            else:
                outside = middle
        ends.append(inside)
    return ends[0], ends[1]


def sign_flip(sums: list[int]) -> float:
    """The share of all assignments of signs whose sum is at least as far from zero."""
    seen = abs(sum(sums))
    outcomes = [abs(sum(s * x for s, x in zip(signs, sums))) for signs in itertools.product((1, -1), repeat=len(sums))]
    return sum(o >= seen for o in outcomes) / len(outcomes)


def holm(p: list[float]) -> list[float]:
    """Closed testing: a hypothesis falls where every set of hypotheses with it falls by Bonferroni's test."""
    adjusted = []
    for i in range(len(p)):
        others = [j for j in range(len(p)) if j != i]
        sets = [(i, *more) for k in range(len(p)) for more in itertools.combinations(others, k)]
        adjusted.append(max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets))
    return adjusted


if __name__ == "__main__":
    import numpy as np
    from scipy import stats

    for sums in ([3, -1, 2, 2, 1, -1, 4], [-4, -1, -1, -2, 1, -3, -1, -1], [1, 1, 1, 1, 1, -1]):
        made = stats.permutation_test((np.array(sums),), np.sum, permutation_type="samples", n_resamples=np.inf)
        print(sums, made.pvalue)
    print([float(stats.t.ppf(p, df)) for df, p in ((1, 0.975), (2, 0.95), (5, 0.975), (24, 0.99), (127, 0.975))])
