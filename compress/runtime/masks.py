"""Attention masks and per-token tensors of a sequence from which tokens were taken out. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .shortened import Shortened


def order(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Of `kept` [batch, q]: the places of the q' = most kept tokens of a row, in order, filled up on the left."""
    last = kept.byte().argsort(dim=1, stable=True)
    index = last[:, kept.shape[1] - int(kept.sum(1).max()) :]
    return index, kept.gather(1, index)


def gather(value: Tensor, index: Tensor) -> Tensor:
    """Values [batch, q, ...] at the places `index` [batch, q']: [batch, q', ...]."""
    shape = index.shape + (1,) * (value.ndim - 2)
    return value.gather(1, index.view(shape).expand(index.shape + value.shape[2:]))


def shorten_mask(mask: Any, real: Tensor, index: Tensor, valid: Tensor, past: Shortened, causal: bool) -> Any:
    """The decoder's attention mask for chosen tokens.

    Args:
        mask: what the outer code made for all q new tokens: None, [batch, past + q], [batch, heads, q, past + q], or a
            dict of the latter by kind of layer.
        real: which of the q tokens are no padding, [batch, q].
        index, valid: see `order`. past: what the cache holds.
        causal: what attention does where a four-dimensional mask is None.
    """
    if isinstance(mask, dict):
        return {name: _shorten_4d(entry, index, valid, past, causal) for name, entry in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return _shorten_4d(mask, index, valid, past, causal)
    if mask is None and not causal and not bool(valid.all()):
        return _shorten_4d(None, index, valid, past, causal)
    # None is never passed on: without a mask, gaps in the position ids would read as several packed sequences
    old = past.valid.long() if mask is None else mask[:, : past.slots.shape[1]]
    new = real.to(old.dtype) if mask is None else mask[:, past.slots.shape[1] :]
    return torch.cat([old, new.gather(1, index).masked_fill(~valid, 0)], dim=1)


def _shorten_4d(mask: Tensor | None, index: Tensor, valid: Tensor, past: Shortened, causal: bool) -> Tensor | None:
    """[batch, heads, q, held + q] -> [batch, heads, q', held + q']; None is the attention's own rule."""
    rows, short = index.shape
    if mask is None:
        if bool(valid.all()):
            return None
        keys = torch.cat([past.valid, valid], dim=1)
        open_to = torch.ones(short, keys.shape[1], dtype=torch.bool, device=keys.device)
        return (open_to.tril(keys.shape[1] - short) if causal else open_to) & keys[:, None, None, :]
    held = mask.shape[-1] - mask.shape[-2]
    mask = mask.expand(rows, -1, -1, -1)
    mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    old, new = mask[..., :held], mask[..., held:]
    new = new.gather(3, index[:, None, None, :].expand(-1, mask.shape[1], short, -1))
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.cat([old, new.masked_fill(~valid[:, None, None, :], closed)], dim=-1)


def mask_far(mask: Tensor | None, asking: Tensor, held: Tensor, window: int) -> Tensor | None:
    """Mask what lies `window` or more original places back."""
    width = held.shape[1] if mask is None else mask.shape[-1]
    keys = held[:, -width:]
    far = (asking[:, :, None] - keys[:, None, :] >= window)[:, None]
    if not bool(far.any()):
        return mask
    if mask is None:
        mask = (keys[:, None, :] <= asking[:, :, None])[:, None]
    if mask.dtype == torch.bool:
        return mask & ~far
    return mask.masked_fill(far, torch.finfo(mask.dtype).min)


def windowed(decoder: Any, mask: Any, past: Shortened, index: Tensor, values: Mapping[str, Any], window: int) -> Any:
    """`mask` with sliding windows that count original distances, as if no token had been taken out.

    Args:
        mask: for the chosen tokens (`shorten_mask`). index: their places among the new tokens, [batch, q'].
        values: the decoder's other arguments, chosen tokens alone.
    """
    asking = past.span + index  # original places
    held = torch.cat([past.slots, asking], dim=1)
    if int(held.max()) < window:
        return mask
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        from transformers.masking_utils import create_masks_for_generate

        mask = create_masks_for_generate(
            config=decoder.config,
            inputs_embeds=values["inputs_embeds"],
            attention_mask=held.new_ones(held.shape) if mask is None else mask,
            past_key_values=values.get("past_key_values"),
            position_ids=None,
        )
    if isinstance(mask, dict):
        name = "sliding_attention"
        return {**mask, name: mask_far(mask.get(name), asking, held, window)} if name in mask else mask
    return mask_far(mask, asking, held, window)
