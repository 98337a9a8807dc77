"""Activations in 8 bits and SmoothQuant, value by value."""

from __future__ import annotations

import math

import torch


def per_token(x: torch.Tensor) -> torch.Tensor:
    """[tokens, channels], each token on 255 steps over twice its largest absolute value."""
    out = torch.zeros_like(x)
    for i, token in enumerate(x.tolist()):
        largest = max(abs(v) for v in token)
        step = largest / 127.5 or 1.0
        for j, v in enumerate(token):
            out[i, j] = min(max(round(v / step), -128), 127) * step
    return out


def per_tensor(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """Any shape, all values on the same 256 levels."""
    flat = [(min(max(round(v / scale + zero), -128), 127) - zero) * scale for v in x.flatten().tolist()]
    return torch.tensor(flat).reshape(x.shape)


def smoothquant(x: torch.Tensor, weights: list[torch.Tensor], alpha: float) -> list[float]:
    """s_j of the inputs `x` [tokens, channels] of several linears [out, channels]."""
    scales = []
    for j in range(x.shape[1]):
        difficulty = max(abs(float(v)) for v in x[:, j])
        ease = max(abs(float(v)) for w in weights for v in w[:, j])
        if difficulty == 0 or ease == 0:
            scales.append(1.0)
        else:
            scales.append(math.exp(alpha * math.log(difficulty) - (1 - alpha) * math.log(ease)))
    return scales


def profile(vision: torch.Tensor, text: torch.Tensor, weight: float) -> list[float]:
    """Channel maxima of two kinds of tokens [tokens, channels], neither hidden by the size of the other."""
    tops = [[max(abs(float(v)) for v in part[:, j]) for j in range(part.shape[1])] for part in (vision, text)]
    shares = [[v / max(top) for v in top] for top in tops]
    joint = [max(math.sqrt(weight) * a, b) for a, b in zip(*shares, strict=True)]
    whole = max(max(tops[0]), max(tops[1]))
    return [v / max(joint) * whole for v in joint]


def best_range(x: torch.Tensor, weights: torch.Tensor, ends: list[float]) -> float:
    """The least weighted squared error of `x` [n] over all pairs of shrunk ends of its range."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    least = float("inf")
    for a in ends:
        for b in ends:
            scale = (high * b - low * a) / 255
            zero = min(max(round(-128 - low * a / scale), -128), 127)
            error = (per_tensor(x, scale, zero).double() - x.double()).square() @ weights.double()
            least = min(least, float(error))
    return least
