"""How alike two sets of hidden states are, and how far visual tokens lie from text: pure maths on tensors.

Rows are samples (tokens, or questions), columns are channels. All sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NEIGHBOURS = 10
OUTLIER = 3.0  # standard deviations


def hsic(x: Tensor, y: Tensor) -> float:
    """The unbiased Hilbert-Schmidt independence criterion of linear kernels: HSIC_1 of Song et al. (JMLR 2012), eq. 5.

    With ``K = x x^T`` and ``L = y y^T``, their diagonals set to 0, and n rows::

        (tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 1'K L 1 / (n - 2)) / (n (n - 3))

    It is computed from ``x^T y``, so that it takes n times the product of the widths, not n^2. Moving all rows of one
    set by the same vector changes nothing.

    Args:
        x, y: [n, channels], at least 4 rows; widths may differ.

    Raises:
        ValueError: fewer than 4 rows, or not as many in both.
    """
    n = len(x)
    if n < 4 or len(y) != n:
        raise ValueError(f"HSIC_1 wants the same number of rows, at least 4: {n} and {len(y)}")
    x, y = (t.double() - t.double().mean(0) for t in (x, y))  # less cancellation
    (k_diagonal, k_rows), (l_diagonal, l_rows) = _kernel(x), _kernel(y)
    trace = (x.T @ y).square().sum() - k_diagonal @ l_diagonal
    sums = k_rows.sum() * l_rows.sum() / ((n - 1) * (n - 2))
    return float((trace + sums - 2 * (k_rows @ l_rows) / (n - 2)) / (n * (n - 3)))


def _kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of ``x x^T``, and its row sums without the diagonal; [n] each."""
    diagonal = x.square().sum(1)
    return diagonal, x @ x.sum(0) - diagonal


def cka(x: Tensor, y: Tensor) -> float | None:
    """Linear centred kernel alignment (arXiv 1905.00414) of unbiased estimates (`hsic`).

    ``HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y))``: 1 for the same states up to rotation, shift and one scale; near 0 for
    unrelated ones, where it may fall below 0.

    Returns:
        None where one side does not vary more than its sampling: then the ratio means nothing.

    Raises:
        ValueError: as `hsic`.
    """
    shared, own = hsic(x, y), (hsic(x, x), hsic(y, y))
    return shared / math.sqrt(own[0] * own[1]) if min(own) > 0 else None


def mutual_knn(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Share of a row's `k` nearest others in `x` that are also its nearest in `y`, mean over rows (arXiv 2405.07987).

    Near is a large cosine. Unrelated sets share ``k / (n - 1)``.

    Args:
        x, y: [n, channels]; widths may differ.

    Raises:
        ValueError: not more than `k` + 1 rows, or not as many in both.
    """
    n = len(x)
    if n < k + 2 or len(y) != n:
        raise ValueError(f"{k} neighbours want the same number of rows, at least {k + 2}: {n} and {len(y)}")
    near = [torch.zeros(n, n, dtype=torch.bool).scatter_(1, _nearest(t, k), True) for t in (x, y)]
    return float((near[0] & near[1]).sum() / (n * k))


def _nearest(x: Tensor, k: int) -> Tensor:
    unit = torch.nn.functional.normalize(x.double().cpu(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-math.inf).topk(k, dim=1).indices


def mean_cosine(x: Tensor, y: Tensor) -> float:
    """Mean cosine over all pairs of a row of `x` and a row of `y`, [*, channels] of one width."""
    first, second = (torch.nn.functional.normalize(t.double(), dim=1).mean(0) for t in (x, y))
    return float(first @ second)


def frechet(x: Tensor, y: Tensor) -> float:
    """Squared Frechet distance of two normal distributions with the means and covariances of `x` and `y`.

    ``|m_x - m_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^(1/2))``. With ``S = R^T R`` (R of a QR of the centred
    rows) the last trace is the sum of the singular values of ``R_x R_y^T``, so that no root of a matrix is taken.

    Args:
        x, y: [n, channels] and [m, channels], more rows than channels.

    Raises:
        ValueError: not more rows than channels: a covariance of such data is singular and the distance too large.
    """
    width = x.shape[1]
    if min(len(x), len(y)) <= width:
        raise ValueError(f"covariances of {width} channels want more rows than that: {len(x)} and {len(y)}")
    roots, means, traces = [], [], 0.0
    for rows in (x.double(), y.double()):
        mean = rows.mean(0)
        root = torch.linalg.qr(rows - mean, mode="r").R / math.sqrt(len(rows) - 1)
        traces += float(root.square().sum())
        roots.append(root)
        means.append(mean)
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return float((means[0] - means[1]).square().sum()) + traces - 2 * float(shared)


def mir_layer(visual: Tensor, text: Tensor) -> float:
    """One layer's share of the Modality Integration Rate (arXiv 2410.07167, section 3).

    Both sets are scaled so that the mean norm of a text token is 1. In each, rows whose norm is more than three
    standard deviations from the median norm become the median row (of two middle values the lower, as torch has it).
    Then the squared Frechet distance.

    Args:
        visual, text: hidden states of a layer [tokens, channels], more tokens than channels.

    Raises:
        ValueError: as `frechet`.
    """
    visual, text = visual.double(), text.double()
    scale = text.norm(dim=1).mean()
    return frechet(*(_without_outliers(rows / scale) for rows in (visual, text)))


def _without_outliers(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=1)
    far = (norms - norms.median()).abs() > OUTLIER * norms.std()
    return torch.where(far[:, None], rows.median(0).values, rows)


def mir(layers: Sequence[float]) -> float:
    """The Modality Integration Rate: log10 of the sum over layers. Lower: visual tokens lie more like text."""
    return math.log10(math.fsum(layers))
