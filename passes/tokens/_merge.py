"""Visual tokens that become one: which of them, where the result stays, with what weights. Tensors in, tensors out.

What comes out is a pair (positions [images, k] ascending, weights [images, k, T]): the token at ``positions[j]``
becomes ``sum_t weights[j, t] features[t]`` (compress/runtime/images.py). No gradient passes through the choice; it
passes through the sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ._select import bands, cosines, precise


def cells(shape: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
    """Average pooling of a picture of `shape` (rows, columns) to k cells: positions [k], weights [k, rows * columns].

    The picture is cut into about ``sqrt(k rows / columns)`` bands of rows and these into cells, as even as whole tokens
    allow; every token is in exactly one cell, and a cell stays where its middle token is.
    """
    height, width = shape
    lines = bands(shape, k)
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    ends = torch.arange(lines + 1) * k // lines
    band = ((y + 1) * lines - 1) // height
    cell = ends[band] + ((x + 1) * ends.diff()[band] - 1) // width
    middle = [_extreme(v, cell, k, "amin") + _extreme(v, cell, k, "amax") for v in (y, x)]
    inside = one_hot(cell, k).T.float()
    return (middle[0] // 2) * width + middle[1] // 2, inside / inside.sum(1, keepdim=True)


def _extreme(values: Tensor, cell: Tensor, k: int, which: str) -> Tensor:
    return torch.zeros(k, dtype=torch.long).scatter_reduce(0, cell, values, which, include_self=False)


def visionzip(
    attention: Tensor, keys: Tensor, k: int, dominant: float = 54 / 64, add: bool = False
) -> tuple[Tensor, Tensor]:
    """The tokens that the tower attends to, and averages of the rest (VisionZip, arXiv 2412.04467).

    Of the k tokens the share `dominant` are those with the most attention. Of the rest, every so manyth is a target;
    each other one joins the target whose key is most alike (cosine).

    Args:
        attention: [images, T], larger stays rather. keys: [images, T, C].
        add: a target becomes itself plus the mean of those that joined it, as in the paper's code; else the mean of all
            of them.
    """
    leading = min(k, math.floor(dominant * k + 0.5))
    order = attention.argsort(dim=1, descending=True, stable=True)
    top, rest = order[:, :leading], order[:, leading:].sort(dim=1).values
    targets = rest[:, torch.arange(k - leading, device=rest.device) * rest.shape[1] // max(1, k - leading)]
    return joined(top, targets, _alike(keys), add)


def apet(features: Tensor, k: int, basis: int = 10) -> tuple[Tensor, Tensor]:
    """The tokens that few others explain, the rest merged into them (ApET, CVPR 2026).

    `basis` tokens are spread by farthest-point sampling (Euclidean; the first is the one farthest from the mean). Every
    token is written as their combination by least squares. The k tokens with the largest residual stay; each other
    one joins the kept token that it is most alike (cosine).

    Args:
        features: [images, T, D]. k: fewer than T. basis: at most the T - k tokens that go.
    """
    x = features.to(precise(features))
    spread = farthest(x, min(basis, x.shape[1] - k))
    stays = residual(x, spread).argsort(dim=1, descending=True, stable=True)[:, :k]
    return joined(stays[:, :0], stays, cosines(features))


def farthest(x: Tensor, m: int) -> Tensor:
    """m positions [images, m] spread over the points [images, T, D], in the order in which they were taken."""
    rows = torch.arange(len(x), device=x.device)
    taken = [(x - x.mean(dim=1, keepdim=True)).square().sum(-1).argmax(dim=1)]
    nearest = torch.full_like(x[..., 0], math.inf)
    for _ in range(m - 1):
        nearest = torch.minimum(nearest, (x - x[rows, taken[-1]][:, None]).square().sum(-1))
        taken.append(nearest.argmax(dim=1))
    return torch.stack(taken, dim=1)


def residual(x: Tensor, spread: Tensor) -> Tensor:
    """Squared error [images, T] of each point as the best combination of those at `spread` [images, m]."""
    basis = x.gather(1, spread[..., None].expand(-1, -1, x.shape[2]))
    inverse = torch.linalg.pinv(basis @ basis.transpose(1, 2), hermitian=True)  # m x m; two of them may be alike
    combination = x @ basis.transpose(1, 2) @ inverse
    error = (x - combination @ basis).square().sum(-1)
    return error.scatter(1, spread, 0)  # exact by definition: no rounding error may rank them


def joined(alone: Tensor, targets: Tensor, alike: Tensor, add: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens that stay `alone` [images, a] and `targets` [images, c] that take in all the others.

    Each other token joins the target with the largest `alike` [images, T, T]; without targets the others are gone.
    """
    images, tokens, _ = alike.shape
    kept = torch.cat([alone, targets], dim=1).sort(dim=1).values
    k = kept.shape[1]
    weights = one_hot(kept, tokens).to(alike.dtype)
    if not targets.shape[1]:
        return kept, weights
    stays = torch.zeros(images, tokens, dtype=torch.bool, device=alike.device).scatter(1, kept, True)
    open_to = torch.zeros_like(stays).scatter(1, targets, True)
    mine = alike.masked_fill(~open_to[:, None, :], -math.inf).argmax(dim=2)  # [images, T]: a token's target
    joins = one_hot(torch.searchsorted(kept, mine), k).transpose(1, 2) * ~stays[:, None, :]
    counts = joins.sum(2, keepdim=True)
    if add:
        return kept, weights + joins / counts.clamp_min(1)
    return kept, (weights + joins) / (1 + counts)


def _alike(keys: Tensor) -> Tensor:
    unit = normalize(keys.to(precise(keys)), dim=-1)
    return unit @ unit.transpose(1, 2)
