"""quantize.gptq: GPTQ over vision tower, connector and language model, block after block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ._common import check_data, check_grids, check_linears, check_settings, milder, place, visual_share

if TYPE_CHECKING:
    import torch

    from ...compress.anatomy import ModelView


@dataclass(frozen=True)
class GPTQ(Pass):
    """Round weights column by column, each column's error spread over those to come, by second-order statistics.

    Blocks are walked in forward order and each sees what the rounded ones before it produce.

    Settings:
        bits: 2, 3, 4 or 8.
        group: input channels that share a scale; -1 is one scale a row.
        symmetric: no zero points.
        where: selector of the linears; vision tower and connector are included by default.
        damp: share of the Hessian's mean diagonal added to its diagonal; raised tenfold until it is positive definite,
            and every raise is counted in the notes.
        act_order: ``static`` takes the columns by falling activation with the groups' scales fixed beforehand, so that
            no group index is needed at run time; ``none`` goes from left to right.
        blocksize: columns between two updates of the rest; changes the speed, not the result.
        true_sequential: inside a block, statistics of a later linear are taken after the earlier ones were rounded
            (q, k, v; then o; then gate, up; then down). False takes all of a block's statistics at once: faster.
        token_weights: how visual and text tokens count in the Hessian: ``gradient`` weighs a visual
            token by MBQ's ratio of gradients, r of its block's attention or MLP, where text weighs 1; ``balanced``
            (half each), ``uniform`` or ``text``. In the vision tower and the connector every token counts the same.
        scale_search: choose each scale by the least error weighted by the Hessian diagonal, not by the largest weight.
    """

    name: ClassVar[str] = "quantize.gptq"
    summary: ClassVar[str] = "weights to 2, 3, 4 or 8 bits with second-order error compensation, packed on disk"
    paper: ClassVar[str] = "GPTQ, arXiv 2210.17323"

    bits: int = 4
    group: int = 64
    symmetric: bool = True
    where: tuple[str, ...] | str = ("vision", "connector", "language")
    damp: float = 0.01
    act_order: Literal["static", "none"] = "static"
    blocksize: int = 128
    true_sequential: bool = True
    token_weights: Literal["gradient", "balanced", "uniform", "text"] = "gradient"
    scale_search: bool = True

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group, self.symmetric)
        if not self.damp > 0:
            raise ValueError(f"damp is a positive share, not {self.damp}")
        if self.blocksize < 1:
            raise ValueError(f"blocksize is at least 1, not {self.blocksize}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        check_linears(self, model, model.linears(self.where), self.group)
        check_data(self, ctx)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ...calib.stats import Hessian
        from ._gptq import gptq

        walk = ctx.walk(self.where, name="gptq")
        for unit in walk:
            linears: dict[str, Json] = {}
            for stage in unit.stages if self.true_sequential else (unit.linears,):
                for ref, hessian in unit.observe(Hessian, stage, self.token_weights).items():
                    solved = gptq(
                        ref.module.weight,
                        _square(hessian.matrix, ref.module.in_features),
                        bits=self.bits,
                        group=self.group,
                        symmetric=self.symmetric,
                        dtype=model.storage_dtype,
                        damp=self.damp,
                        act_order=self.act_order,
                        blocksize=self.blocksize,
                        scale_search=self.scale_search,
                    )
                    place(model, ref, solved.weight, solved.grid)
                    linears[ref.path] = {
                        "error": solved.error,
                        "relative": solved.relative,
                        "retries": solved.retries,
                        "dead": solved.dead,
                        "fallback": solved.fallback,
                        "tokens": hessian.tokens,
                    }
            unit.notes["linears"] = linears
        rows = {path: row for notes in walk.notes.values() for path, row in notes["linears"].items()}
        numbers = _numbers(rows) | {"visual_token_share": visual_share(model, ctx.fit)}
        numbers["visual_token_weight"] = walk.weights_used(self.token_weights)
        return Notes(numbers, {"linears": list(rows)})

    def ensures(self, model: ModelView) -> None:
        check_grids(self, model, model.ledger.record_of(self)["linears"], self.bits, self.group, self.symmetric)

    def weaker(self) -> Self | None:
        return milder(self)


def _square(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """The Hessian, or zeros where no token ever reached the linear (an expert without visitors)."""
    return matrix if matrix.numel() else matrix.new_zeros(width, width)


def _numbers(rows: dict[str, dict[str, Json]]) -> dict[str, Json]:
    relative = [row["relative"] for row in rows.values()]
    worst = max(rows, key=lambda path: rows[path]["relative"])
    return {
        "linears": len(rows),
        "mean_relative_error": sum(relative) / len(relative),
        "worst_relative_error": rows[worst]["relative"],
        "worst_linear": worst,
        "damp_retries": sum(row["retries"] for row in rows.values()),
        "rounded_to_nearest": sum(row["fallback"] for row in rows.values()),
        "dead_columns": sum(row["dead"] for row in rows.values()),
    }
