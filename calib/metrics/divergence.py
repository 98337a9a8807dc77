"""How far one next-token distribution is from another, token by token."""

from __future__ import annotations

import math

import torch

_LEAST = 1e-12  # mass of the lump of the rest, so that its logarithm is finite


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """float32 log-softmax of `logits` [tokens, vocabulary]."""
    return logits.float().log_softmax(-1)


def shorten(log_p: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `top` most probable tokens and the mass of all the others.

    Returns:
        values, indices [tokens, top] and the log of the remaining mass [tokens].
    """
    values, indices = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
    return values, indices, _rest(values)


def _rest(values: torch.Tensor) -> torch.Tensor:
    return (1 - values.double().exp().sum(-1)).clamp(min=_LEAST).log().float()


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """``KL(p || q) = sum_i p_i (log p_i - log q_i)`` in nats, for each row of [tokens, vocabulary]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def kl_shortened(values: torch.Tensor, indices: torch.Tensor, rest: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL over the teacher's top tokens and one lump of all others; never more than the full KL (log-sum inequality)."""
    q = log_q.gather(-1, indices)
    return ((values.exp() * (values - q)).sum(-1) + rest.exp() * (rest - _rest(q))).clamp(min=0)


def perplexity(log_p: torch.Tensor) -> float:
    """``exp`` of the mean negative log-probability of the reference tokens [tokens]; at most ``exp(700)``."""
    return math.exp(min(-float(log_p.double().mean()), 700.0))
