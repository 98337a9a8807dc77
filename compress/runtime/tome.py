"""Token merging (ToMe, Bolya et al., arXiv 2210.09461): pure maths, tensors in, tensors out.

Tokens are split alternately into sets A and B; every token of A names the one of B whose keys are most alike; the r
tokens of A that are most alike to theirs are averaged into them. What results are groups of tokens, of which a size
says how many tokens they stand for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

ALIKE, APART = 2.0, -2.0  # beyond any cosine


def matching(keys: Tensor, r: int, real: Tensor | None = None) -> Tensor:
    """Bipartite soft matching: which of n tokens become one.

    Every image by itself, ties towards the first token. Where some tokens are padding, these are merged among
    themselves, before all others, and never with a real one as long as there is a choice.

    Args:
        keys: [images, n, d], compared by their cosine.
        r: tokens to merge away, at most n // 2.
        real: bool [images, n], False for padding; None: all are real.

    Returns:
        Of each token the group that it is in afterwards, [images, n] in 0 ... n - r - 1; groups are in the order of
        those of their tokens that stay.
    """
    unit = normalize(keys.float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if real is not None:
        a, b = real[:, ::2, None], real[:, None, 1::2]
        scores = scores.masked_fill(a != b, APART).masked_fill(~(a | b), ALIKE)
    partner = scores.argmax(-1)
    best = scores.gather(2, partner[..., None]).squeeze(2)
    gone = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    stays = torch.ones(keys.shape[:2], dtype=torch.long, device=keys.device).scatter(1, 2 * gone, 0)
    number = stays.cumsum(1) - 1
    into = number.gather(1, 2 * partner.gather(1, gone) + 1)
    return number.scatter(1, 2 * gone, into)


def merged(states: Tensor, sizes: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Averages over groups, each token with the weight of its size.

    Args:
        states: [images, n, D]. sizes: [images, n] float, 0 for padding. groups: [images, n] in 0 ... count - 1.

    Returns:
        States [images, count, D] and sizes [images, count]. A group of padding alone has the size 0 and their mean.
    """
    exact = torch.promote_types(states.dtype, torch.float32)
    sizes = sizes.to(exact)
    blank = sizes.new_zeros(sizes.shape[0], count)
    total = blank.scatter_add(1, groups, sizes)
    members = blank.scatter_add(1, groups, torch.ones_like(sizes))
    empty = total == 0
    over = torch.where(empty, members, total).gather(1, groups)
    share = torch.where(empty.gather(1, groups), 1.0, sizes) / over
    weighted = (states.to(exact) * share[..., None]).flatten(0, 1)
    into = weighted.new_zeros(states.shape[0] * count, states.shape[2]).index_add(0, _rows(groups, count), weighted)
    return into.view(-1, count, states.shape[2]).to(states.dtype), total


def spread(states: Tensor, groups: Tensor) -> Tensor:
    """To each token what its group has: states [images, count, D], groups [images, n] -> [images, n, D]."""
    rows = _rows(groups, states.shape[1])
    return states.flatten(0, 1).index_select(0, rows).view(*groups.shape, states.shape[2])


def shares(steps: int, keep: float, schedule: str) -> list[float]:
    """Which share of the tokens is left after each of `steps` merges; the last one is `keep`.

    ``constant``: each merges as many. ``decreasing``: each fewer than the one before, in a line down to none.
    ``early``: those of the first half, rounded up, as many each, and the others none; more than half of them merge
    where each would otherwise have to merge more than half of what is there.
    """
    gone = [(i + 1) / steps for i in range(steps)]
    if schedule == "early":
        first = min(steps, max((steps + 1) // 2, math.ceil((1 - keep) / keep)))
        gone = [min(1.0, (i + 1) / first) for i in range(steps)]
    elif schedule == "decreasing":
        gone = [2 * t - t * t for t in gone]
    elif schedule != "constant":
        raise ValueError(f"a schedule is constant, decreasing or early, not '{schedule}'")
    return [1 - (1 - keep) * t if t < 1 else keep for t in gone]


def _rows(groups: Tensor, count: int) -> Tensor:
    """Groups of all images as rows of one table, [images * n]."""
    first = torch.arange(groups.shape[0], device=groups.device)[:, None] * count
    return (groups + first).flatten()
