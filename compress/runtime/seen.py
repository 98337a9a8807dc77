"""Which tokens a model's parts work on after passes that take visual tokens away: what calibration goes by.

Two mechanisms take them away, one before the decoder (`reduce`), one inside it, block by block (`layered`). `seen`
tells what became of the last prefill's sequence under both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from . import layered, reduce, rules

Rows = tuple[Tensor, Tensor]  # places [batch, n], False where one only fills its row up
BESIDE = ("attn.k", "attn.v", "attn.qkv")  # roles of the linears that tokens which do not ask go through as well


@dataclass(frozen=True)
class Kept:
    """What passes left of a batch's sequence.

    Attributes:
        whole: places in the full sequence of the tokens that the decoder is given; None: all.
        blocks: blocks of the decoder that do not work on all of these. Places are among the decoder's tokens.
        through: which of the decoder's tokens come out of it, bool [batch, q]; None: all.
    """

    whole: Rows | None = None
    blocks: Mapping[nn.Module, layered.Worked] = field(default_factory=dict)
    through: Tensor | None = None

    def inputs(self, block: nn.Module, role: str) -> Rows | None:
        """Places in the full sequence of the rows of a linear's input, inside the decoder; None: all tokens, in order.

        Where tokens come to a linear in two calls, one call's after the other's.
        """
        worked = self.blocks.get(block)
        if worked is None:
            return self.whole
        parts = [worked.beside, worked.asking] if role in BESIDE else [worked.asking]
        places, valid = (torch.cat(pair, dim=1) for pair in zip(*parts))
        if self.whole is None:
            return places, valid
        return self.whole[0].gather(1, places), valid & self.whole[1].gather(1, places)

    def after(self, like: Tensor) -> Tensor | None:
        """Which tokens of the full sequence come out of the decoder, bool as `like` [batch, S]; None: all."""
        if self.whole is None:
            return None if self.through is None else self.through.to(like.device)
        places, valid = self.whole
        valid = valid if self.through is None else valid & self.through
        return torch.zeros_like(like, dtype=torch.bool).scatter(1, places.to(like.device), valid.to(like.device))

    def returned(self, block: nn.Module, values: Tensor) -> Tensor:
        """Values of the tokens that a block works on [batch, a], for all that it returns [batch, q]; others get 0."""
        worked = self.blocks.get(block)
        if worked is None or self.through is None:
            return values
        places, valid = (t.to(values.device) for t in worked.asking)
        blank = values.new_zeros(self.through.shape)
        return blank.scatter(1, places, values.masked_fill(~valid, 0))

    def taken(self, block: nn.Module, role: str, values: Tensor) -> Tensor:
        """Values of all tokens that a block is given [batch, q], for the rows of a linear's input."""
        worked = self.blocks.get(block)
        if worked is None:
            return values
        parts = [worked.beside, worked.asking] if role in BESIDE else [worked.asking]
        return values.gather(1, torch.cat([places for places, _ in parts], dim=1).to(values.device))

    def apart(self, block: nn.Module, role: str) -> bool:
        """Whether a linear is called twice, with the tokens beside first."""
        worked = self.blocks.get(block)
        return worked is not None and role in BESIDE and worked.beside[0].shape[1] > 0

    def since(self, earlier: Kept | None) -> Kept:
        """The same, with what an earlier forward of the batch tells of blocks that did not run this time."""
        if earlier is None or not earlier.blocks:
            return self
        through = earlier.through if self.through is None else self.through
        return replace(self, blocks={**earlier.blocks, **self.blocks}, through=through)


def seen(model: nn.Module) -> Kept | None:
    """What became of the sequence of the last prefill; None where nothing was taken away."""
    reduction, by_block = reduce.installed(model), layered.installed(model)
    whole = reduction.last if reduction is not None else None
    last = by_block.last if by_block is not None else layered.Last()
    if whole is None and not last.blocks:
        return None
    return Kept(whole, dict(last.blocks), last.through)


def wants_labels(model: nn.Module) -> bool:
    """Whether which tokens stay depends on where the prompt ends: a forward with an answer then needs `labels`."""
    reduction = reduce.installed(model)
    return (reduction is not None and reduction.reads_labels) or rules.wants_labels(model)


def chooses_again(model: nn.Module) -> bool:
    """Whether other weights can mean other visual tokens."""
    return reduce.installed(model) is not None or rules.wants_labels(model)
