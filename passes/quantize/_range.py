"""The scale and zero point of a whole tensor, from how its values are spread. Pure maths."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...compress.runtime.activations import HIGH, LOW, Activation

SHRINKS = tuple(2 ** (-k / 8) for k in range(57))  # of either side of the range: 1 to 1/128
ROUNDS = 3


@dataclass(frozen=True)
class Spread:
    """Values in bins.

    Attributes:
        centres, weight: [bins] float64, the middle of each and what its values weigh. low, high: the true extremes.
    """

    centres: torch.Tensor
    weight: torch.Tensor
    low: float
    high: float


def tensor_activation(low: float, high: float, dtype: torch.dtype) -> Activation:
    """256 levels over [low, high], widened to hold 0 exactly; the scale as `dtype` has it, rounded up.

    ``scale = (high - low) / 255``, ``zero = round(-128 - low / scale)``.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    wanted = (high - low) / (HIGH - LOW)
    step = torch.tensor(wanted).to(dtype).clamp(min=torch.finfo(dtype).tiny)
    if float(step) < wanted:
        step = torch.nextafter(step, torch.full_like(step, float("inf")))
    scale = float(step) if high > low else 1.0
    return Activation("tensor", scale, int(min(max(round(LOW - low / scale), LOW), HIGH)))


def squared_error(spread: Spread, activation: Activation) -> float:
    """``sum_b weight_b (centre_b - round(centre_b))^2``."""
    x = spread.centres
    q = (x / activation.scale + activation.zero).clamp(LOW, HIGH).round_()
    return float(((q - activation.zero) * activation.scale - x).square_() @ spread.weight)


def best_activation(spread: Spread, dtype: torch.dtype) -> Activation:
    """The range with the least squared error: clipping few values makes the steps of all others finer.

    Both sides of the range are shrunk together first, then each alone by turns. The whole range is among the trials.
    """
    found: dict[Activation, float] = {}

    def error(shrink_low: float, shrink_high: float) -> float:
        trial = tensor_activation(spread.low * shrink_low, spread.high * shrink_high, dtype)
        if trial not in found:
            found[trial] = squared_error(spread, trial)
        return found[trial]

    down = up = min(SHRINKS, key=lambda s: error(s, s))
    for _ in range(ROUNDS):
        down = min(SHRINKS, key=lambda s: error(s, up))
        up = min(SHRINKS, key=lambda s: error(down, s))
    return min(found, key=lambda activation: found[activation])
