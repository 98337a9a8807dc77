"""A KV cache that holds fewer tokens than the sequence it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError


@dataclass(frozen=True)
class Shortened:
    """Which tokens of the full sequence a cache holds.

    Attributes:
        slots: original places of the held tokens, [batch, held].
        valid: False where a slot only fills its row up and must never be attended to, [batch, held].
        span: how many tokens of the full sequence these slots stand for. Tokens after `span` are all held, in order.
    """

    slots: Tensor
    valid: Tensor
    span: int

    @classmethod
    def whole(cls, rows: int, length: int, device: torch.device) -> Shortened:
        """Of a sequence of `length` tokens, all are held."""
        slots = torch.arange(length, device=device).expand(rows, length)
        return cls(slots, torch.ones_like(slots, dtype=torch.bool), length)

    @property
    def missing(self) -> int:
        return self.span - self.slots.shape[1]

    def shorten_mask(self, mask: Tensor) -> Tensor:
        """Per-token values of the full sequence [batch, >= span] for the tokens that are held; 0 where not valid."""
        old = mask[:, : self.span].gather(1, self.slots).masked_fill(~self.valid, 0)
        return torch.cat([old, mask[:, self.span :]], dim=1)

    def grown(self, cache: Any) -> Shortened:
        """The same with the tokens that `cache` took in since."""
        return self.to(cache.get_seq_length())

    def to(self, length: int) -> Shortened:
        more = torch.arange(self.span, length, device=self.slots.device).expand(self.slots.shape[0], -1)
        slots = torch.cat([self.slots, more], dim=1)
        return Shortened(slots, torch.cat([self.valid, torch.ones_like(more, dtype=torch.bool)], dim=1), length)

    def extended(self, index: Tensor, valid: Tensor, new: int) -> Shortened:
        """After `new` more tokens, of which those at `index` [batch, q'] went into the cache."""
        slots = torch.cat([self.slots, self.span + index], dim=1)
        return Shortened(slots, torch.cat([self.valid, valid], dim=1), self.span + new)

    def rows(self, select: Any) -> Shortened:
        """The same with its rows selected or repeated by `select`."""
        return replace(self, slots=select(self.slots), valid=select(self.valid))


class ShortenedCache:
    """What a cache class gains when its content is shortened; `shortened` mixes it in.

    `get_seq_length` answers with the length of the full sequence, which is what generation code and position ids go
    by; `get_query_offset` and `get_mask_sizes`, which masks go by, with what is held. All that moves rows moves the
    record of what is held with them.
    """

    shortened_to: Shortened

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) + self.shortened_to.missing  # type: ignore[misc]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.shortened_to = self.shortened_to.rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.shortened_to = self.shortened_to.rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.shortened_to = self.shortened_to.rows(lambda t: t[indices.to(t.device)])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.__class__ = type(self).__mro__[2]  # an empty cache stands for nothing but itself
        del self.shortened_to

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self.get_query_offset() < self.shortened_to.slots.shape[1]:
            raise UsageError(
                "the cache was cropped into its images",
                found=f"{tokens_to_remove} tokens removed from the end",
                change="crop answers only, or start with a fresh cache",
            )


_KINDS: dict[type, type] = {}  # cache class -> the same with ShortenedCache mixed in


def shortened(cache: Any, state: Shortened) -> None:
    """Make `cache` (any transformers Cache, in place) one that holds `state`."""
    if not isinstance(cache, ShortenedCache):
        kind = type(cache)
        if kind not in _KINDS:
            _KINDS[kind] = type(f"Shortened{kind.__name__}", (ShortenedCache, kind), {})
        cache.__class__ = _KINDS[kind]
    cache.shortened_to = state


def state_of(cache: Any) -> Shortened | None:
    """What a cache holds; None where it holds all it stands for."""
    return cache.shortened_to if isinstance(cache, ShortenedCache) else None
