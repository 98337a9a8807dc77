"""AWQ (Lin et al., arXiv 2306.00978): the scales that it tries, its clip search, its loss. Tensors in, tensors out."""

from __future__ import annotations

from typing import Literal

import torch

from ...compress.runtime.grid import Grid, dequantize, quantize
from ._rtn import absmax_grid, groups_of

Scaling = Literal["activation", "duo", "both"]
SMALLEST = 1e-4


def weight_means(w: torch.Tensor, group: int) -> torch.Tensor:
    """By input channel, [in]: the mean over rows of ``|w|`` as a share of the largest in its group. w: [out, in]."""
    parts = groups_of(w.float().abs(), group)
    return (parts / parts.amax(-1, keepdim=True).clamp(min=1e-12)).reshape(w.shape).mean(0)


def candidates(x: torch.Tensor, w: torch.Tensor, steps: int, scaling: Scaling) -> list[torch.Tensor]:
    """The per-channel scales to try, [in] each: the identity first, then ``steps`` ratios r = i / steps a curve.

    ``activation``: ``s = x^r`` (equation 5). ``duo``: ``s = x^r / w^(1-r)``. ``both``: one after the other. Each is
    divided by ``sqrt(max s * min s)``. Channels without input keep 1.

    Args:
        x: [in], mean ``|X|``. w: [in], see `weight_means`.
    """
    live = x > 0
    identity = torch.ones_like(x, dtype=torch.float32)
    if not bool(live.any()) or not bool(x.isfinite().all()):
        return [identity]
    size, weight = x.float().clamp(min=SMALLEST), w.float().clamp(min=SMALLEST)
    found = [identity]
    for curve in ("activation", "duo"):
        if scaling not in (curve, "both"):
            continue
        for step in range(curve == "activation", steps):  # x^0 is the identity
            ratio = step / steps
            scale = size**ratio / (weight ** (1 - ratio) if curve == "duo" else 1.0)
            alive = scale[live].clamp(min=SMALLEST)
            alive = alive / (alive.max() * alive.min()).sqrt()
            found.append(identity.masked_scatter(live, alive))
    return found


def scaled_rounding(w: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """``Q(W s) / s``: what the layer computes with when `scale` is folded. `grid` is that of ``W s``."""
    return dequantize(quantize(w * scale, grid), grid) / scale


def clipped_grid(
    w: torch.Tensor,
    h: torch.Tensor | None,
    bits: int,
    group: int,
    symmetric: bool,
    dtype: torch.dtype,
    steps: int = 10,
    shrink: float = 0.5,
) -> tuple[Grid, float]:
    """The grid of `w` whose groups are clipped where that moves the group's output less; the share of clipped groups.

    For each row and group the grid is that of the weights clamped to ``1 - shrink * i / steps`` of their largest,
    i = 0 .. steps - 1, and the least ``E[((q(w) - w) . x)^2]`` over the group's columns wins. With ``H = 2 E[x x^T]``
    that is, but for the factor, ``(q(w) - w) H_gg (q(w) - w)^T`` of the group's block of H: all tokens count, and none
    has to be kept. It is the weight itself that is rounded, so that a level below the clamp is of use.

    Args:
        w: [out, in]. h: [in, in]; None (or not finite, or zero) is the plain grid.
    """
    best = absmax_grid(w, bits, group, symmetric, dtype)
    if h is None or not bool(h.isfinite().all()) or not bool(h.any()):
        return best, 0.0
    parts = groups_of(w.float(), group)
    count, size = parts.shape[1:]
    blocks = h.float().reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    limit = parts.abs().amax(-1, keepdim=True)
    least = _group_error(w, best, blocks)
    clipped = torch.zeros_like(least, dtype=torch.bool)
    for step in range(1, steps):
        bound = limit * (1 - shrink * step / steps)
        trial = absmax_grid(parts.clamp(-bound, bound).reshape(w.shape), bits, group, symmetric, dtype)
        error = _group_error(w, trial, blocks)
        better = error < least
        least, clipped = torch.where(better, error, least), clipped | better
        best.scale = torch.where(better, trial.scale, best.scale)
        if best.zero is not None and trial.zero is not None:
            best.zero = torch.where(better, trial.zero, best.zero)
    return best, float(clipped.float().mean())


def _group_error(w: torch.Tensor, grid: Grid, blocks: torch.Tensor) -> torch.Tensor:
    """[out, groups]: ``d H_gg d^T`` of the rounding error d. blocks: [groups, size, size]."""
    difference = (dequantize(quantize(w, grid), grid) - w.float()).reshape(w.shape[0], *blocks.shape[:2])
    by_group = difference.transpose(0, 1)
    return ((by_group @ blocks) * by_group).sum(-1).T


def output_loss(found: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor | None) -> tuple[float, float]:
    """Weighted sum over tokens of the squared difference of two outputs [..., channels], and the sum of the weights.

    weights: [batch, tokens], in the order of the outputs' rows; None: all 1.
    """
    error = (found - wanted).float().square().sum(-1).flatten().double()
    weight = torch.ones_like(error) if weights is None else weights.flatten().to(error)
    return float(torch.where(weight > 0, error * weight, 0.0).sum()), float(weight.sum())
