"""Which visual tokens a block works on: those that it turns the furthest (ATV-Pruning, CVPR 2026).

The drift of a token in a block is ``1 - cos(x_in, x_out)``. Most visual tokens pass a block of the language model
nearly as they came; statistics over all tokens are statistics of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def drift(call: Any, output: Any) -> torch.Tensor | None:
    """``1 - cos`` of what enters a block and what leaves it, by token.

    Args:
        call: (args, kwargs) of the block. output: what it returned for them.

    Returns:
        [...], the shape of the hidden states without their channels; None where no tensor that entered has the shape of
        the first one that left (a projection, a head). A token that is not finite has a drift of NaN.
    """
    after = next((leaf for leaf in tree_leaves(output) if _floating(leaf)), None)
    if after is None:
        return None
    before = next((leaf for leaf in tree_leaves(call) if _floating(leaf) and leaf.shape == after.shape), None)
    if before is None:
        return None
    return 1 - torch.nn.functional.cosine_similarity(before.detach().float(), after.detach().float(), dim=-1)


def strongest(drifts: torch.Tensor, among: torch.Tensor, share: float) -> torch.Tensor:
    """Of each sample's tokens in `among` the `share` with the highest drift, rounded up; NaN is the highest.

    Args:
        drifts, among: [batch, tokens].

    Returns:
        Bool [batch, tokens].
    """
    wanted = (among.sum(1, keepdim=True) * share).ceil()
    scores = drifts.masked_fill(~among, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return among & (rank < wanted)


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
