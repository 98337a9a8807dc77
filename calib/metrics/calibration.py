"""Whether a model is as often right as it is sure: expected calibration error of answer confidence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...compress.base import Json

BINS = 15


def calibration(
    confidence: Sequence[float], right: Sequence[bool], bins: int = BINS
) -> tuple[float, list[dict[str, Json]]]:
    """Expected calibration error, and the bins that it is made of.

    Confidences in [0, 1] go into `bins` of equal width, bin m from ``(m - 1) / bins`` (not itself in it) to
    ``m / bins``; the error is the mean distance between a bin's mean confidence and its share of right answers, each
    bin weighted by its answers: ``ECE = sum_m n_m / n * |acc_m - conf_m|``.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599), equation 3; 15 bins as
    there.

    Returns:
        The error in [0, 1] (0 of no answers), and of every bin that is not empty: low, high, n, confidence, accuracy.
    """
    sure, hit = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    rows: list[dict[str, Json]] = []
    for m in np.unique(place):
        inside = place == m
        rows.append(
            {
                "low": float(m / bins),
                "high": float((m + 1) / bins),
                "n": int(inside.sum()),
                "confidence": float(sure[inside].mean()),
                "accuracy": float(hit[inside].mean()),
            }
        )
    error = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / max(len(sure), 1)
    return float(error), rows
