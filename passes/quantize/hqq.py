"""quantize.hqq: grids fitted to the weights alone, outliers left out of the count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from ...compress.base import Context, Json, Notes, Pass
from ._common import check_grids, check_linears, check_settings, milder, place

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView


@dataclass(frozen=True)
class HQQ(Pass):
    """Fit every group's zero point and scale to its weights by half-quadratic splitting, then round. Needs no data.

    The error is counted in a norm below 1, in which few large errors weigh less than many middling ones. Zero points
    are integers here, as all packed formats store them; HQQ's own are not.

    Settings:
        bits: 2, 3, 4 or 8.
        group: input channels that share a scale; -1 is one scale a row.
        symmetric: no zero points: the scale alone is fitted.
        where: selector of the linears.
        norm: p of the p-norm, above 0, below 1.
        iterations: turns of the fit.
        beta: how strongly the auxiliary error is tied to the real one, in steps of the plain scale.
        kappa: growth of beta with every turn.
    """

    name: ClassVar[str] = "quantize.hqq"
    summary: ClassVar[str] = "weights to 2, 3, 4 or 8 bits without data, on grids fitted in a norm below 1"
    paper: ClassVar[str] = "Half-Quadratic Quantization, Badri and Shaji 2023, mobiusml.github.io/hqq_blog"
    needs_data: ClassVar[bool] = False

    bits: int = 4
    group: int = 64
    symmetric: bool = False
    where: tuple[str, ...] | str = ("vision", "connector", "language")
    norm: float = 0.7
    iterations: int = 20
    beta: float = 10.0
    kappa: float = 1.01

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group, self.symmetric)
        if not 0 < self.norm < 1:
            raise ValueError(f"norm lies between 0 and 1, not at {self.norm}")
        if self.iterations < 1:
            raise ValueError(f"iterations is at least 1, not {self.iterations}")
        if not (self.beta > 0 and self.kappa >= 1):
            raise ValueError(f"beta is positive and kappa at least 1, not {self.beta} and {self.kappa}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        check_linears(self, model, model.linears(self.where), self.group)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ...compress.runtime.grid import dequantize, quantize
        from ._hqq import hqq, lp_errors
        from ._rtn import absmax_grid, groups_of

        refs = model.linears(self.where)
        squared = whole = plain_lp = fitted_lp = 0.0
        ctx.progress.start("hqq", len(refs))
        for ref in refs:
            weight = ref.module.weight.detach().float()
            kind = (self.bits, self.group, self.symmetric, model.storage_dtype)
            bits, group, symmetric, dtype = kind
            grid = hqq(
                weight,
                bits=bits,
                group=group,
                symmetric=symmetric,
                dtype=dtype,
                norm=self.norm,
                iterations=self.iterations,
                beta=self.beta,
                kappa=self.kappa,
            )
            rounded = dequantize(quantize(weight, grid), grid)
            parts = groups_of(weight, self.group)
            plain_lp += float(lp_errors(parts, absmax_grid(weight, *kind), self.norm).sum())
            fitted_lp += float(lp_errors(parts, grid, self.norm).sum())
            squared += float((weight - rounded).square().sum())
            whole += float(weight.square().sum())
            place(model, ref, rounded, grid)
            ctx.progress.step(note=ref.path)
        ctx.progress.done()
        numbers: dict[str, Json] = {
            "linears": len(refs),
            "relative_weight_error": squared / whole if whole else 0.0,
            "norm_left": fitted_lp / plain_lp if plain_lp else 1.0,
        }
        return Notes(numbers, {"linears": [ref.path for ref in refs]})

    def ensures(self, model: ModelView) -> None:
        check_grids(self, model, model.ledger.record_of(self)["linears"], self.bits, self.group, self.symmetric)

    def weaker(self) -> Self | None:
        return milder(self)
