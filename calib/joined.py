"""The calls of one unit for several batches as one call, where they differ in nothing but their samples.

A block that is called with a few hundred tokens at a time spends more time on being called than on its products. What a
call is given is either there for each sample (hidden states, masks, positions) and laid end to end, or the same for all
calls and handed on as it is. Whether a unit treats its samples apart is not believed but tried (`apart`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .replay import Call, hidden, with_first

MOST_TOKENS = 2048  # of a joined call: with more of them it is no faster, and takes more memory
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Joined:
    """One call for the batches with these numbers, which have so many samples each."""

    batches: tuple[int, ...]
    samples: tuple[int, ...]
    call: Call

    def relayed(self, out: Any) -> Joined:
        """How the successor is called that is given what was returned, `out`, in the place of the first argument."""
        return replace(self, call=with_first(self.call, hidden(out)))

    def split(self, out: Any) -> list[Any]:
        """By batch what belongs to it in what was returned: views."""
        if len(self.batches) == 1:
            return [out]
        found, start, total = [], 0, sum(self.samples)
        for count in self.samples:
            rows = slice(start, start + count)
            found.append(tree_map(lambda leaf: leaf[rows] if _by_sample(leaf, total) else leaf, out))  # noqa: B023
            start += count
        return found


def alone(calls: Sequence[Sequence[Call]]) -> list[Joined]:
    """Every call for itself, batch after batch."""
    return [Joined((number,), (_samples(call),), call) for number, batch in enumerate(calls) for call in batch]


def joined(calls: Sequence[Sequence[Call]], kinds: Sequence[Any]) -> list[Joined]:
    """The calls of consecutive batches together where that can be, up to `MOST_TOKENS` tokens.

    Args:
        calls: by batch. kinds: by batch; batches of another kind stay apart.
    """
    groups: list[list[int]] = []
    tokens = 0  # of the last group
    for number, batch in enumerate(calls):
        more = _tokens(batch[0]) if len(batch) == 1 else MOST_TOKENS
        last = groups[-1][-1] if groups else -1
        near = last >= 0 and len(batch) == len(calls[last]) == 1 and kinds[last] == kinds[number]
        if near and tokens + more <= MOST_TOKENS and _alike(calls[groups[-1][0]][0], batch[0]):
            groups[-1].append(number)
            tokens += more
        else:
            groups.append([number])
            tokens = more
    return [one for group in groups for one in _one(calls, group)]


def apart(run: Callable[[Call], Any], one: Joined, calls: Sequence[Sequence[Call]], tolerance: float) -> bool:
    """Whether `run` returns of a joined call what it returns of the calls themselves."""
    try:
        parts = one.split(run(one.call))
    except Exception:  # shapes that do not fit each other, or a number of samples that the unit does not take
        return False
    for part, number in zip(parts, one.batches, strict=True):
        (mine, spec), (theirs, other) = tree_flatten(part), tree_flatten(run(calls[number][0]))
        if spec != other or not all(_near(a, b, tolerance) for a, b in zip(mine, theirs, strict=True)):
            return False
    return True


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    """What a unit is made of: what one does with samples, another of the same kind does as well."""
    parts = [(name, type(part), id(vars(part).get("forward"))) for name, part in module.named_modules() if name]
    return (type(module), *parts)


def _one(calls: Sequence[Sequence[Call]], group: list[int]) -> list[Joined]:
    if len(group) == 1:
        return [Joined((group[0],), (_samples(call),), call) for call in calls[group[0]]]
    members = [tree_flatten(calls[number][0]) for number in group]
    samples = tuple(_samples(calls[number][0]) for number in group)
    leaves = [
        torch.cat(column) if _by_sample(column[0], samples[0]) else column[0]
        for column in zip(*(leaves for leaves, _ in members), strict=True)
    ]
    return [Joined(tuple(group), samples, tree_unflatten(leaves, members[0][1]))]


def _alike(one: Call, other: Call) -> bool:
    """Whether the two differ in nothing but their samples."""
    (first, spec), (second, its) = tree_flatten(one), tree_flatten(other)
    counts = _samples(one), _samples(other)
    if spec != its or not all(counts):
        return False
    for a, b in zip(first, second, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if a is not b and not (isinstance(a, PLAIN) and type(a) is type(b) and a == b):
                return False
        elif (a.dtype, a.device, a.requires_grad) != (b.dtype, b.device, b.requires_grad) or vars(a) or vars(b):
            return False  # what travels with a tensor would be lost
        else:
            by_sample = _by_sample(a, counts[0])
            same = a.shape[1:] == b.shape[1:] if by_sample else torch.equal(a, b)
            if not same or by_sample != _by_sample(b, counts[1]):
                return False
    return True


def _samples(call: Call) -> int:
    """How many samples a call is given; 0 where it is not given hidden states [samples, tokens, channels]."""
    args, _ = call
    states = args[0] if args else None
    return len(states) if isinstance(states, torch.Tensor) and states.ndim == 3 else 0


def _tokens(call: Call) -> int:
    return call[0][0][..., 0].numel() if _samples(call) else MOST_TOKENS


def _by_sample(leaf: Any, samples: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == samples


def _near(one: Any, other: Any, tolerance: float) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one is other or bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = one.double(), other.double()
    return bool((one - other).norm() <= tolerance * other.norm())
