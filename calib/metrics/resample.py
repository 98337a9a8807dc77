"""The bootstrap over pictures for any statistic that follows from sums over questions.

Questions about one picture are not independent, so whole pictures are drawn. A resample is a row of weights, how often
each picture was drawn; a statistic takes rows of weights and gives a figure, or several, a row. So all resamples are a
few matrix products (`weights @ table`, a table with a row a picture), and the estimate itself is the row of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
NORMAL = 1.959964  # two-sided 5 % level
CHUNK = 4_000_000  # weights that are held at once

Weights = NDArray[np.float64]  # [resamples, pictures]
Statistic = Callable[[Weights], NDArray[np.float64]]  # to [resamples] or [resamples, figures]


@dataclass(frozen=True)
class Pictures:
    """Which picture each question is about: `index` [questions] counts pictures in the order of their sorted names."""

    index: NDArray[np.int64]
    count: int

    @classmethod
    def of(cls, names: Sequence[str]) -> Pictures:
        found, index = np.unique(np.asarray(names), return_inverse=True)
        return cls(index, len(found))

    def table(self, cells: NDArray[np.int64], width: int, values: NDArray[np.float64] | None = None) -> Weights:
        """Counts, or sums of `values` [questions], by picture and cell [pictures, width]; a cell of -1 is left out."""
        there = cells >= 0
        flat = self.index[there] * width + cells[there]
        weights = None if values is None else values[there]
        return np.bincount(flat, weights, minlength=self.count * width).reshape(self.count, width).astype(np.float64)

    def sums(self, values: NDArray[np.float64] | Sequence[float]) -> Weights:
        """Sums of `values` [questions] by picture [pictures, 1]."""
        sums = np.bincount(self.index, np.asarray(values, dtype=np.float64), minlength=self.count)
        return sums.astype(np.float64)[:, None]


@dataclass(frozen=True)
class Resampled:
    """A statistic and what it is on resampled pictures: `estimate` [figures], `replicates` [resamples, figures]."""

    estimate: NDArray[np.float64]
    replicates: NDArray[np.float64]

    @property
    def error(self) -> NDArray[np.float64]:
        """Standard error of each figure, of the resamples in which it is defined."""
        there = ~np.isnan(self.replicates).all(0)
        found = np.full(there.shape, np.nan)
        found[there] = np.nanstd(self.replicates[:, there], axis=0)
        return found

    def percentile(self, figure: int = 0) -> list[float] | None:
        """The 95 % interval between quantiles of the resamples in which the figure is defined; None where few are."""
        values = self.replicates[:, figure]
        defined = values[~np.isnan(values)]
        return _ends(np.quantile(defined, [0.025, 0.975])) if 2 * len(defined) > len(values) else None

    def normal(self, figure: int = 0) -> list[float] | None:
        """The 95 % interval ``estimate ± 1.96 standard errors``: for statistics that choose before they measure."""
        half = NORMAL * self.error[figure]
        return _ends(self.estimate[figure] + np.array([-half, half]))

    def together(self) -> NDArray[np.float64]:
        """Intervals [figures, 2] that hold for all figures at once with 95 %.

        The 95 % quantile of the largest deviation in standard errors takes the place of 1.96 (the max-t bootstrap;
        Romano and Wolf 2005). A figure that no resample changes has an interval of no width.
        """
        error = self.error
        moving = error > 0
        if not moving.any():
            return np.stack([self.estimate, self.estimate], axis=1)
        off = np.abs(self.replicates[:, moving] - self.estimate[moving]) / error[moving]
        half = max(float(np.quantile(np.nan_to_num(off).max(1), 0.95)), NORMAL) * error
        return np.stack([self.estimate - half, self.estimate + half], axis=1)


def bootstrap(pictures: int, statistic: Statistic, *, resamples: int = RESAMPLES, seed: int = 0) -> Resampled:
    """`statistic` on all pictures, and on `resamples` draws of as many with replacement.

    The same arguments give the same resamples, whatever the statistic: what is compared is compared on the same draws.
    """
    draw = np.random.default_rng(seed)
    made = []
    step = max(1, CHUNK // pictures)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = draw.integers(0, pictures, (count, pictures)) + np.arange(count)[:, None] * pictures
        weights = np.bincount(drawn.ravel(), minlength=count * pictures).reshape(count, pictures)
        made.append(_wide(statistic(weights.astype(np.float64))))
    return Resampled(_wide(statistic(np.ones((1, pictures))))[0], np.concatenate(made))


def ratio(over: NDArray[np.float64], under: NDArray[np.float64]) -> NDArray[np.float64]:
    """``over / under``, not a number where `under` is zero."""
    return np.divide(over, under, out=np.full(np.broadcast(over, under).shape, np.nan), where=under != 0)


def _wide(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[:, None] if values.ndim == 1 else values


def _ends(pair: NDArray[np.float64]) -> list[float] | None:
    return [float(end) for end in pair] if np.isfinite(pair).all() else None
