"""Muon, an optimizer for matrices: the demo model's and that of distillation; for processors without fast bfloat16.

`torch.optim.Muon` orthogonalises one matrix at a time and in bfloat16, which most CPUs emulate. Here the matrices of
one shape are stacked, and the Newton-Schulz iterations run in float32. (Jordan et al., 2024; the same coefficients.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Matrices [N, rows, columns] with all singular values moved close to one."""
    a, b, c = COEFFICIENTS
    wide = x.shape[-2] > x.shape[-1]
    y = x.mT if wide else x
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if wide else y


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; `lr` is the size of a step relative to an orthogonal matrix of that shape."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    gradient = p.grad
                    assert gradient is not None
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(average, group["momentum"]))
                stacked = orthogonalise(torch.stack(updates)) * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, stacked.unbind()):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
