"""Round-to-nearest: choosing the scales of a grid. Pure: tensors in, tensors out."""

from __future__ import annotations

import torch

from ...compress.runtime.grid import Grid, dequantize, quantize

CLIPS = [1.0 - 0.02 * k for k in range(36)]  # shares of the absolute maximum that the scale search tries: 1.00 to 0.30


def groups_of(w: torch.Tensor, group: int) -> torch.Tensor:
    """[out, in] as [out, groups, columns of a group]; group -1 is the whole row."""
    return w.reshape(w.shape[0], -1, w.shape[1] if group == -1 else group)


def absmax_grid(w: torch.Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype, clip: float = 1.0) -> Grid:
    """The plain grid of `w` [out, in].

    Symmetric: ``scale = max|w| / (2^(b-1) - 1)``. Asymmetric: ``scale = (max - min) / (2^b - 1)``, with 0 inside
    [min, max], and ``zero = round(-min / scale)``. `clip` shrinks the range. Scales are rounded to `dtype` here, before
    any integer is chosen; a group of zeros gets scale 1.
    """
    parts = groups_of(w.float(), group)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if symmetric:
        scale = clip * parts.abs().amax(-1) / high
        scale = torch.where(scale > 0, scale, 1.0).to(dtype)
        return Grid(bits, group, True, _positive(scale))
    bottom, top = clip * parts.amin(-1).clamp(max=0), clip * parts.amax(-1).clamp(min=0)
    scale = (top - bottom) / (high - low)
    scale = _positive(torch.where(scale > 0, scale, 1.0).to(dtype))
    zero = (low - bottom / scale.float()).round().clamp(low, high).to(torch.int8)
    return Grid(bits, group, False, scale, zero)


def searched_grid(
    w: torch.Tensor, importance: torch.Tensor | None, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> Grid:
    """The clipped grid with the least ``sum_j importance_j (w_j - w^_j)^2`` of every group (AutoRound's opt-RTN).

    Args:
        w: [out, in]. importance: [in], E[x^2] of the inputs; None weighs all alike.
    """
    weight = torch.ones(w.shape[1], dtype=torch.float32) if importance is None else importance.float()
    weight = weight.to(w.device)
    best = absmax_grid(w, bits, group, symmetric, dtype)
    least = _errors(w, best, weight, group)
    for clip in CLIPS[1:]:
        trial = absmax_grid(w, bits, group, symmetric, dtype, clip)
        error = _errors(w, trial, weight, group)
        better = error < least
        least = torch.where(better, error, least)
        best.scale = torch.where(better, trial.scale, best.scale)
        if best.zero is not None and trial.zero is not None:
            best.zero = torch.where(better, trial.zero, best.zero)
    return best


def _errors(w: torch.Tensor, grid: Grid, importance: torch.Tensor, group: int) -> torch.Tensor:
    """[out, groups]: the weighted squared rounding error of every group."""
    error = (w.float() - dequantize(quantize(w, grid), grid)).square() * importance
    return groups_of(error, group).sum(-1)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """A scale that underflowed in its dtype becomes the smallest normal number of it."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)
