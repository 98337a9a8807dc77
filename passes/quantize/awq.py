"""quantize.awq: channels that matter are scaled up before they are rounded, and the writer before them down."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ._common import check_data, check_grids, check_linears, check_settings, milder, place, visual_share

if TYPE_CHECKING:
    import torch

    from ...compress.anatomy import LinearRef, ModelView
    from ...compress.runtime.grid import Grid
    from ._fold import Pair

UNCLIPPED = ("attn.q", "attn.k", "attn.qkv", "cross.q", "cross.k")  # a product of two follows: clipping hurts


@dataclass(frozen=True)
class AWQ(Pass):
    """Scale channels by their activations before rounding, folded into the norm or linear before; then clip and round.

    For each norm (or values, or `up` of a gated MLP) and the linears that read it, per-channel scales ``s`` are tried
    as ``Q(W s) / s``; the one with the least squared error of the block's output is folded, so that the function stays
    and only the rounding changes. Blocks are walked in forward order; each sees what the rounded ones before it give.

    Settings:
        bits: 2, 3, 4 or 8.
        group: input channels that share a scale; -1 is one scale a row.
        symmetric: no zero points.
        where: selector of the linears; vision tower and connector are included by default. Linears with the same input
            are scaled only if all of them are selected.
        steps: ratios tried on each curve of scales.
        scaling: the curves: ``activation`` is x^r, ``duo`` is x^r / w^(1-r) with the mean relative weight of the
            channel, ``both`` tries one after the other.
        clip: shrink the range of each row and group where that lowers the error of its output; never in q and k.
        solver: how the scaled weights are rounded: ``rtn`` to the nearest point (after `clip`), ``gptq`` column by
            column with error compensation and the searched scales of quantize.gptq (`clip` is not used).
        token_weights: how visual and text tokens count in activations, losses and the clip search: ``gradient``
            weighs a visual token by MBQ's ratio of gradients, r of its block's attention or MLP, where text weighs 1;
            ``balanced`` (half each), ``uniform`` or ``text``. In the vision tower and the connector every token counts
            the same.
    """

    name: ClassVar[str] = "quantize.awq"
    summary: ClassVar[str] = "weights to 2, 3, 4 or 8 bits after activation-aware scaling and clipping, packed on disk"
    paper: ClassVar[str] = "AWQ, arXiv 2306.00978; token weights: MBQ, arXiv 2412.19509"

    bits: int = 4
    group: int = 64
    symmetric: bool = True
    where: tuple[str, ...] | str = ("vision", "connector", "language")
    steps: int = 20
    scaling: Literal["activation", "duo", "both"] = "both"
    clip: bool = True
    solver: Literal["rtn", "gptq"] = "rtn"
    token_weights: Literal["gradient", "balanced", "uniform", "text"] = "gradient"

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group, self.symmetric)
        if self.steps < 1:
            raise ValueError(f"steps is at least 1, not {self.steps}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        check_linears(self, model, model.linears(self.where), self.group)
        check_data(self, ctx)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        walk = ctx.walk(self.where, name="awq")
        for unit in walk:
            unit.notes["pairs"] = self._scale(model, unit)
            unit.notes["linears"] = self._round(model, unit)
        pairs = [row for notes in walk.notes.values() for row in notes["pairs"]]
        rows = {path: row for notes in walk.notes.values() for path, row in notes["linears"].items()}
        numbers = _numbers(pairs, rows) | {"visual_token_share": visual_share(model, ctx.fit)}
        numbers["visual_token_weight"] = walk.weights_used(self.token_weights)
        return Notes(numbers, {"linears": list(rows)})

    def _scale(self, model: ModelView, unit: Any) -> list[dict[str, Json]]:
        """Search and fold the scale of each pair of the unit; what became of each."""
        from ...calib.stats import MeanAbs
        from ._fold import fold, pairs_of

        pairs = list(pairs_of(model, unit.unit, unit.linears))
        free = [pair for pair in pairs if pair.obstacle is None]
        rows: list[dict[str, Json]] = [
            {"source": pair.source, "targets": len(pair.targets), "skipped": pair.obstacle}
            for pair in pairs
            if pair.obstacle is not None
        ]
        if not free:
            return rows
        means = unit.observe(MeanAbs, [ref for pair in free for ref in pair.targets], self.token_weights)
        wanted = [_first(out) for out in unit.outputs()]
        for pair in free:
            row: dict[str, Json] = {"source": pair.source, "targets": len(pair.targets), "skipped": None}
            mean = means[pair.targets[0]].mean
            if not mean.numel() or not mean.isfinite().all() or not mean.any():
                row["skipped"] = "no token with finite values reaches it"
            else:
                scale, before, after = self._search(model, unit, pair, mean, wanted)
                row |= {"before": before, "after": after}
                if scale is not None:
                    fold(model, pair, scale)
            rows.append(row)
        return rows

    def _search(
        self, model: ModelView, unit: Any, pair: Pair, mean: torch.Tensor, wanted: list[torch.Tensor]
    ) -> tuple[torch.Tensor | None, float, float]:
        """The best scale (None: as it is), and the loss of the unit's output without and with it."""
        from ._awq import candidates, output_loss, scaled_rounding, weight_means
        from ._fold import joined
        from ._rtn import absmax_grid

        modules = [ref.module for ref in pair.targets]
        originals = [module.weight.detach().clone() for module in modules]
        channels = weight_means(joined(pair.targets), self.group)
        trials = candidates(mean.to(channels), channels, self.steps, self.scaling)
        losses: list[float] = []
        try:
            for scale in trials:
                for module, original in zip(modules, originals, strict=True):
                    w = original.float()
                    grid = absmax_grid(w * scale, self.bits, self.group, self.symmetric, model.storage_dtype)
                    module.weight.data.copy_(scaled_rounding(w, scale, grid))
                found = [
                    output_loss(_first(out), reference, weights)
                    for out, reference, (_, weights) in zip(
                        unit.outputs(), wanted, unit.rows(self.token_weights), strict=True
                    )
                ]
                losses.append(sum(loss for loss, _ in found) / max(sum(weight for _, weight in found), 1e-12))
        finally:
            for module, original in zip(modules, originals, strict=True):
                module.weight.data.copy_(original)
        best = min(range(len(losses)), key=lambda i: losses[i] if losses[i] == losses[i] else float("inf"))
        return (trials[best] if best else None), losses[0], losses[best]

    def _round(self, model: ModelView, unit: Any) -> dict[str, Json]:
        """Round the unit's linears, stage after stage; the numbers of each."""
        from ...calib.stats import Hessian
        from ...compress.runtime.grid import dequantize, quantize
        from ._awq import clipped_grid
        from ._gptq import layer_error

        rows: dict[str, Json] = {}
        for stage in unit.stages:
            for ref, stat in unit.observe(Hessian, stage, self.token_weights).items():
                width = ref.module.in_features
                h = stat.matrix if stat.matrix.numel() else stat.matrix.new_zeros(width, width)
                usable = bool(h.isfinite().all()) and bool(h.any())
                weight = ref.module.weight.detach().float()
                row: dict[str, Json] = {"clipped": 0.0, "fallback": not usable}
                if self.solver == "gptq":
                    rounded, grid, row["fallback"] = self._gptq(model, ref, h)
                else:
                    clips = self.clip and usable and ref.role not in UNCLIPPED
                    kind = (self.bits, self.group, self.symmetric, model.storage_dtype)
                    grid, row["clipped"] = clipped_grid(weight, h if clips else None, *kind)
                    rounded = dequantize(quantize(weight, grid), grid)
                row["error"], row["relative"] = layer_error(weight, rounded, h) if usable else (0.0, 0.0)
                place(model, ref, rounded, grid)
                rows[ref.path] = row
        return rows

    def _gptq(self, model: ModelView, ref: LinearRef, h: torch.Tensor) -> tuple[torch.Tensor, Grid, bool]:
        """The solver `gptq`: rounded weight, its grid, and whether it had to fall back."""
        from ._gptq import gptq

        kind: dict[str, Any] = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}
        mask = model.promised_zeros(ref.path)
        solved = gptq(ref.module.weight, h, dtype=model.storage_dtype, scale_search=True, mask=mask, **kind)
        return solved.weight, solved.grid, solved.fallback

    def ensures(self, model: ModelView) -> None:
        check_grids(self, model, model.ledger.record_of(self)["linears"], self.bits, self.group, self.symmetric)

    def weaker(self) -> Self | None:
        return milder(self)


