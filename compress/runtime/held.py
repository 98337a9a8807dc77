"""Layers of a KV cache that hold fewer tokens than the sequence they stand for, each its own.

`shortened` says it of a whole cache (tokens taken out before the decoder); here each layer says it of itself, since
blocks differ. Towards the code that makes masks and positions, such a layer answers as if it held everything; masks are
then cut to what it holds, block by block (`masks.block_mask`).
"""

from __future__ import annotations

from abc import ABC
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import UsageError
from .shortened import Shortened


class HeldLayer(ABC):  # as transformers' layers are: classes of the same layout can be exchanged
    """What a cache layer's class gains when it holds fewer tokens; `hold` mixes it in."""

    held: Shortened

    def get_seq_length(self) -> int:
        return self.held.span

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of keys, as if all tokens of the sequence were held."""
        window = window_of(self)
        offset = max(self.held.span - window + 1, 0) if window else 0
        return self.held.span - offset + query_length, offset

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.held = self.held.rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.held = self.held.rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.held = self.held.rows(lambda t: t[indices.to(t.device)])

    def reset(self) -> None:
        self.__class__ = type(self).__mro__[2]  # an empty layer stands for nothing but itself
        del self.held
        self.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of the sequence, which must all be held."""
        gone, width = -tokens_to_remove, self.held.slots.shape[1]
        last = self.held.slots[:, max(0, width - gone) :]
        if not 0 <= gone <= width or bool((last < self.held.span - gone).any()):
            raise UsageError(
                "the cache was cropped into its images",
                found=f"{gone} tokens removed from the end",
                change="crop answers only, or start with a fresh cache",
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        slots, valid = self.held.slots[:, : width - gone], self.held.valid[:, : width - gone]
        self.held = replace(self.held, slots=slots, valid=valid, span=self.held.span - gone)


_KINDS: dict[type, type] = {}  # class of a cache layer -> the same with HeldLayer mixed in


def hold(layer: Any, state: Shortened) -> None:
    """Make `layer` (of any transformers cache, in place, its tokens there already) one that holds `state`."""
    if not isinstance(layer, HeldLayer):
        kind = type(layer)
        if kind not in _KINDS:
            _KINDS[kind] = type(f"Held{kind.__name__}", (HeldLayer, kind), {})
        layer.__class__ = _KINDS[kind]
    window = window_of(layer)
    if window:  # it keeps the newest tokens only
        first = max(0, state.slots.shape[1] - window + 1)
        state = replace(state, slots=state.slots[:, first:], valid=state.valid[:, first:])
    layer.held = state


def held_by(layer: Any) -> Shortened | None:
    """What a cache layer holds; None where it holds all it stands for."""
    return layer.held if isinstance(layer, HeldLayer) else None


def window_of(layer: Any) -> int:
    """The sliding window of a cache layer; 0 where it has none."""
    return getattr(layer, "sliding_window", None) or 0
