"""Many questions of one picture in one sequence, trained exactly as single questions are asked.

    <bos> <user> <image> x 64 | question 1 <assistant> answer 1 | question 2 <assistant> answer 2 | ...

Every question sees the shared prefix and itself, causally, and its positions go on where the prefix ends; so its
logits are those of a conversation of its own (`tests/demo` compares them). `language` is the Llama's forward with that
mask; in the last block it computes only the rows that predict an answer, which saves a fifth of the work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from . import build

PREFIX = 2 + build.VISUAL_TOKENS
IGNORED = -100


@dataclass(frozen=True)
class Layout:
    """B sequences of L tokens with up to R rows each that predict an answer token."""

    ids: Tensor  # [B, L] token ids
    positions: Tensor  # [B, L] position of a token within its own conversation
    segments: Tensor  # [B, L] 0 the shared prefix, k the k-th question, -1 padding
    rows: Tensor  # [B, R] which positions of L predict an answer token or <eos>
    labels: Tensor  # [B, R] what they should predict; IGNORED where a sequence has fewer rows

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        return Layout(*(getattr(self, field).to(device) for field in self.__dataclass_fields__))

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive attention mask [B, 1, L, L]: causal, within the own question and to the prefix."""
        segments, length = self.segments, self.segments.shape[1]
        same = segments[:, :, None] == segments[:, None, :]
        shared = (segments[:, None, :] == 0) & (segments[:, :, None] >= 0)
        causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        blocked = ~((same | shared) & causal)
        out = torch.zeros(blocked.shape, dtype=dtype, device=segments.device)
        return out.masked_fill_(blocked, torch.finfo(dtype).min)[:, None]


@functools.cache
def _tokenizer() -> Any:
    return build.build_processor().tokenizer


@functools.cache
def encode(text: str) -> tuple[int, ...]:
    """The ids of a question or an answer, without special tokens."""
    return tuple(_tokenizer()(text, add_special_tokens=False)["input_ids"])


def pack(batch: Sequence[Sequence[tuple[str, str]]], multiple: int = 8) -> Layout:
    """Lay out a batch: for each picture its (question, answer) pairs. L is rounded up to `multiple`."""
    special = {name: build.SPECIAL.index(f"<{name}>") for name in ("pad", "bos", "eos", "image", "user", "assistant")}
    prefix = [special["bos"], special["user"]] + [special["image"]] * build.VISUAL_TOKENS
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    segments: list[list[int]] = []
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    for pairs in batch:
        one, place, part = list(prefix), list(range(PREFIX)), [0] * PREFIX
        row: list[int] = []
        label: list[int] = []
        for number, (question, answer) in enumerate(pairs, 1):
            said = [*encode(question), special["assistant"]]
            heard = list(encode(answer))
            row += range(len(one) + len(said) - 1, len(one) + len(said) + len(heard))
            label += [*heard, special["eos"]]
            one += said + heard
            place += range(PREFIX, PREFIX + len(said) + len(heard))
            part += [number] * (len(said) + len(heard))
        for whole, mine in ((ids, one), (positions, place), (segments, part), (rows, row), (labels, label)):
            whole.append(mine)
    length = -(-max(map(len, ids)) // multiple) * multiple
    answers = max(map(len, rows))

    def table(lists: list[list[int]], width: int, fill: int) -> Tensor:
        out = np.full((len(lists), width), fill, dtype=np.int64)
        for i, values in enumerate(lists):
            out[i, : len(values)] = values
        return torch.from_numpy(out)

    return Layout(
        table(ids, length, special["pad"]),
        table(positions, length, 0),
        table(segments, length, -1),
        table(rows, answers, 0),
        table(labels, answers, IGNORED),
    )


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, 96, 96, 3] to what the processor makes of it: float [B, 3, 96, 96]."""
    config = _pictures()
    mean = torch.tensor(config.image_mean) * 255
    std = torch.tensor(config.image_std) * 255
    return ((torch.from_numpy(images.astype(np.float32)) - mean) / std).permute(0, 3, 1, 2).contiguous()


@functools.cache
def _pictures() -> Any:
    return build.build_processor().image_processor


def see(model: LlavaForConditionalGeneration, values: Tensor) -> Tensor:
    """Visual tokens as the language model gets them: pixel values [B, 3, 96, 96] to [B, 64, D]."""
    features = model.model.vision_tower(pixel_values=values).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(features)


def _rms(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _attend(attention: Any, queries: Tensor, context: Tensor, turn: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Attention of queries [B, R, D] to context [B, L, D]; turn: cos, sin of both in turn; mask [B, 1, R, L]."""
    batch, rows, _ = queries.shape
    size = attention.head_dim
    q = attention.q_proj(queries).view(batch, rows, -1, size).transpose(1, 2)
    k = attention.k_proj(context).view(batch, context.shape[1], -1, size).transpose(1, 2)
    v = attention.v_proj(context).view(batch, context.shape[1], -1, size).transpose(1, 2)
    q, k = _rotate(q, turn[0], turn[1]), _rotate(k, turn[2], turn[3])
    groups, repeat = k.shape[1], q.shape[1] // k.shape[1]
    q = (q * size**-0.5).reshape(batch, groups, repeat * rows, size)  # query heads of one group share its keys
    scores = (q @ k.transpose(2, 3)).view(batch, groups * repeat, rows, -1) + mask
    weights = scores.softmax(-1).view(batch, groups, repeat * rows, -1)
    mixed = (weights @ v).view(batch, groups * repeat, rows, size).transpose(1, 2).reshape(batch, rows, -1)
    return attention.o_proj(mixed)


def language(model: LlavaForConditionalGeneration, visual: Tensor, layout: Layout) -> Tensor:
    """Logits [B, R, V] at the rows that predict answers, from visual tokens [B, 64, D]."""
    llama = model.model.language_model
    x = llama.embed_tokens(layout.ids)
    x = torch.cat((x[:, :2], visual.to(x.dtype), x[:, PREFIX:]), dim=1)
    cos, sin = (t[:, None] for t in llama.rotary_emb(x, layout.positions))  # [B, 1, L, head]
    mask = layout.mask(x.dtype)
    for block in llama.layers[:-1]:
        seen = _rms(x, block.input_layernorm)
        x = x + _attend(block.self_attn, seen, seen, (cos, sin, cos, sin), mask)
        x = x + block.mlp(_rms(x, block.post_attention_layernorm))
    block = llama.layers[-1]
    seen = _rms(x, block.input_layernorm)
    x, asking = (take(t, layout.rows) for t in (x, seen))
    turn = (take(cos[:, 0], layout.rows)[:, None], take(sin[:, 0], layout.rows)[:, None], cos, sin)
    x = x + _attend(block.self_attn, asking, seen, turn, take(mask[:, 0], layout.rows)[:, None])
    x = x + block.mlp(_rms(x, block.post_attention_layernorm))
    return model.lm_head(_rms(x, llama.norm))


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, R] of x [B, L, D]: [B, R, D]."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[-1]))
