"""Statistics of paired answers: the same questions, put to the original and to the small model.

Questions about one picture are not independent, so the bootstrap draws pictures, not questions. Of right and wrong
answers its interval is too narrow where few flip: `paired.evidence` with `compress.evidence.interval` is for these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
POWER = 1.959964 + 0.841621  # normal quantiles: two-sided 5 % level, 80 % power


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % percentile interval of ``mean(after) - mean(before)``, resampling clusters (pictures).

    `before` and `after` are right or wrong, or scores of any range.

    A resample's difference is the sum of its pictures' differences over the number of its questions. The same
    arguments give the same interval.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    sums = np.bincount(index, weights=difference, minlength=len(names))
    sizes = np.bincount(index, minlength=len(names)).astype(np.float64)
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, 4_000_000 // len(names))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        counts = draw.multinomial(len(names), np.full(len(names), 1 / len(names)), size=stop - start)
        means[start:stop] = (counts @ sums) / (counts @ sizes)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """Two-sided p of the exact McNemar test: ``min(1, 2 P(X <= min(b, c)))``, X binomial(b + c, 1/2).

    In whole numbers, so correctly rounded. Every flip counts as independent: of questions that share pictures,
    `paired.sign_flip` is the test.
    """
    n, k = right_to_wrong + wrong_to_right, min(right_to_wrong, wrong_to_right)
    term = total = 1
    for i in range(k):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**n)


def detectable(discordant: int, n: int, design_effect: float = 1.0) -> float:
    """The smallest difference that n pairs with this many discordant ones show with 80 % power at the 5 % level.

    The difference d solves ``d = (1.96 + 0.84) sqrt(s / n)`` (Connor 1987, to first order), s the share of discordant
    pairs: the observed one, or d itself where that is more, for a difference of d takes at least that many. Of pairs
    that come in clusters, n over the `design_effect` counts.
    """
    if n == 0:
        return 1.0
    pairs = n / design_effect
    return min(1.0, max(POWER * math.sqrt(discordant / n / pairs), POWER**2 / pairs))
