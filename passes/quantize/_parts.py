"""A unit's inputs in small runs of samples, each with what the unit is to return for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ...calib.stats import TokenWeights
from ...calib.walk import Call, WalkUnit
from ...compress.anatomy import LinearRef
from ...compress.errors import WorkFailed
from ...compress.runtime.merge import carried

SAME = 1e-3  # root mean square of the difference, over that of the output: the order of summation, not another sample


@dataclass
class Part:
    """Some samples of a batch.

    Attributes:
        call: the unit's (args, kwargs). target: what its first tensor is to be.
        weights: of the target's tokens, [tokens]; None: all 1. total: what the numbers of the target weigh together.
    """

    call: Call
    target: torch.Tensor
    samples: int
    weights: torch.Tensor | None
    total: float

    @classmethod
    def of(cls, call: Call, target: torch.Tensor, samples: int, weights: torch.Tensor | None, relative: bool) -> Part:
        """`weights` [batch, tokens]. `relative`: differences of a token count by its target's mean square."""
        if weights is None:
            return cls(call, target, samples, None, float(target.numel()))
        weights = weights.reshape(-1).to(target.device)
        total = float(weights.sum()) * target.shape[-1]
        if relative:
            level = target.reshape(-1, target.shape[-1]).float().square().mean(-1)
            usable = torch.isfinite(level) & (level > 0)  # a target that is not finite shows in the loss
            weights = weights / torch.where(usable, level, 1.0)
        return cls(call, target, samples, weights, total)

    def loss(self, unit: WalkUnit, weights: Mapping[LinearRef, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of squared differences from the target, with other weights in the unit's linears."""
        found = first(unit.run(self.call, weights))
        if self.weights is None:
            return (found.float() - self.target.float()).square().sum()
        counted = self.weights > 0  # what does not count may hold anything, NaN included
        rows = (t.reshape(-1, t.shape[-1])[counted].float() for t in (found, self.target))
        return ((next(rows) - next(rows)).square().sum(-1) * self.weights[counted]).sum()


def parts_of(
    unit: WalkUnit,
    batch_size: int,
    token_weights: TokenWeights,
    relative: bool = False,
    targets: Iterable[torch.Tensor] | None = None,
) -> tuple[list[Part], int]:
    """The unit's inputs in runs of at most `batch_size` samples, and how many batches could not be split.

    Their targets are what the unit, as it now is, returns for them, or `targets`, one for each of its inputs.

    What a unit receives differs by family: tensors with a row a sample, tables that all samples share, packed
    sequences. A batch is split along the first dimension of its first tensor, with all tensors that have as many rows,
    where the unit returns for the runs what it returns for the whole; else it stays whole.
    """
    parts: list[Part] = []
    whole = 0
    wanted = (None for _ in unit.inputs()) if targets is None else targets
    given = zip(unit.inputs(), unit.outputs(), wanted, unit.rows(token_weights), strict=True)
    for call, output, target, (samples, weights) in given:
        output = first(output).detach()
        target = output if target is None else target
        if target.shape != output.shape:
            raise WorkFailed(
                "a unit does not return what it is compared with",
                where=unit.name,
                found=f"{tuple(output.shape)}, to be compared with {tuple(target.shape)}",
            )
        if weights is not None and weights.numel() * target.shape[-1] != target.numel():
            raise WorkFailed(
                "the tokens of the batch and of the block's output do not match",
                where=unit.name,
                found=f"{weights.numel()} in the batch, {target.numel() // target.shape[-1]} in the output",
                change="correct 'tokens' (image, prompt, sequence) of this place in the anatomy row",
            )
        split = None
        if samples > batch_size:
            split = _split(unit, call, output, target, samples, batch_size, weights, relative)
            whole += split is None
        if split is None:
            split = [Part.of(call, target, samples, weights, relative)]
        parts += [part for part in split if part.total > 0]
    return parts, whole


def _split(
    unit: WalkUnit,
    call: Call,
    output: torch.Tensor,
    target: torch.Tensor,
    samples: int,
    size: int,
    weights: torch.Tensor | None,
    relative: bool,
) -> list[Part] | None:
    tensors = [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    lead = len(tensors[0]) if tensors else 0
    if not lead or lead % samples or len(target) % samples or (weights is not None and len(weights) != samples):
        return None
    found = []
    for start in range(0, samples, size):
        stop = min(start + size, samples)
        few = tree_map(_rows(lead, start * lead // samples, stop * lead // samples), call)
        step = len(target) // samples
        few_weights = None if weights is None else weights[start:stop]
        part = Part.of(few, target[start * step : stop * step], stop - start, few_weights, relative)
        try:
            with torch.no_grad():
                again = first(unit.run(few, {}))
        except (RuntimeError, ValueError, IndexError):  # shapes that belong together were torn apart
            return None
        whole = output[start * step : stop * step]
        if again.shape != whole.shape or not _same(again, whole, part.weights):
            return None
        found.append(part)
    return found


def _rows(lead: int, start: int, stop: int) -> Callable[[Any], Any]:
    def cut(leaf: Any) -> Any:
        fits = isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf) == lead
        return carried(leaf[start:stop], leaf, slice(start, stop)) if fits else leaf

    return cut


def _same(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor | None) -> bool:
    a, b = a.float(), b.float()
    if weights is not None:
        a, b = (t.reshape(-1, t.shape[-1])[weights > 0] for t in (a, b))
    return bool((a - b).square().sum() <= SAME**2 * b.square().sum())


def first(output: Any) -> torch.Tensor:
    """The first floating tensor of what a unit returns: its hidden states."""
    leaves: Iterator[torch.Tensor] = (
        leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    )
    return next(leaves)
