"""quantize.smooth: weights and activations in 8 bits, outlier channels moved from one into the other first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ._common import check_data, check_linears

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView


@dataclass(frozen=True)
class Smooth(Pass):
    """8-bit weights (one scale a row) and 8-bit inputs, after SmoothQuant's scales were folded.

    For each norm (or values, or `up` of a gated MLP) and the linears that read it, channel j of the activations is
    divided by ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` and the weights are multiplied by it, which leaves the
    function as it is. Then weights and inputs are rounded, block after block in forward order; in torch the model
    really rounds its inputs from then on. Linears that no such pair reaches are rounded without.

    Settings:
        alpha: how much of the difficulty moves into the weights, 0 to 1; or ``search``: for every pair the share (or
            no scale at all) with the least error of the block's output.
        activations: ``token`` takes a scale from each token when it comes; ``tensor`` calibrates one range for the
            input of each linear (see quantize.static).
        range: of ``tensor``: ``mse`` clips where that lowers the squared error of the output, ``max`` never clips.
        where: selector of the linears; vision tower and connector are included by default. Linears with the same input
            are smoothed only if all of them are selected.
        token_weights: how visual and text tokens count in the largest ``|X_j|``, in ranges and in the search.
            ``uniform``: all alike (plain SmoothQuant). ``balanced``: the maxima of visual and of text tokens are taken
            apart, each relative to its largest channel, and the larger share counts, so that neither hides what stands
            out in the other. ``gradient``: the same with those of visual tokens times the square root of MBQ's ratio
            of gradients. ``text``: text alone. In the vision tower and the connector every token counts the same.
    """

    name: ClassVar[str] = "quantize.smooth"
    summary: ClassVar[str] = "weights and activations to 8 bits, outlier channels moved into the weights first"
    paper: ClassVar[str] = "SmoothQuant, arXiv 2211.10438; token weights: MBQ, arXiv 2412.19509"

    alpha: float | Literal["search"] = "search"
    activations: Literal["token", "tensor"] = "token"
    range: Literal["mse", "max"] = "mse"
    where: tuple[str, ...] | str = ("vision", "connector", "language")
    token_weights: Literal["gradient", "balanced", "uniform", "text"] = "gradient"

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def requires(self, model: ModelView, ctx: Context) -> None:
        check_linears(self, model, model.linears(self.where))
        check_data(self, ctx)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ._w8a8 import Wish, eight_bits

        wish = Wish(self.activations, self.range, self.alpha, self.token_weights)
        return eight_bits(model, ctx.walk(self.where, name="smooth"), wish)

    def ensures(self, model: ModelView) -> None:
        from ._w8a8 import check_activations

        check_activations(self, model, model.ledger.record_of(self)["activations"])

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        from ._w8a8 import install_all

        install_all(model, record["activations"])

    def weaker(self) -> Self | None:
        return dataclasses.replace(self, activations="token") if self.activations == "tensor" else None

    def brief(self) -> Self:
        return dataclasses.replace(self, alpha=0.5) if self.alpha == "search" else self


def check_alpha(alpha: float | str) -> None:
    """Raise ValueError for a share that is none."""
    if not isinstance(alpha, str) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha lies between 0 and 1, not at {alpha}")
