"""quantize.round: rounding learned block by block, against what each block returned before."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ._common import check_data, check_grids, check_linears, check_settings, milder, place, visual_share

if TYPE_CHECKING:
    import torch

    from ...calib.walk import WalkUnit
    from ...compress.anatomy import LinearRef, ModelView
    from ._parts import Part
    from ._round import Course, Rounding


@dataclass(frozen=True)
class Round(Pass):
    """Learn for every weight whether it goes up or down, and for every group how far its scale reaches.

    Blocks are walked in forward order. All linears of a block are learned together by the descent of signs, so that
    the block, on what the rounded ones before it produce, returns what it returned before it was rounded. Of all that
    the descent passes, its start included, a block keeps what fits its data best. Slower than GPTQ: `steps` times
    `batch_size` samples go forward and back through every block.

    Settings:
        bits: 2, 3, 4 or 8.
        group: input channels that share a scale; -1 is one scale a row.
        symmetric: no zero points.
        where: selector of the linears; vision tower and connector are included by default.
        steps: of the descent, in every block.
        rate: how far a rounding can travel, times a half: the descent's rate falls from rate / steps to 0. The paper's
            is 1; from a start as good as GPTQ's, with as little data as is usual here, that overfits.
        clip_rate: the same for the ends of the groups' ranges; 0 leaves them where they are.
        loss: ``relative`` counts the difference of a token's output by the mean square of the output, as the norm that
            comes after it does; ``mse`` counts it as it is, so that few large tokens decide. Where every token counts
            the same (vision tower, connector) it is always ``mse``.
        batch_size: samples a step.
        token_weights: how visual and text tokens count in the difference of a block's outputs: ``gradient`` weighs a
            visual token by MBQ's ratio of gradients, where text weighs 1; ``balanced`` (half each), ``uniform`` or
            ``text``. In the vision tower and the connector every token counts the same.
        seed: of the order in which samples are drawn.
        init: what the descent starts from: ``rtn``, rounding to nearest with searched scales, or ``gptq``, the weights
            as GPTQ had them when it rounded them.
    """

    name: ClassVar[str] = "quantize.round"
    summary: ClassVar[str] = "weights to 2, 3, 4 or 8 bits with roundings learned block by block, packed on disk"
    paper: ClassVar[str] = "SignRound (AutoRound), arXiv 2309.05516; its start: GPTQ, arXiv 2210.17323"

    bits: int = 4
    group: int = 64
    symmetric: bool = True
    where: tuple[str, ...] | str = ("vision", "connector", "language")
    steps: int = 200
    rate: float = 0.3
    clip_rate: float = 0.0
    loss: Literal["relative", "mse"] = "relative"
    batch_size: int = 8
    token_weights: Literal["gradient", "balanced", "uniform", "text"] = "gradient"
    seed: int = 0
    init: Literal["rtn", "gptq"] = "gptq"

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group, self.symmetric)
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if not (0 < self.rate <= 10 and 0 <= self.clip_rate <= 10):
            raise ValueError(f"rate lies above 0 and clip_rate at 0 or above, not {self.rate} and {self.clip_rate}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        check_linears(self, model, model.linears(self.where), self.group)
        check_data(self, ctx)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ._parts import parts_of

        walk = ctx.walk(self.where, name="round")
        for unit in walk:
            parts, whole = parts_of(unit, self.batch_size, self.token_weights, self.loss == "relative")
            start = self._rounded_to_nearest if self.init == "rtn" else self._solved
            roundings, fallbacks = start(model, unit)
            course = self._learn(unit, parts, roundings, ctx)
            for ref, rounding in roundings.items():
                place(model, ref, rounding.value(), rounding.grid())
            unit.notes |= {
                "linears": [ref.path for ref in roundings],
                "fallbacks": fallbacks,
                "whole_batches": whole,
                "tokens": bool(parts),
                "finite": math.isfinite(course.start),
                "left": course.best / course.start if course.kept else 1.0,
                "kept": course.kept,
                "skipped": course.skipped,
            }
        numbers = _numbers(walk.notes) | {"visual_token_share": visual_share(model, ctx.fit)}
        numbers["visual_token_weight"] = walk.weights_used(self.token_weights)
        return Notes(numbers, {"linears": [path for notes in walk.notes.values() for path in notes["linears"]]})

    def _rounded_to_nearest(self, model: ModelView, unit: WalkUnit) -> tuple[dict[LinearRef, Rounding], int]:
        """Every weight as it is, on the grid with the least error weighted by E[x^2]."""
        from ...calib.stats import MeanSquare
        from ._round import Rounding
        from ._rtn import searched_grid

        roundings, unreached = {}, 0
        kind = (self.bits, self.group, self.symmetric, model.storage_dtype)
        for ref, stat in unit.observe(MeanSquare, token_weights=self.token_weights).items():
            weight, seen = ref.module.weight.detach(), bool(stat.mean.any())
            roundings[ref] = Rounding(weight, searched_grid(weight, stat.mean if seen else None, *kind))
            unreached += not seen
        return roundings, unreached

    def _solved(self, model: ModelView, unit: WalkUnit) -> tuple[dict[LinearRef, Rounding], int]:
        """Every weight as GPTQ rounded it, stage by stage; the unit is left with the solution."""
        import torch

        from ...calib.stats import Hessian
        from ._gptq import gptq, inverse_factor
        from ._round import Rounding, compensated

        roundings, fallbacks = {}, 0
        for stage in unit.stages:
            for ref, hessian in unit.observe(Hessian, stage, self.token_weights).items():
                h, weight = hessian.matrix, ref.module.weight.detach().float()
                h = h if h.numel() else h.new_zeros(weight.shape[1], weight.shape[1])
                mask = model.promised_zeros(ref.path)
                solved = gptq(
                    weight,
                    h,
                    bits=self.bits,
                    group=self.group,
                    symmetric=self.symmetric,
                    dtype=model.storage_dtype,
                    scale_search=True,
                    mask=mask,
                )
                centre = weight
                if not solved.fallback:
                    order = torch.argsort(h.diagonal(), descending=True, stable=True)
                    factor, _ = inverse_factor(h[order][:, order], 0.01)
                    assert factor is not None  # else it had fallen back
                    centre = compensated(weight * (h.diagonal() != 0), solved.weight, factor, order)
                if mask is not None:  # from a centre of 0 no shift leads to another integer
                    centre = centre.masked_fill(mask, 0.0)
                roundings[ref] = Rounding(centre, solved.grid)
                fallbacks += solved.fallback
                ref.module.weight.data.copy_(solved.weight)
        return roundings, fallbacks

    def _learn(self, unit: WalkUnit, parts: list[Part], roundings: dict[LinearRef, Rounding], ctx: Context) -> Course:
        """Learn the unit's roundings in place; they stay as they are where none of its tokens counts."""
        import torch

        from ._round import Course, descend, draws

        if not parts:
            return Course(0.0, 0.0)
        refs = list(roundings)
        seed = zlib.crc32(f"{ctx.seed} {self.seed} {unit.name}".encode())  # of the unit: a resumed walk draws the same
        each = max(1, self.batch_size // max(part.samples for part in parts))
        drawn = draws(len(parts), each, torch.Generator().manual_seed(seed))
        total = sum(part.total for part in parts)

        def weights(values: list[torch.Tensor]) -> dict[LinearRef, torch.Tensor]:
            return {ref: value.to(ref.module.weight.dtype) for ref, value in zip(refs, values, strict=True)}

        def loss(values: list[torch.Tensor]) -> float:
            with torch.no_grad():
                return sum(float(part.loss(unit, weights(values))) for part in parts) / total

        def slopes(values: list[torch.Tensor]) -> tuple[float, list[torch.Tensor | None]]:
            chosen = [parts[i] for i in next(drawn)]
            scale, value = sum(part.total for part in chosen), 0.0
            leaves = {ref: weight.detach().requires_grad_() for ref, weight in weights(values).items()}
            found: list[torch.Tensor | None] = [None] * len(refs)
            for part in chosen:
                with torch.enable_grad():
                    lost = part.loss(unit, leaves) / scale
                    slope = torch.autograd.grad(lost, list(leaves.values()), allow_unused=True)
                value += float(lost.detach())
                found = [new if old is None else old if new is None else old + new for old, new in zip(found, slope)]
            return value, found

        return descend(list(roundings.values()), slopes, loss, self.steps, self.rate, self.clip_rate)

    def ensures(self, model: ModelView) -> None:
        check_grids(self, model, model.ledger.record_of(self)["linears"], self.bits, self.group, self.symmetric)

    def weaker(self) -> Self | None:
        return milder(self)

    def brief(self) -> Self:
        return replace(self, steps=1)


def _numbers(units: dict[str, dict[str, Json]]) -> dict[str, Json]:
    rows = units.values()
    return {
        "linears": sum(len(row["linears"]) for row in rows),
        "blocks": len(rows),
        "mean_loss_left": sum(row["left"] for row in rows) / len(rows),
        "blocks_left_at_start": sum(not row["kept"] for row in rows),
        "blocks_without_tokens": sum(not row["tokens"] for row in rows),
        "blocks_without_finite_loss": sum(not row["finite"] for row in rows),
        "skipped_steps": sum(row["skipped"] for row in rows),
        "rounded_to_nearest": sum(row["fallbacks"] for row in rows),
        "batches_not_split": sum(row["whole_batches"] for row in rows),
    }
