"""Blocks by their largest weight (QLoRA, arXiv 2305.14314), absmax quantized too. Pure: tensors in, tensors out.

Step by step as bitsandbytes computes it, so that its codes and absmax are these ones.
"""

from __future__ import annotations

import torch

from ...compress.runtime.codebook import RUN, Codebook, blocks_of, nearest, nearest_dynamic

TINY = 1e-38  # what an absmax of 0 is taken for when it divides


def blockwise(w: torch.Tensor, levels: str, dtype: torch.dtype, double: bool) -> tuple[torch.Tensor, Codebook]:
    """The nearest level of every weight, counted in its block's absmax: (codes uint8 [out, in], codebook).

    Args:
        w: [out, in]. levels: ``nf4`` or ``fp4``. dtype: what values are rounded to. double: absmax in 8 bits. The
            codes are chosen by the absmax before that.
    """
    blocks = blocks_of(w)
    absmax = blocks.abs().amax(1)
    codes = nearest(blocks * (1 / absmax.clamp(min=TINY))[:, None], levels).flatten()[: w.numel()].view(w.shape)
    word = str(dtype).removeprefix("torch.")
    if not double:
        return codes, Codebook(levels, word, absmax)
    return codes, Codebook(levels, word, *eight_bits(absmax))


def eight_bits(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize absmax [blocks]: (codes uint8 [blocks], largest distance from the mean of each run, mean)."""
    offset = absmax.mean()
    runs = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % RUN)).view(-1, RUN)
    nested = runs.abs().amax(1)
    codes = nearest_dynamic(runs * (1 / nested.clamp(min=TINY))[:, None])
    return codes.flatten()[: absmax.numel()], nested, offset
