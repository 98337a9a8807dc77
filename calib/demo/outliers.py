"""Give the language model the outlier channels that large ones have; its answers stay what they are.

Rounding hurts large language models because a few input channels of a layer are far larger than the rest, and the
weights that read them far smaller. A model of four million parameters trained for an hour has nothing of the kind: 3
bits a weight cost it nothing, so nothing could be told from it about passes that deal with outliers. `spread` moves a
random factor a channel from the columns of the matrices that read a channel to what writes it: to the weight of the
norm before them, or to the rows of the up projection before the down projection. In exact arithmetic the function
is unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration


@torch.no_grad()
def spread(model: LlavaForConditionalGeneration, sigma: float, seed: int = 0) -> None:
    """Rescale every channel of the language model's blocks by exp(sigma * normal), in place."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.language_model.layers:
        attention, mlp = block.self_attn, block.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        _move(block.input_layernorm.weight, [q.weight, k.weight, v.weight], sigma, generator)
        _move(block.post_attention_layernorm.weight, [mlp.gate_proj.weight, mlp.up_proj.weight], sigma, generator)
        _move(mlp.up_proj.weight, [mlp.down_proj.weight], sigma, generator)


def _move(writer: Tensor, readers: Sequence[Tensor], sigma: float, generator: torch.Generator) -> None:
    """Scale the channels (first axis) of `writer` up and the columns of `readers` down, or the other way round."""
    factor = torch.exp(sigma * torch.randn(writer.shape[0], generator=generator)).to(writer)
    writer.mul_(factor.view(-1, *[1] * (writer.ndim - 1)))
    for weight in readers:
        weight.div_(factor)
