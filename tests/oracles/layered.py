"""Visual tokens treated block by block, the naive way: every block runs on everything, then what must not be is undone.

Dropped and hidden tokens are masked out of each block's attention one by one; frozen ones get their state back after
the block; which tokens stay is read off the attention weights that eager attention returns.
"""

from __future__ import annotations

import copy
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


def logits(
    model: Any,
    batch: dict[str, Tensor],
    decoder_path: str,
    image: int,
    rows: list[int],
    *,
    frozen: tuple[int, ...] = (),
    hidden: tuple[int, ...] = (),
    ranks: tuple[int, ...] = (),
    keep: dict[int, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits [batch, tokens, vocabulary], and which tokens are left in the end, bool [batch, tokens].

    Args:
        rows: place of the prompt's last token in each row. frozen, hidden, ranks: numbers of blocks. keep: block ->
            share of each image that is left from there.
    """
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    blocks = list(model.get_submodule(decoder_path).layers)
    visual = batch["input_ids"] == image
    left = torch.ones_like(visual)
    paid = torch.zeros(visual.shape)
    weights: list[Tensor] = []

    def masked(mask: Tensor, allowed: Tensor) -> Tensor:
        mask = mask.expand(len(allowed), -1, -1, -1).clone()
        for row in range(len(allowed)):
            for place in range(allowed.shape[1]):
                if not allowed[row, place]:
                    mask[row, :, :, place] = torch.finfo(mask.dtype).min
        return mask

    def before(number: int) -> Any:
        def hook(block: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            nonlocal left
            if number in ranks:
                weights.clear()
                type(block).forward(
                    block, *args, **(kwargs | {"attention_mask": masked(kwargs["attention_mask"], left)})
                )
                for row, place in enumerate(rows):
                    paid[row] = weights[-1][row, :, place].mean(0)
            if keep and number in keep:
                for row in range(len(visual)):
                    start = 0
                    for is_visual, run in groupby(visual[row].tolist()):
                        length = len(list(run))
                        if is_visual:
                            count = max(1, int(keep[number] * length + 0.5))
                            mine = [p for p in range(start, start + length) if left[row, p]]
                            best = sorted(mine, key=lambda p: -float(paid[row, p]))[:count]
                            for place in range(start, start + length):
                                left[row, place] = place in best
                        start += length
            allowed = left & ~visual if number in hidden else left
            return args, kwargs | {"attention_mask": masked(kwargs["attention_mask"], allowed)}

        return hook

    def after(number: int) -> Any:
        def hook(block: Any, args: tuple, kwargs: dict, out: Any) -> Any:
            if number not in frozen:
                return None
            return torch.where(visual[..., None], args[0], out)

        return hook

    for number, block in enumerate(blocks):
        attention = next(m for m in block.modules() if "Attention" in type(m).__name__)
        attention.register_forward_hook(lambda m, a, out: weights.append(out[1].detach()))
        block.register_forward_pre_hook(before(number), with_kwargs=True)
        block.register_forward_hook(after(number), with_kwargs=True)
    with torch.no_grad():
        return model(**batch, use_cache=False).logits, left
