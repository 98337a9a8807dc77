"""Fewer tokens inside the vision tower: the mechanism of `tokens.merge` (ToMe, arXiv 2210.09461).

`install` changes no weight. It replaces the `forward` of the tower's blocks, from the first that merges to the last:

* a block works on one state for each group of tokens, with the logarithm of the groups' sizes added to its attention
  logits (proportional attention);
* a block that merges does so between its attention and its MLP, by the keys that its own attention has just computed;
* between the blocks the sequence has its full length, each token with what its group has. So whatever reads the tower,
  the last block's output, one before (LLaVA), several (lists of feature layers), finds every patch in its place.

The groups travel with the output of a block, as an attribute of the tensor, to the next one. A block that runs alone on
what it was given (calib/walk.py) therefore works on the groups that it has in the whole model.

A block's own code runs, in two halves where it merges: once while its MLP says zero, and, on the merged states, once
while its attention does. That is what a block computes whose halves are added to a residual stream, each behind a norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import ModelError
from .reduce import kept_count
from .tome import matching, merged, spread

SLOT = "token_merging"  # name of the Merging among a block's children
GROUPS = "_svlm_groups"  # attribute of a block's output


@dataclass(frozen=True)
class Inside:
    """Where things are inside a block: dotted names of its attention, its MLP, and the linear that makes the keys.

    `head_dim` is the width of a head; `fused`: the linear makes queries, keys and values.
    """

    attention: str
    mlp: str
    keys: str
    head_dim: int
    fused: bool = False


@dataclass(frozen=True)
class Groups:
    """What the tokens of a tower's sequence are merged into.

    Attributes:
        ids: of each token its group, [images, N]. sizes: [images, M] float32; padding counts 0.
        states: of the groups, [images, M, D].
        padded: some token of some image is padding.
    """

    ids: Tensor
    sizes: Tensor
    states: Tensor
    padded: bool


class Merging(nn.Module):
    """What one block of a tower does with groups. No parameters, no buffers; `install` puts it on the block.

    Args:
        inside: the anatomy of the block.
        left: share of an image's patches that are left after this block; None: it merges none.
        prefix: tokens before the patches (CLS, registers), which stay as they are.
        proportional: whether sizes weigh in attention.
        stack: the tower's blocks.
    """

    def __init__(
        self, inside: Inside, left: float | None, prefix: int, proportional: bool, stack: nn.ModuleList
    ) -> None:
        super().__init__()
        self.inside, self.left, self.prefix, self.proportional = inside, left, prefix, proportional
        self.stack = (stack,)  # in a tuple it is no child

    def extra_repr(self) -> str:
        return "" if self.left is None else f"left={self.left}"

    def after(self, tokens: int, groups: int) -> int:
        """How many groups are left after this block, of `groups` of a sequence of `tokens`."""
        return self.prefix + _after(self.left, tokens - self.prefix, groups - self.prefix)

    def begins(self, block: nn.Module, tokens: int) -> bool:
        """Whether no block before this one has merged anything of a sequence of `tokens`."""
        before = tokens
        for other in self.stack[0]:
            if other is block:
                break
            merging = other._modules.get(SLOT)
            if isinstance(merging, Merging):
                before = merging.after(tokens, before)
        return before == tokens

    def bias(self, groups: Groups, dtype: torch.dtype) -> Tensor | None:
        """What is added to the attention logits, [images, 1, 1, M]; None: nothing."""
        if not self.proportional and not groups.padded:
            return None
        added = groups.sizes.log() if self.proportional else torch.zeros_like(groups.sizes)
        if groups.padded:
            added = added.masked_fill(groups.sizes == 0, torch.finfo(dtype).min)
        return added.to(dtype)[:, None, None, :]


def _after(left: float | None, patches: int, groups: int) -> int:
    if left is None:
        return groups
    return min(groups, max(kept_count(patches, left), groups - groups // 2))


def counts(patches: int, left: list[float]) -> list[int]:
    """How many of an image's `patches` are left after each merge, where `left` are the shares wanted."""
    found: list[int] = []
    for share in left:
        found.append(_after(share, patches, found[-1] if found else patches))
    return found


def merging_of(block: nn.Module) -> Merging | None:
    """What `block` does with groups; None where it knows nothing of them, or its forward is not in place any more."""
    merging, own = block._modules.get(SLOT), block.__dict__.get("forward")
    there = isinstance(own, MethodType) and own.__func__ is _forward
    return merging if there and isinstance(merging, Merging) else None


def installed(model: nn.Module) -> bool:
    """Whether tokens are merged anywhere in `model`."""
    return any(isinstance(module, Merging) for module in model.modules())


def install(
    stack: nn.ModuleList,
    inside: Mapping[int, Inside],
    left: Mapping[int, float],
    *,
    prefix: int,
    proportional: bool = True,
) -> None:
    """Let blocks of `stack` merge tokens. It travels with `copy.deepcopy`; `remove` takes it off again.

    Args:
        inside: by number of the block, for the first that merges and all later ones.
        left: by number of a block that merges, the share of patches left after it.

    Raises:
        ModelError: they do so already.
    """
    if installed(stack):
        raise ModelError("the tokens of this tower are merged already")
    for number in range(min(left), len(stack)):
        block = stack[number]
        merging = Merging(inside[number], left.get(number), prefix, proportional, stack)
        block.register_module(SLOT, merging)
        block.__dict__["forward"] = MethodType(_forward, block)


def remove(model: nn.Module) -> None:
    """Let all blocks of `model` run as they were; nothing happens where none merges."""
    for block in list(model.modules()):
        if merging_of(block) is not None:
            del block._modules[SLOT], block.__dict__["forward"]


