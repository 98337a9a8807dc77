"""Alignment by definition: HSIC as a mean over quadruples, neighbours by sorting, Frechet by roots of matrices."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]


def hsic(x: Rows, y: Rows) -> float:
    """The U-statistic: mean over ordered quadruples of different rows of ``K_ij (L_ij + L_qr - 2 L_iq)``."""
    gram, other = x @ x.T, y @ y.T
    terms = [
        gram[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
        for i, j, q, r in itertools.permutations(range(len(x)), 4)
    ]
    return math.fsum(terms) / len(terms)


def cka(x: Rows, y: Rows) -> float:
    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def mutual_knn(x: Rows, y: Rows, k: int) -> float:
    def nearest(rows: Rows, i: int) -> set[int]:
        def cosine(j: int) -> float:
            a, b = rows[i], rows[j]
            return float(sum(a * b)) / math.sqrt(float(sum(a * a)) * float(sum(b * b)))

        return set(sorted((j for j in range(len(rows)) if j != i), key=cosine, reverse=True)[:k])

    return sum(len(nearest(x, i) & nearest(y, i)) for i in range(len(x))) / (k * len(x))


def mean_cosine(x: Rows, y: Rows) -> float:
    pairs = [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a in x for b in y]
    return math.fsum(pairs) / len(pairs)


def frechet(x: Rows, y: Rows) -> float:
    """By eigenvalues: those of ``S_x S_y`` are real and not negative."""
    means = [rows.mean(0) for rows in (x, y)]
    spreads = [np.cov(rows, rowvar=False) for rows in (x, y)]
    roots = np.sqrt(np.linalg.eigvals(spreads[0] @ spreads[1]).real.clip(0))
    apart = means[0] - means[1]
    return float(apart @ apart + np.trace(spreads[0]) + np.trace(spreads[1]) - 2 * roots.sum())


def mir_layer(visual: Rows, text: Rows) -> float:
    scale = sum(math.sqrt(float(row @ row)) for row in text) / len(text)

    def cleaned(rows: Rows) -> Rows:
        rows = rows / scale
        norms = [math.sqrt(float(row @ row)) for row in rows]
        middle = sorted(norms)[(len(norms) - 1) // 2]
        mean = sum(norms) / len(norms)
        deviation = math.sqrt(sum((n - mean) ** 2 for n in norms) / (len(norms) - 1))
        median = np.sort(rows, axis=0)[(len(rows) - 1) // 2]
        return np.stack([median if abs(n - middle) > 3 * deviation else row for n, row in zip(norms, rows)])

    return frechet(cleaned(visual), cleaned(text))
