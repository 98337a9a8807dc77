"""fuse.norms: the scale and the bias of norms move into the linears behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ._affine import Fold, entering, inside

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView
    from ..quantize._fold import Pair


@dataclass(frozen=True)
class Norms(Fold):
    """Fold each norm's affine part into the linears that alone read it; what the model computes stays.

    ``W (g * n + b)`` is ``(W g) n + W b``: the scale goes into the columns of the weights (where Gemma's norms scale by
    1 + w, w becomes 0), a LayerNorm's bias into the biases of the linears. Where not all of them have a bias, it stays
    in the norm, divided by the scale. A channel whose scale is 0 keeps it. The norm before the head counts too, unless
    the head shares its weight with the embedding.

    It makes nothing smaller or faster: a norm of ones is multiplied with all the same. It is a preparation: without
    scales in between, a rotation may pass from one linear to the next, the size of a weight says what it does to the
    answer (magnitudes, Wanda, low bits without smoothing), and channels of the residual stream can be compared. In 16
    bits the scaled weights are rounded anew, like those of every pass. The logits of some fit samples are compared
    before and after; a difference beyond rounding ends the run.

    Nothing is promised but what the pass itself measured: training may move norms again.

    Settings:
        where: selector of the linears; null: all, the head included. Norms are folded where every linear that reads
            them is selected. The norm that enters a connector through a change of shape is `fuse.connector`'s.
    """

    name: ClassVar[str] = "fuse.norms"
    summary: ClassVar[str] = "exact: the scales and biases of norms go into the linears behind them"
    paper: ClassVar[str] = "QuaRot, arXiv 2404.00456 (section 4, stage 1); SliceGPT, arXiv 2401.15024"
    needs_data: ClassVar[bool] = False

    where: tuple[str, ...] | str | None = None

    def pairs(self, model: ModelView) -> list[Pair]:
        everything = tuple(ref for unit in model.units for ref in unit.linears)
        selected = everything if self.where is None else model.linears(self.where)
        found = list(inside(model, selected))
        for unit in model.units:
            pair = entering(model, unit) if unit.part != "connector" else None
            if pair is not None and set(pair.targets) <= set(selected):
                found.append(pair)
        return found
