"""quantize.rtn: every weight to the nearest point of its grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ...compress.base import Context, Notes, Pass
from ._common import check_grids, check_linears, check_settings, milder, place

if TYPE_CHECKING:
    from ...compress.anatomy import LinearRef, ModelView


@dataclass(frozen=True)
class RTN(Pass):
    """Round every weight to the nearest point of its grid. Needs no data with ``search: none``: the control of GPTQ.

    Settings:
        bits: 2, 3, 4 or 8.
        group: input channels that share a scale; -1 is one scale a row.
        symmetric: no zero points, ``scale = max|w| / (2^(bits-1) - 1)``.
        where: selector of the linears.
        search: ``none`` takes the scale from the largest weight; ``importance`` searches the clipped scale with the
            least rounding error weighted by E[x^2] of the inputs (AutoRound's opt-RTN), which needs data.
        token_weights: how visual and text tokens count in E[x^2]: ``balanced`` (half each), ``uniform`` or ``text``.
    """

    name: ClassVar[str] = "quantize.rtn"
    summary: ClassVar[str] = "weights to 2, 3, 4 or 8 bits by rounding to nearest, packed on disk"
    paper: ClassVar[str] = "the baseline of GPTQ, arXiv 2210.17323; scale search: AutoRound, arXiv 2309.05516"

    bits: int = 4
    group: int = 64
    symmetric: bool = True
    where: tuple[str, ...] | str = ("vision", "connector", "language")
    search: Literal["none", "importance"] = "none"
    token_weights: Literal["balanced", "uniform", "text"] = "balanced"

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group, self.symmetric)

    def requires(self, model: ModelView, ctx: Context) -> None:
        check_linears(self, model, model.linears(self.where), self.group)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ...compress.runtime.grid import dequantize, quantize
        from ._rtn import absmax_grid, searched_grid

        paths, squared, whole = [], 0.0, 0.0
        for ref, importance in self._linears(model, ctx):
            weight = ref.module.weight.detach().float()
            kind = (self.bits, self.group, self.symmetric, model.storage_dtype)
            grid = absmax_grid(weight, *kind) if self.search == "none" else searched_grid(weight, importance, *kind)
            rounded = dequantize(quantize(weight, grid), grid)
            squared += float((weight - rounded).square().sum())
            whole += float(weight.square().sum())
            place(model, ref, rounded, grid)
            paths.append(ref.path)
        return Notes(
            {"linears": len(paths), "relative_weight_error": squared / whole if whole else 0.0}, {"linears": paths}
        )

    def _linears(self, model: ModelView, ctx: Context) -> Iterator[tuple[LinearRef, Any]]:
        if self.search == "none":
            yield from ((ref, None) for ref in model.linears(self.where))
            return
        from ...calib.stats import MeanSquare

        importances = {}
        for unit in ctx.walk(
            self.where, name="importance"
        ):  # of the unrounded model: all are seen before any is rounded
            for ref, stat in unit.observe(MeanSquare, token_weights=self.token_weights).items():
                importances[ref.path] = stat.mean
        yield from ((ref, importances[ref.path]) for ref in model.linears(self.where))

    def ensures(self, model: ModelView) -> None:
        check_grids(self, model, model.ledger.record_of(self)["linears"], self.bits, self.group)

    def weaker(self) -> Self | None:
        return milder(self)
