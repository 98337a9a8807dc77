"""Modality pre-fusion: blocks in front of the decoder in which text reads all visual tokens, and a few tokens for them.

The mechanism of `fuse.prefuse` (after LLaVA-Mini, arXiv 2501.03895). A `Prefusion` is the `rewrite` of a `Reduction`;
for the tokens of one call that has images::

    h  = block_N(... block_1(x))            x [batch, q, D]: embeddings of all tokens of the call, visual ones too
    x' = x + gate * (h - x) |x| / |h - x|   prompt and visual tokens; one gate a channel for text, one for visual
    c  = attention(queries, x'[image])      n tokens for each image; the decoder sees these and the text

What the blocks add is brought to the size of the token before a gate counts it: a first block may add a hundred times
an embedding, and to some tokens far more than to others.

The blocks are run by the decoder's own forward, with its rotary embedding, masks, position ids and deep features, so
that they compute what the decoder's blocks would. They keep no cache: they run once for a prompt, over the tokens of
that call. Answers are not fused: neither those that labels mark nor those that `generate` makes, with or without a
cache. Rows without images are left as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .images import Chosen
    from .reduce import Call

SLOT = "prefusion"  # name of the Prefusion among the model's children
BLOCK = "fuse"  # its blocks are fuse0, fuse1, ...
BASE = 10_000.0  # of the wave lengths of places
SMALL = 1e-6  # below it, what the blocks add to a token is nothing


class QueryCompressor(nn.Module):
    """n tokens out of an image: cross-attention of n queries over its visual tokens, and the gates of pre-fusion.

    It starts as the mix that `prior` says: ``softmax(log prior + q k / sqrt(d)) v`` with q = 0 and v, o the identity.

    Args:
        tokens: queries. width: channels of a token. gate: those of text at the start; those of visual tokens are 0.
    """

    def __init__(self, tokens: int, width: int, gate: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.heads = math.gcd(width, 8)
        self.query = nn.Parameter(0.02 * torch.randn(tokens, width, generator=generator))
        self.gate = nn.Parameter(torch.tensor([[gate], [0.0]]).repeat(1, width))  # of text, of visual tokens
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        with torch.no_grad():
            self.q_proj.weight.zero_()
            for linear in (self.k_proj, self.v_proj, self.o_proj):
                linear.weight.copy_(torch.eye(width))

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        """`features` [images, T, D] and `prior` [images, n, T], rows that add up to 1 -> [images, n, D]."""
        images, places, width = features.shape
        spots = sinusoids(places, width).to(features)
        query = F.layer_norm(self.query, (width,)) + prior.to(features) @ spots
        key = F.layer_norm(features, (width,)) + spots

        def split(x: Tensor) -> Tensor:
            return x.view(images, -1, self.heads, width // self.heads).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            split(self.q_proj(query)),
            split(self.k_proj(key)),
            split(self.v_proj(features)),
            attn_mask=prior.to(features).log()[:, None],
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(images, -1, width))


class Prefusion(nn.Module):
    """The blocks and the compressor; `Reduction` calls it as its `rewrite`.

    Args:
        blocks: of the decoder's own kind.
        layers, norm: what the decoder calls its list of blocks and its last norm.
        kinds: the kind of attention of each block, where the decoder's config says so for its own.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], compressor: QueryCompressor, layers: str, norm: str, kinds: Sequence[str]
    ) -> None:
        super().__init__()
        for number, block in enumerate(blocks):
            self.add_module(f"{BLOCK}{number}", block)
        self.compress = compressor
        self.layers, self.norm, self.kinds = layers, norm, list(kinds)

    @property
    def blocks(self) -> list[nn.Module]:
        return [module for name, module in self.named_children() if name.startswith(BLOCK)]

    def forward(self, embeds: Tensor, call: Call, chosen: list[Chosen]) -> Tensor:
        """The embeddings that the decoder is given: fused text, and at the places that stay of images their tokens."""
        states = self._run(embeds, call)
        pictured = call.visual.any(1, keepdim=True)
        text, visual = ((mask & pictured)[..., None] for mask in (call.prompt, call.visual))
        gate = torch.where(visual, self.compress.gate[1], self.compress.gate[0])
        added = states - embeds
        added = added * (embeds.norm(dim=-1, keepdim=True) / added.norm(dim=-1, keepdim=True).clamp_min(SMALL))
        fused = torch.where(text | visual, embeds + gate * added, embeds)
        flat = fused.flatten(0, 1)
        for one in chosen:
            if one.choice.weights is not None:
                new = self.compress(flat[one.places], one.choice.weights)
                flat = flat.index_put((one.kept.flatten(),), new.flatten(0, 1))
        return flat.view_as(embeds)

    def _run(self, embeds: Tensor, call: Call) -> Tensor:
        """What the blocks make of all tokens of the call, [batch, q, D]."""
        decoder, given = call.decoder, dict(call.inputs)
        inner = copy.copy(decoder)  # the same rotary embedding and config, other blocks
        config = vars(inner)["config"] = copy.copy(decoder.config)
        config.num_hidden_layers = len(self.blocks)
        if self.kinds:
            config.layer_types = self.kinds
        modules = {self.layers: nn.ModuleList(self.blocks), self.norm: nn.Identity()}
        vars(inner)["_modules"] = {**decoder._modules, **modules}
        for name in [name for name in given if name.startswith("output_")]:
            del given[name]
        given |= {"inputs_embeds": embeds, "past_key_values": None, "use_cache": False}
        given["attention_mask"] = _of_the_new(given.get("attention_mask"), embeds.shape[1])
        if given.get("position_ids") is None:
            given["position_ids"] = call.positions
        return type(decoder).forward(inner, **given).last_hidden_state


def _of_the_new(mask: Any, new: int) -> Any:
    """An attention mask without the keys that are in the cache."""
    if isinstance(mask, dict):
        return {name: _of_the_new(entry, new) for name, entry in mask.items()}
    return mask[..., -new:] if isinstance(mask, Tensor) else mask


def sinusoids(places: int, width: int) -> Tensor:
    """Sines and cosines of the places of an image, [places, width]: of row and column where the number is a square."""
    side = math.isqrt(places)
    at = torch.arange(places)
    axes = [at // side, at % side] if side * side == places else [at]
    each = width // (2 * len(axes))
    rates = BASE ** (-torch.arange(each) / each)
    angles = [axis[:, None] * rates for axis in axes]
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(waves, (0, width - waves.shape[1]))
