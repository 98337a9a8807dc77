"""The cells that a picture is cut into, and which token stands for each. Tensors out; nothing here knows a model."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def cells(tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """k cells of an image of `tokens` visual tokens, as even as they can be.

    A square number of tokens is a picture, row by row; it is cut into R x C cells, R the largest divisor of k that is
    at most its root. Any other number (or one whose cells would not fit) is a sequence, cut into k pieces.

    Returns:
        Places [k], ascending, of the tokens in the middle of the cells, and the mean over each cell, [k, tokens]: rows
        of equal weights that add up to 1.
    """
    side = math.isqrt(tokens)
    rows = max(d for d in range(1, math.isqrt(k) + 1) if k % d == 0)
    if side * side != tokens or k // rows > side:
        middle, member = _pieces(tokens, k)
        return middle, member / member.sum(1, keepdim=True)
    (y, down), (x, across) = _pieces(side, rows), _pieces(side, k // rows)
    member = torch.einsum("rs,ct->rcst", down, across).reshape(k, tokens)
    return (y[:, None] * side + x).flatten(), member / member.sum(1, keepdim=True)


def _pieces(length: int, k: int) -> tuple[Tensor, Tensor]:
    """k pieces of a line: the place in the middle of each, [k], and 1 where a place lies in it, [k, length]."""
    ends = [(i * length) // k for i in range(k + 1)]
    member = torch.zeros(k, length)
    for i in range(k):
        member[i, ends[i] : ends[i + 1]] = 1
    return torch.tensor([(a + b - 1) // 2 for a, b in pairwise(ends)]), member