def carried(new: Tensor, old: Any, rows: slice = slice(None)) -> Tensor:
    """`new`, a copy of the images `rows` of a block's output `old`, with the groups that travel with `old`."""
    groups = getattr(old, GROUPS, None)
    if groups is not None:
        ids, sizes, states = (t[rows] for t in (groups.ids, groups.sizes, groups.states))
        setattr(new, GROUPS, Groups(ids, sizes, states, groups.padded))
    return new


# ------------------------------------------------------------------------------------------------------ inside a block


def _forward(block: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The block's forward on groups: hidden states of full length in, hidden states of full length out."""
    merging = block._modules[SLOT]
    assert isinstance(merging, Merging)
    own = inspect.unwrap(type(block).forward)  # checkpointing by transformers would run it again when all is over
    tokens = hidden_states.shape[1]
    groups: Groups | None = getattr(hidden_states, GROUPS, None)
    if groups is None:
        if not merging.begins(block, tokens):
            raise ModelError(
                "a block was given hidden states whose groups of merged tokens are lost",
                where=type(block).__name__,
                change="give it the very tensor that the block before returned",
            )
        if merging.after(tokens, tokens) == tokens:
            return type(block).forward(block, hidden_states, *args, **kwargs)
    names = _parameters(own)[2:]  # without self and hidden_states
    mask = (dict(zip(names, args)) | kwargs).get("attention_mask")
    fresh = groups is None
    if groups is None:
        groups = _single(hidden_states, mask)
    call = _Halves(block, merging.inside, own, args, kwargs)
    bias = mask if fresh else merging.bias(groups, hidden_states.dtype)
    left = merging.after(tokens, groups.states.shape[1])
    x, ids, sizes = groups.states, groups.ids, groups.sizes
    if left == x.shape[1]:
        x = call.whole(x, bias)
    else:
        x, keys = call.attention(x, bias)
        grown = _grouped(keys, groups, left, merging.prefix)
        x, sizes = merged(x, sizes, grown, left)
        x, ids = call.mlp(x), grown.gather(1, ids)
    out = spread(x, ids)
    setattr(out, GROUPS, Groups(ids, sizes, x, groups.padded))
    return out


def _single(hidden_states: Tensor, mask: Any) -> Groups:
    """Every token a group of its own."""
    images, tokens = hidden_states.shape[:2]
    ids = torch.arange(tokens, device=hidden_states.device).expand(images, tokens)
    real = _real(mask, images)
    sizes = torch.ones(images, tokens, device=hidden_states.device) if real is None else real.float()
    return Groups(ids, sizes, hidden_states, real is not None)


def _real(mask: Any, images: int) -> Tensor | None:
    """Which tokens a tower's attention mask lets be attended to, bool [images, N]; None: all."""
    if mask is None:
        return None
    rows = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if rows.ndim != 4 or not bool((rows == rows[:, :1, :1]).all()):
        raise ModelError(
            "tokens cannot be merged under a mask that differs by the token that asks",
            found=f"an attention mask {tuple(mask.shape)}",
        )
    return rows[:, 0, 0].expand(images, -1)


def _grouped(keys: Tensor, groups: Groups, left: int, prefix: int) -> Tensor:
    """Of each group the one that it is merged into, [images, M] in 0 ... left - 1."""
    real = groups.sizes[:, prefix:] > 0 if groups.padded else None
    found = matching(keys.detach()[:, prefix:], keys.shape[1] - left, real) + prefix
    return torch.cat([torch.arange(prefix, device=found.device).expand(len(found), prefix), found], dim=1)


@dataclass
class _Halves:
    """One call of a block, in the block's own code."""

    block: nn.Module
    inside: Inside
    own: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    silence: Any = None  # what attention returned, with zeros in place of numbers

    def whole(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The block on x [images, M, D] with `bias` [images, 1, 1 or M, M] on its attention logits."""
        attention = self.block.get_submodule(self.inside.attention)
        named, forward = _parameters(type(attention).forward)[1:], attention.forward

        def biased(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(named, args)) | kwargs
            if bias is not None or "attention_mask" in given:
                given["attention_mask"] = bias
            out = forward(**given)
            self.silence = tree_map(lambda leaf: leaf.new_zeros(()) if isinstance(leaf, Tensor) else leaf, out)
            return out

        with _standing_in(attention, biased):
            return self.own(self.block, x, *self.args, **self.kwargs)

    def attention(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """x after the first half, and the keys in the mean over heads [images, M, head_dim]."""
        mlp, linear = self.block.get_submodule(self.inside.mlp), self.block.get_submodule(self.inside.keys)
        seen: list[Tensor] = []
        handle = linear.register_forward_hook(lambda _, args, out: seen.append(out))
        try:
            with _standing_in(mlp, lambda *_, **__: x.new_zeros(())):
                between = self.whole(x, bias)
        finally:
            handle.remove()
        keys = seen[0].chunk(3, dim=-1)[1] if self.inside.fused else seen[0]
        return between, keys.unflatten(-1, (-1, self.inside.head_dim)).mean(-2)

    def mlp(self, x: Tensor) -> Tensor:
        """x after the second half."""
        with _standing_in(self.block.get_submodule(self.inside.attention), lambda *_, **__: self.silence):
            return self.own(self.block, x, *self.args, **self.kwargs)


@contextmanager
def _standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` of the module inside, and exactly what was there afterwards."""
    with ExitStack() as after:
        if "forward" in module.__dict__:
            after.callback(module.__dict__.__setitem__, "forward", module.__dict__["forward"])
        else:
            after.callback(module.__dict__.pop, "forward", None)
        module.__dict__["forward"] = forward
        yield


def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)
