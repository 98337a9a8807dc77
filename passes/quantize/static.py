"""quantize.static: weights and activations in 8 bits with calibrated ranges, for the vision tower by default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ._common import check_data, check_linears
from .smooth import check_alpha

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView


@dataclass(frozen=True)
class Static(Pass):
    """8-bit weights (one scale a row) and 8-bit inputs, whose scale and zero point are calibrated once for each input.

    Nothing is left to compute about ranges when the model runs, which is what fast integer kernels want; a vision
    tower's inputs, always pictures, allow it. Linears with the same input share its range. Every block is calibrated on
    what the rounded ones before it return.

    Settings:
        where: selector of the linears.
        range: ``mse`` shrinks either end of the range where that lowers the squared error of the output (each channel
            weighed by the weights that read it), ``max`` holds every calibration value.
        alpha: smoothing before (see quantize.smooth): a share from 0 to 1, ``search``, or ``none``. It pays where
            single channels stand far out; the demo model's tower, where none does, came out better without.
        token_weights: as in quantize.smooth; it matters in the language model only.
    """

    name: ClassVar[str] = "quantize.static"
    summary: ClassVar[str] = "weights and activations to 8 bits with calibrated ranges, for fast integer kernels"
    paper: ClassVar[str] = "Jacob et al., arXiv 1712.05877; smoothing: SmoothQuant, arXiv 2211.10438"

    where: tuple[str, ...] | str = ("vision", "connector")
    range: Literal["mse", "max"] = "mse"
    alpha: float | Literal["search", "none"] = "none"
    token_weights: Literal["gradient", "balanced", "uniform", "text"] = "gradient"

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def requires(self, model: ModelView, ctx: Context) -> None:
        check_linears(self, model, model.linears(self.where))
        check_data(self, ctx)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ._w8a8 import Wish, eight_bits

        wish = Wish("tensor", self.range, self.alpha, self.token_weights)
        return eight_bits(model, ctx.walk(self.where, name="static"), wish)

    def ensures(self, model: ModelView) -> None:
        from ._w8a8 import check_activations

        check_activations(self, model, model.ledger.record_of(self)["activations"])

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        from ._w8a8 import install_all

        install_all(model, record["activations"])

    def brief(self) -> Self:
        return dataclasses.replace(self, alpha=0.5) if self.alpha == "search" else self
