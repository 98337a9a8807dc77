"""quantize.rtn: every weight to the nearest point of its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ._common import (
    check_data,
    check_grids,
    check_inputs,
    check_linears,
    check_settings,
    fitting_group,
    group_notes,
    milder,
    place,
    visual_share,
)
from ._table import check_table, chosen, importance, selected, stock_note

if TYPE_CHECKING:
    import torch

    from ...compress.anatomy import LinearRef, ModelView, Table


@dataclass(frozen=True)
class RTN(Pass):
    """Round every weight to the nearest point of its grid, the scales chosen by how much each input matters.

    Settings:
        bits: 2, 3, 4 or 8.
        group: input channels that share a scale; -1 is one scale a row. A linear whose width it does not divide takes
            the largest of group/2, group/4, ... from 16 on that does, else one scale a row; the notes count them.
        symmetric: no zero points.
        where: selector of the linears; ``embeddings`` is the token embedding, one tensor with a head that shares its
            weight, which ``head`` selects as well.
        search: ``importance`` searches each scale, of either sign, for the least rounding error weighted by E[x^2] of
            the inputs (AutoRound's opt-RTN): blocks are walked in forward order, and each sees what the rounded ones
            before it produce. Where there are no samples, all inputs count alike, and the notes count these linears.
            The embedding has no such inputs; those of a head that shares its weight count.
            ``none`` takes ``scale = max|w| / (2^(bits-1) - 1)`` and needs no data: the plain control.
        token_weights: how visual and text tokens count in E[x^2]: ``gradient`` weighs a visual token by MBQ's ratio of
            gradients, r of its block's attention or MLP, where text weighs 1; ``balanced`` (half each), ``uniform`` or
            ``text``.
    """

    name: ClassVar[str] = "quantize.rtn"
    summary: ClassVar[str] = "weights to 2, 3, 4 or 8 bits by rounding to nearest, packed on disk"
    paper: ClassVar[str] = "the baseline of GPTQ, arXiv 2210.17323; scale search: AutoRound, arXiv 2309.05516"

    bits: int = 4
    group: int = 64
    symmetric: bool = True
    where: tuple[str, ...] | str = ("vision", "connector", "language")
    search: Literal["importance", "none"] = "importance"
    token_weights: Literal["gradient", "balanced", "uniform", "text"] = "gradient"

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group, self.symmetric)

    def requires(self, model: ModelView, ctx: Context) -> None:
        where, table = chosen(model, self.where)
        check_linears(self, model, selected(model, where))
        if table:
            check_table(self, model, table)
        if self.search == "importance" and ctx.fit:
            check_data(self, ctx)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        rows: dict[str, Json] = {}
        where, table = chosen(model, self.where)
        searching, walk = self.search == "importance", None
        if table:
            weights = importance(ctx, table, self.token_weights) if searching else None
            rows[table.path] = self._round(model, table, weights)
        if where and searching and ctx.fit:
            from ...calib.stats import MeanSquare

            walk = ctx.walk(where, name="importance")
            for unit in walk:
                stats = unit.observe(MeanSquare, token_weights=self.token_weights)
                unit.notes["linears"] = {ref.path: self._round(model, ref, stat.mean) for ref, stat in stats.items()}
            for notes in walk.notes.values():
                rows |= notes["linears"]
        else:
            for ref in selected(model, where):
                rows[ref.path] = self._round(model, ref, None)
        squared, whole = (sum(row[kind] for row in rows.values()) for kind in ("squared_error", "squared_weight"))
        groups = {path: row["group"] for path, row in rows.items()}
        numbers: dict[str, Json] = {"linears": len(rows) - bool(table), "embeddings": int(bool(table))}
        numbers |= {"relative_weight_error": squared / whole if whole else 0.0}
        numbers |= group_notes(groups, self.group)
        if searching:
            numbers["searched_without_importance"] = sum(row["blind"] for row in rows.values())
            if walk:
                numbers["visual_token_share"] = visual_share(model, ctx.fit)
                numbers["visual_token_weight"] = walk.weights_used(self.token_weights)
        numbers["stock_transformers"] = stock_note(model)
        return Notes(numbers, {"linears": groups})

    def _round(self, model: ModelView, ref: LinearRef | Table, weights: torch.Tensor | None) -> dict[str, Json]:
        """Round one weight by the importance of its inputs, `weights` [in].

        All inputs count alike where there is none, or where it is empty or 0 (no token came by).
        """
        from ...compress.runtime.grid import dequantize, quantize
        from ._rtn import absmax_grid, searched_grid

        weight = ref.module.weight.detach().float()
        group = fitting_group(weight.shape[1], self.group)
        kind = (self.bits, group, self.symmetric, model.storage_dtype)
        blind = weights is None or not bool(weights.any())
        if self.search == "none":
            grid = absmax_grid(weight, *kind)
        else:
            if weights is not None:
                check_inputs(ref, weights)
            grid = searched_grid(weight, None if blind else weights, *kind)
        rounded = dequantize(quantize(weight, grid), grid)
        row: dict[str, Json] = {
            "squared_error": float((weight - rounded).square().sum()),
            "squared_weight": float(weight.square().sum()),
            "group": group,
            "blind": blind,
        }
        place(model, ref, rounded, grid)
        return row

    def ensures(self, model: ModelView) -> None:
        check_grids(self, model, model.ledger.record_of(self)["linears"], self.bits, self.group, self.symmetric)

    def weaker(self) -> Self | None:
        return milder(self)
