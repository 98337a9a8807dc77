"""Distillation losses: pure maths on logits that were picked at answer positions."""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 * mean over tokens of KL(teacher || student)`` in fp32 nats, both softened by `temperature` T.

    The mean runs over tokens, not over samples, so that the scale does not depend on the answers' lengths (Hinton et
    al., arXiv 1503.02531; forward KL as Minitron heals, arXiv 2407.14679).

    Args:
        student, teacher: logits [tokens, vocabulary]; tokens >= 1.
    """
    log_q = torch.log_softmax(student.float() / temperature, dim=-1)
    log_p = torch.log_softmax(teacher.float() / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2


def answer_positions(labels: Tensor, *, shifted: bool) -> Tensor:
    """Where logits predict an answer token: BoolTensor like `labels` [batch, tokens].

    Args:
        labels: -100 outside the answer.
        shifted: the logits at t predict the label at t + 1 (decoder-only models); else the label at t.
    """
    answer = labels != -100
    if not shifted:
        return answer
    ahead = torch.zeros_like(answer)
    ahead[:, :-1] = answer[:, 1:]
    return ahead
