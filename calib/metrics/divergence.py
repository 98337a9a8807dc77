"""How far one next-token distribution is from another, token by token."""

from __future__ import annotations

import torch


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """float32 log-softmax of `logits` [tokens, vocabulary]."""
    return logits.float().log_softmax(-1)


def shorten(log_p: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `top` most probable tokens and the mass of all the others.

    Returns:
        values, indices [tokens, top] and the log of the remaining mass [tokens].
    """
    values, indices = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
    rest = (1 - values.exp().sum(-1)).clamp(min=1e-12).log()
    return values, indices, rest


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """``KL(p || q) = sum_i p_i (log p_i - log q_i)`` in nats, for each row of [tokens, vocabulary]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def kl_shortened(values: torch.Tensor, indices: torch.Tensor, rest: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL over the teacher's top tokens and one lump of all others; never more than the full KL (log-sum inequality)."""
    q = log_q.gather(-1, indices)
    q_rest = (1 - q.exp().sum(-1)).clamp(min=1e-12).log()
    return ((values.exp() * (values - q)).sum(-1) + rest.exp() * (rest - q_rest)).clamp(min=0)
