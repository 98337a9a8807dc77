"""What the vision tower knows of its patches: the attention and the keys of one of its blocks, by visual token.

Read at the block's input: its own norm and projections give queries and keys, the attention of what is asked for is
computed from them once more (one row where the tower has a class token; streamed otherwise), and `output_attentions` is
never needed, so that the tower runs with any kernel. Which patches a visual token is made of is data (`Cells`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .hooks import named, owner

if TYPE_CHECKING:
    from ..units import Unit

SEEN = "_svlm_seen"  # attribute of the tower's output
LIMIT = 1 << 24  # attention weights held at once


@dataclass(frozen=True)
class Cells:
    """Which patches become one visual token.

    Attributes:
        patches: rows and columns of patches of a picture, row by row; what the tower has besides comes before them.
            None: the tower's sequence is patches alone, in the order of the visual tokens, `side`^2 for each.
        side: a visual token is made of side x side patches.
        windows: where such cells stand in windows inside the tower: the window's size and the patch's, in pixels.
        whole: the blocks that attend over the whole picture; None: all.
    """

    patches: tuple[int, int] | None = None
    side: int = 1
    windows: tuple[int, int] | None = None
    whole: tuple[int, ...] | None = None

    def block(self, blocks: int) -> int:
        """Of a tower's `blocks` the last but one, or the last that attends over the whole picture."""
        last = max(0, blocks - 2)
        return last if self.whole is None or last in self.whole else max(i for i in self.whole if i < blocks)

    def by_token(self, values: Tensor, grid: Tensor | None) -> Tensor:
        """Means over the patches of each visual token: [images, P, C] to [visual tokens, C].

        Args:
            grid: of pictures of any size, [pictures, 3]: frames, rows and columns of patches.
        """
        if self.patches is not None:
            height, width = (n // self.side for n in self.patches)
            values = values.view(len(values), height, self.side, width, self.side, -1).mean((2, 4))
            return values.flatten(0, 2)
        values = values.view(-1, self.side**2, values.shape[-1]).mean(1)
        if self.windows is None:
            return values
        from transformers.vision_utils import get_vision_window_index

        assert grid is not None
        order, _ = get_vision_window_index(grid, self.side, *self.windows)
        return values[order.to(values.device).argsort()]


@dataclass(frozen=True)
class Seen:
    """By visual token, in the order of the sequence: `attention` [V] and `keys` [V, d], float32."""

    attention: Tensor
    keys: Tensor

    def for_rows(self, tokens: Sequence[int]) -> Seen | None:
        """The same for rows with these numbers of visual tokens; None where they are not those that were seen.

        Generation with beams repeats rows: each as often as the others, repetitions side by side.
        """
        times, rest = divmod(sum(tokens), max(1, len(self.attention)))
        if rest or not times or len(tokens) % times:
            return None
        if times == 1:
            return self
        rows = tokens[::times]
        if list(tokens) != [count for count in rows for _ in range(times)]:
            return None
        index = torch.arange(len(self.attention), device=self.attention.device).split(rows)
        again = torch.cat([row for row in index for _ in range(times)])
        return Seen(self.attention[again], self.keys[again])


class Inside(NamedTuple):
    """Paths inside a block, "" where it has none."""

    norm: str
    q: str
    k: str
    qkv: str
    q_norm: str
    k_norm: str


@dataclass(frozen=True)
class Reader:
    """How one block of the tower is read; `tower` and `path` are those of the tower and of the block."""

    tower: str
    path: str
    cells: Cells
    inside: Inside
    heads: int
    head_dim: int
    rotary: bool

    @classmethod
    def of(cls, tower: str, units: Sequence[Unit], cells: Cells) -> Reader:
        """Of the tower at a dotted path with these blocks, all of the stack.

        Raises:
            ModelError: the block's attention is not one that can be computed again from its input.
        """
        if not units:
            raise ModelError("the vision tower has no stack of blocks")
        unit = units[cells.block(len(units))]
        attention = unit.attention
        norm = unit.stages[0][0].norm if unit.stages else None
        if attention is None or norm is None or attention.n_heads != attention.n_kv_heads:
            raise ModelError(
                "queries and keys cannot be computed from the block's input",
                where=unit.name,
                found=f"{type(unit.module).__name__} with no norm before its attention, or heads that share keys",
            )

        paths = (norm, attention.q, attention.k, attention.qkv, attention.q_norm, attention.k_norm)
        names = Inside(*(path.removeprefix(unit.path + ".") if path else "" for path in paths))
        return cls(tower, unit.path, cells, names, attention.n_heads, attention.head_dim, attention.rotary)

    @torch.no_grad()
    def look(self, block: nn.Module, args: tuple, kwargs: Mapping[str, Any], grid: Tensor | None) -> Seen:
        """Of one call of the block."""
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden if hidden.ndim == 3 else hidden[None]
        query, key = self._projected(block, hidden)
        keys = key.float().mean(2)
        if self.rotary:
            query, key = (_rotated(t, *kwargs["position_embeddings"]) for t in (query, key))
        query, key = query.transpose(1, 2).float() * self.head_dim**-0.5, key.transpose(1, 2).float()
        mask = kwargs.get("attention_mask")
        patches = math.prod(self.cells.patches) if self.cells.patches else hidden.shape[1]
        besides = hidden.shape[1] - patches
        if besides < 0:
            raise ModelError(
                "the vision tower has fewer tokens than its config has patches",
                where=self.path,
                found=f"{hidden.shape[1]} tokens, {patches} patches",
            )
        if besides:
            found = _weights(query[:, :, :1], key, mask, slice(0, 1)).sum((1, 2))
        elif (bounds := kwargs.get("cu_seqlens")) is not None:
            parts = bounds.diff().tolist()
            pairs = zip(query.split(parts, 2), key.split(parts, 2), strict=True)
            found = torch.cat([received(q, k) for q, k in pairs], 1)
        else:
            found = received(query, key, mask)
        both = torch.cat([found[:, besides:, None], keys[:, besides:]], dim=2)
        both = self.cells.by_token(both, grid)
        return Seen(both[:, 0], both[:, 1:])

    def _projected(self, block: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [images, N, heads, d], not yet rotated."""
        at = block.get_submodule
        x = at(self.inside.norm)(hidden)
        if self.inside.qkv:
            query, key, _ = at(self.inside.qkv)(x).chunk(3, dim=-1)
        else:
            query, key = at(self.inside.q)(x), at(self.inside.k)(x)
        if self.inside.q_norm:
            query, key = at(self.inside.q_norm)(query), at(self.inside.k_norm)(key)
        return query.unflatten(-1, (self.heads, -1)), key.unflatten(-1, (self.heads, -1))


class Watch:
    """Listens to a model's tower: what was read of the images of the call that is running.

    It travels with the tower's output, because `generate` encodes images before it calls the model.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.running = False
        self.seen: Seen | None = None  # of the running call
        self.looked: Seen | None = None  # of the tower's running call
        self.grid: Tensor | None = None

    def install(self, model: nn.Module) -> None:
        tower, block = model.get_submodule(self.reader.tower), model.get_submodule(self.reader.path)
        tower.register_forward_pre_hook(self.enter, with_kwargs=True)
        block.register_forward_pre_hook(self.look, with_kwargs=True)
        tower.register_forward_hook(self.leave)

    def attached_to(self, model: nn.Module) -> bool:
        """Whether all of its hooks are in place."""
        tower, block = model.get_submodule(self.reader.tower), model.get_submodule(self.reader.path)
        places = (tower._forward_pre_hooks, tower._forward_hooks, block._forward_pre_hooks)
        return all(any(owner(hook) is self for hook in hooks.values()) for hooks in places)

    def begin(self, encoded: Any) -> None:
        """A call of the model begins; `encoded` is the tower's output where it is given one."""
        self.running, self.seen = True, vars(encoded).get(SEEN) if encoded is not None else None

    def end(self) -> None:
        self.running, self.seen = False, None

    def of(self, visual: Tensor) -> Seen:
        """What was read of a call's visual tokens, by their mask [batch, q].

        Raises:
            ModelError: the tower saw other pictures, or none.
        """
        found = self.seen.for_rows(visual.sum(1).tolist()) if self.seen is not None else None
        if found is None:
            raise ModelError(
                "the vision tower's patches are not those of the prompt's visual tokens",
                where=self.reader.path,
                found=f"{int(visual.sum())} visual tokens, {len(self.seen.attention) if self.seen else 0} in the tower",
                change="choose visual tokens by their features (tokens.divprune, tokens.dpp)",
            )
        return found

    def enter(self, tower: nn.Module, args: tuple, kwargs: dict) -> None:
        self.looked, self.grid = None, named(tower, args, kwargs).get("grid_thw")

    def look(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        self.looked = self.reader.look(block, args, kwargs, self.grid)

    def leave(self, tower: nn.Module, args: tuple, output: Any) -> None:
        """Of a call with images and videos, the tower's first is that of the images."""
        vars(output)[SEEN] = self.looked
        if self.running and self.seen is None:
            self.seen = self.looked
        self.looked = self.grid = None


def received(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean attention that each token receives, over heads and queries, [images, N].

    Computed for as many queries at a time as fit LIMIT. query, key: [images, heads, N, d], scaled.
    """
    images, heads, tokens, _ = query.shape
    step = max(1, LIMIT // (images * heads * tokens))
    total = query.new_zeros(images, tokens)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        total += _weights(query[:, :, rows], key, mask, rows).sum((1, 2))
    return total / (heads * tokens)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    """Attention weights of the queries `rows`, [images, heads, rows, N]."""
    logits = query @ key.transpose(2, 3)
    if mask is not None and mask.ndim == 4:
        part = mask[:, :, rows] if mask.shape[2] > 1 else mask
        logits = logits.masked_fill(~part, torch.finfo(logits.dtype).min) if part.dtype == torch.bool else logits + part
    return logits.softmax(-1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in halves; x [images, N, heads, d], cos and sin [N, d]."""
    x = x.float()
    one, two = x.chunk(2, dim=-1)
    return x * cos.float().unsqueeze(-2) + torch.cat([-two, one], dim=-1) * sin.float().unsqueeze(-2)