def _first(out: Any) -> torch.Tensor:
    """The tensor that a unit returns, or the first of several: its hidden states."""
    import torch
    from torch.utils._pytree import tree_leaves

    return next(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())


def _numbers(pairs: list[dict[str, Json]], rows: dict[str, dict[str, Json]]) -> dict[str, Json]:
    searched = [pair for pair in pairs if pair["skipped"] is None]
    scaled = [pair for pair in searched if pair["after"] < pair["before"]]
    shares = [pair["after"] / pair["before"] for pair in searched if pair["before"] > 0]
    relative = [row["relative"] for row in rows.values()]
    worst = max(rows, key=lambda path: rows[path]["relative"])
    return {
        "linears": len(rows),
        "linears_in_a_pair": sum(pair["targets"] for pair in searched),
        "pairs_scaled": len(scaled),
        "pairs_best_unscaled": len(searched) - len(scaled),
        "pairs_skipped": dict(Counter(pair["skipped"] for pair in pairs if pair["skipped"] is not None)),
        "mean_loss_after_scaling": sum(shares) / len(shares) if shares else 1.0,
        "mean_clipped_groups": sum(row["clipped"] for row in rows.values()) / len(rows),
        "mean_relative_error": sum(relative) / len(relative),
        "worst_relative_error": rows[worst]["relative"],
        "worst_linear": worst,
        "without_statistics": sum(row["fallback"] for row in rows.values()),
    }
