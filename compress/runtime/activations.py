"""Rounding of what enters a linear to 8-bit integers, as a fact about that linear.

A model keeps ordinary `nn.Linear` modules: the rounding is a forward pre-hook, so that anatomy, statistics, saving and
export see the same modules and the same state dict as before, and every forward in torch really rounds. A walk's
statistics are of the rounded inputs.

The arithmetic is that of compressed-tensors, step by step, because its loader runs what svlm measured::

    token    scale = max|x| over the channels of the token / 127.5      zero = 0
    tensor   scale, zero from calibration
    q = round(clamp(x / scale + zero, -128, 127))      value = (q - zero) * scale

(127.5 is half of the 255 steps: the largest value is clipped by half a step, and all others get the finer one.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

LOW, HIGH = -128, 127


@dataclass(frozen=True)
class Activation:
    """How the input of a linear is rounded.

    Attributes:
        kind: ``token``: one scale a token, taken from the token when it comes (dynamic, symmetric). ``tensor``: one
            scale and zero point for all, from calibration (static, asymmetric).
        scale, zero: of ``tensor``; the scale has the precision that the model is saved in. bits: 8.
    """

    kind: Literal["token", "tensor"] = "token"
    scale: float = 0.0
    zero: int = 0
    bits: int = 8

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest value of ``tensor``."""
        return (LOW - self.zero) * self.scale, (HIGH - self.zero) * self.scale

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., channels] rounded, same dtype. Gradients pass straight through, but where a value is clipped."""
        if self.kind == "tensor" and torch.jit.is_tracing():  # a converter knows this operator, and no other spelling
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, LOW, HIGH)
        rounded = self._rounded(x.detach().float()).to(x.dtype)
        if not x.requires_grad:
            return rounded
        inside = x.clamp(*self.limits) if self.kind == "tensor" else x
        return inside + (rounded - inside).detach()

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "tensor":
            return ((x / self.scale + self.zero).clamp(LOW, HIGH).round() - self.zero) * self.scale
        scale = x.abs().amax(-1, keepdim=True) / ((HIGH - LOW) / 2)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return (x / scale).clamp(LOW, HIGH).round() * scale

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The forward pre-hook."""
        return (self.round(args[0]), *args[1:])


def install(linear: nn.Module, activation: Activation) -> None:
    """Let `linear` round its input, this way alone. It travels with `copy.deepcopy`."""
    remove(linear)
    linear.register_forward_pre_hook(activation.hook)


def installed(linear: nn.Module) -> Activation | None:
    """How `linear` rounds its input, if it does."""
    owners = (getattr(hook, "__self__", None) for hook in linear._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Activation)), None)


def remove(linear: nn.Module) -> None:
    """Let `linear` take its input as it is; nothing happens where it did."""
    hooks = linear._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Activation)]:
        del hooks[key]
