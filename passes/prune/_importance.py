"""How much a channel or a head matters: pure maths, tensors in, tensors out. Larger is more important."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class AbsMean:
    """Weighted mean of ``|x|`` by channel: Minitron's importance of MLP channels (arXiv 2407.14679).

    Attributes:
        mean: [channels], float64.
    """

    def __init__(self) -> None:
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.weight = 0.0

    def update(self, x: Tensor, weights: Tensor) -> None:
        """Add the inputs `x` [tokens, channels] with `weights` [tokens]."""
        if self.mean.numel() == 0:
            self.mean = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        total = float(weights.sum(dtype=torch.float64))
        if total == 0:
            return
        self.weight += total
        self.mean += (weights.double() @ x.detach().abs().double() - total * self.mean) / self.weight


class HeadNorm:
    """Weighted mean over tokens of each head's L2 output norm: Minitron's importance of heads (arXiv 2407.14679).

    Args:
        width: channels of a head.

    Attributes:
        mean: [heads], float64.
    """

    def __init__(self, width: int) -> None:
        self.width, self._norms = width, AbsMean()

    @property
    def mean(self) -> Tensor:
        return self._norms.mean

    def update(self, x: Tensor, weights: Tensor) -> None:
        """Add the inputs `x` [tokens, heads * width] of the output projection with `weights` [tokens]."""
        self._norms.update(x.detach().reshape(len(x), -1, self.width).norm(dim=-1), weights)


def magnitude(slices: Sequence[tuple[Tensor, int]], units: int) -> Tensor:
    """L2 norm of all weights of each group (torch-pruning's GroupMagnitudeImportance, arXiv 2301.12900).

    Args:
        slices: (weight, dim): dimension `dim` of the weight is cut into `units` equal runs.

    Returns:
        [units], float64.
    """
    total = torch.zeros(units, dtype=torch.float64)
    for weight, dim in slices:
        energy = weight.detach().double().square().sum(1 - dim).cpu()
        total += energy.reshape(units, -1).sum(1)
    return total.sqrt()


def taylor(pairs: Sequence[tuple[Tensor, Tensor]], units: int) -> Tensor:
    """First-order change of the loss when a group is removed (LLM-Pruner, arXiv 2305.11627).

    ``|sum_{i, j in group} W_ij G_ij|`` over the linears that read the group's channels equals the loss's derivative
    along the group's output, all of whose effect passes through these columns.

    Args:
        pairs: (weight [out, in], gradient of the loss, like the weight) of each of these linears.

    Returns:
        [units], float64; unit u owns the u-th run of `in / units` columns.
    """
    score = torch.zeros(units, dtype=torch.float64)
    for weight, gradient in pairs:
        score += (weight.detach() * gradient).double().sum(0).cpu().reshape(units, -1).sum(1)
    return score.abs()


def fluctuation(variance: Tensor, weight: Tensor, units: int) -> Tensor:
    """How much a linear's output moves about its mean through each input: FLAP's WIFV (arXiv 2312.11983).

    ``Var(x_j) ||W_:j||^2``, summed over the channels of a unit: what is lost when the unit is held at its mean.

    Args:
        variance: [in]. weight: [out, in].

    Returns:
        [units], float64; unit u owns the u-th run of `in / units` columns.
    """
    energy = weight.detach().double().square().sum(0).cpu()
    return (variance.cpu() * energy).reshape(units, -1).sum(1)


def shares(scores: Tensor) -> Tensor:
    """What part of its block's importance each unit carries: blocks of different scale can be ranked together.

    FLAP ranks z-scores instead. Where a few units carry nearly all, those put the many dead ones near the mean, and
    blocks that have none lose half of their units.
    """
    total = scores.sum()
    return scores / total if float(total) > 0 else torch.zeros_like(scores)


def allocate(scores: Sequence[Tensor], ratio: float, floor: float, multiple: int = 1) -> list[int]:
    """How many units each block keeps where the least important of all blocks go.

    Each block gives up its lowest units in runs, down to multiples of `multiple`; the run with the lowest mean of
    `shares` goes first, until the share `ratio` of all units is gone, as nearly as runs allow.

    Args:
        scores: [units] of each block, none negative. floor: least share that a block keeps, rounded up to a multiple.
    """
    order = [shares(s).sort().values for s in scores]
    kept = [len(s) for s in scores]
    least = [max(multiple, math.ceil(floor * len(s) / multiple - 1e-9) * multiple) for s in scores]
    left = ratio * sum(kept)

    def run(block: int) -> tuple[float, int, int] | None:
        """(mean score, block, units) of what the block would give up next."""
        after = (kept[block] - 1) // multiple * multiple
        if after < least[block]:
            return None
        gone = len(order[block]) - kept[block]
        return float(order[block][gone : len(order[block]) - after].mean()), block, kept[block] - after

    heap = [found for block in range(len(scores)) if (found := run(block))]
    heapq.heapify(heap)
    while heap:
        _, block, units = heapq.heappop(heap)
        if units > 2 * left:  # further off with it than without it
            continue
        kept[block] -= units
        left -= units
        if found := run(block):
            heapq.heappush(heap, found)
    return kept


def influence(states: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> float:
    """Block influence ``1 - mean cos(h_in, h_out)`` over tokens (ShortGPT, arXiv 2403.03853, eq. 1).

    Args:
        states: (h_in, h_out, weights) of a block, batch after batch: [..., tokens, channels] each, and [..., tokens];
            weights None: all 1.
    """
    total = mass = 0.0
    for before, after, weights in states:
        near = torch.nn.functional.cosine_similarity(before.detach().double(), after.detach().double(), dim=-1)
        each = torch.ones_like(near) if weights is None else weights.to(near).reshape(near.shape)
        total, mass = total + float((near * each).sum()), mass + float(each.sum())
    return 1 - total / mass if mass else 0.0


def best(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` largest scores, ascending; of equal ones the first."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return sorted(order.tolist())


def best_heads(scores: Tensor, n_kv: int, keep_heads: int, keep_kv: int) -> list[int]:
    """Query heads that stay, ascending.

    Whole key-value groups go where fewer of them stay (by the sum of their heads' scores); where all groups stay, each
    loses its least important query heads, the same number in each.

    Args:
        scores: [query heads].
    """
    by_group = scores.reshape(n_kv, -1)
    share = by_group.shape[1]
    groups = best(by_group.sum(1), keep_kv)
    after = keep_heads // keep_kv
    return [group * share + head for group in groups for head in best(by_group[group], after)]


def narrower(size: int, ratio: float, multiple: int = 1) -> int:
    """`size` less the share `ratio`, to the nearest positive multiple; of two equally near the smaller."""
    steps = size * (1 - ratio) / multiple
    return max(1, -int(-(steps - 0.5) // 1)) * multiple


def near_widths(size: int, ratio: float, multiple: int) -> tuple[int, ...]:
    """`narrower` of `size`, then the multiples that remove half as much to half as much again, near ones first."""
    wanted, nearest = size * (1 - ratio), narrower(size, ratio, multiple)
    others = [w for w in range(multiple, size, multiple) if abs(w - wanted) <= size * ratio / 2 and w != nearest]
    return nearest, *sorted(others, key=lambda w: (abs(w - wanted), w))


def fewer_heads(n_heads: int, n_kv: int, ratio: float) -> list[tuple[int, int]]:
    """(query heads, key-value heads) that may stay, the nearest to `ratio` first; none that is further off than all.

    Whole groups go, or the same number of query heads from each; of equally near ones the fewer, then whole groups.
    """
    share, wanted = n_heads // n_kv, n_heads * (1 - ratio)
    options = {(groups * share, groups) for groups in range(1, n_kv)} | {
        (n_kv * each, n_kv) for each in range(1, share)
    }
    near = [option for option in options if abs(option[0] - wanted) <= n_heads - wanted + 1e-9]
    return sorted(near, key=lambda option: (round(abs(option[0] - wanted), 9), option))
