"""Distillation losses: pure maths, tensors in, tensors out. p is the teacher's distribution, q the student's."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Divergence = Literal["forward", "reverse", "skewed", "skewed_reverse"]


def divergence(
    student: Tensor, teacher: Tensor, kind: Divergence = "forward", temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """``T^2 * mean over tokens`` of a divergence in nats, both distributions softened by `temperature` T.

    ``forward``: KL(p || q), which covers all that the teacher may say (as Minitron heals, arXiv 2407.14679).
    ``reverse``: KL(q || p), which punishes what the teacher would not say. ``skewed``: KL(p || a p + (1 - a) q), whose
    gradient stays bounded where q is small, a = `skew`. ``skewed_reverse``: KL(q || (1 - a) p + a q) (both DistiLLM,
    arXiv 2402.03898). In fp32. The mean runs over tokens, not over samples, so that the scale does not depend on the
    answers' lengths (Hinton et al., arXiv 1503.02531).

    Args:
        student, teacher: logits [tokens, vocabulary]; tokens >= 1.
        skew: in (0, 1); the unskewed ones do not use it.
    """
    log_q = torch.log_softmax(student.float() / temperature, dim=-1)
    log_p = torch.log_softmax(teacher.float() / temperature, dim=-1)
    first, second = (log_q, log_p) if kind in ("reverse", "skewed_reverse") else (log_p, log_q)
    if kind in ("skewed", "skewed_reverse"):
        second = torch.logaddexp(first + math.log(skew), second + math.log(1 - skew))
    return (first.exp() * (first - second)).sum(-1).mean() * temperature**2


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


def state_distance(student: Tensor, teacher: Tensor, kind: Literal["mse", "cosine"] = "mse") -> Tensor:
    """Mean over tokens of how far hidden states are apart, as a share of their size; 0 where they are the same.

    ``mse``: ``|s - t|^2 / |t|^2``, token by token: the few tokens with huge states count like every other. ``cosine``:
    ``1 - cos(s, t)``, directions alone.

    Args:
        student, teacher: [tokens, width]; tokens >= 1.
    """
    s, t = student.float(), teacher.float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(s, t, dim=-1)).mean()
    size = t.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((s - t).square().sum(-1) / size).mean()


@torch.no_grad()
def nearest_pairs(student: Tensor, teacher: Tensor) -> Tensor:
    """For each row of `student` a row of its own in `teacher`, near by L1: LongTensor [student rows].

    Of all pairs that are left the nearest is taken, again and again. EM-KD matches by the Hungarian method, whose sum
    of distances is least; as the tokens that a model still sees have twins among the original's, the two hardly differ.

    Args:
        student: [n, vocabulary]. teacher: [m, vocabulary], m >= n.
    """
    apart = torch.cdist(student.float(), teacher.float(), p=1)
    found = torch.zeros(len(apart), dtype=torch.long, device=apart.device)
    for _ in range(len(apart)):
        row, column = divmod(int(apart.argmin()), apart.shape[1])
        found[row] = column
        apart[row], apart[:, column] = torch.inf, torch.inf
    return found
