"""Shares of a loss: how much of a sum over questions another sum is, with intervals over pictures.

Both sums are over the same questions, so that what is hard about a question is in both and cancels: the interval of
their ratio is far narrower than those of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .pairs import RESAMPLES


def resampled_shares(
    whole: Sequence[float],
    parts: Sequence[Sequence[float]],
    clusters: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """``sum(part) / sum(whole)`` in resamples of the pictures, for all parts in the same resamples.

    The bootstrap of a ratio of sums, drawing clusters (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapters 8 and 10). The same arguments give the same draws.

    Args:
        whole: a figure of each question [n], none below 0. parts: others of the same questions [k][n].
        clusters: the picture of each question [n].

    Returns:
        float64 [resamples, k]; 0 where none of the questions drawn has lost anything.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    rows = np.vstack([np.asarray(whole, dtype=np.float64)[None], np.asarray(parts, dtype=np.float64)])
    sums = np.zeros((len(names), len(rows)))
    np.add.at(sums, index, rows.T)
    draw = np.random.default_rng(seed)
    found = np.empty((resamples, len(parts)))
    step = max(1, 4_000_000 // len(names))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        counts = draw.multinomial(len(names), np.full(len(names), 1 / len(names)), size=stop - start)
        totals = counts @ sums
        base = totals[:, :1]
        found[start:stop] = np.divide(totals[:, 1:], base, out=np.zeros_like(totals[:, 1:]), where=base > 0)
    return found


def interval(draws: np.ndarray) -> list[float]:
    """The 95 % percentile interval of draws [resamples]."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)]
