"""prune.wanda: zeros where weight times input is smallest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...compress.base import Json
from ..quantize._common import check_inputs
from ._sparsify import Sparsify, pattern_of

if TYPE_CHECKING:
    from ...calib.stats import ColumnNorm
    from ...compress.anatomy import LinearRef, ModelView


@dataclass(frozen=True)
class Wanda(Sparsify):
    """Set to zero the weights of every output row with the smallest ``|w_ij| ||X_j||``; the others stay as they are.

    Blocks are walked in forward order, and inside a block each stage sees what the pruned ones before it produce. Later
    quantizing passes keep the zeros, and so does training (LoRA refuses). Zeros save no bytes where weights are stored
    densely, as they are here, and no time without kernels that skip them: 2:4 is what GPUs have such kernels for.

    Settings:
        sparsity: share of the weights of a row that become zero, in (0, 1).
        pattern: ``unstructured``, or ``n:m``: at most n of every m consecutive inputs stay (``2:4``, ``4:8``); the
            sparsity is then 1 - n/m, and the setting `sparsity` does not count.
        where: selector of the linears; vision tower and connector are included by default.
        token_weights: whose inputs make ``||X_j||`` in the language model: ``drift`` (ATV-Pruning) all tokens of text
            and the visual tokens that a block turns the furthest, 1 - cos(x_in, x_out); ``text``, ``uniform``,
            ``balanced`` (half each), ``gradient`` (MBQ's ratio). In the vision tower and the connector every token
            counts the same. A linear beside the blocks has no drift and takes ``balanced``; the notes count them.
        drift_share: share of a sample's visual tokens that count with ``drift``, chosen anew in every block.
    """

    name: ClassVar[str] = "prune.wanda"
    summary: ClassVar[str] = "zeros, unstructured or n:m, where weight times input is smallest"
    paper: ClassVar[str] = "Wanda, arXiv 2306.11695; tokens: ATV-Pruning, CVPR 2026"

    def _statistic(self) -> Callable[[], ColumnNorm]:
        from ...calib.stats import ColumnNorm

        return ColumnNorm

    def _prune(self, model: ModelView, stage: Sequence[LinearRef], stat: ColumnNorm) -> dict[str, dict[str, Json]]:
        """`lost`: what went of the sum of squared scores."""
        from ._sparse import wanda

        rows: dict[str, dict[str, Json]] = {}
        check_inputs(stage[0], stat.mean)
        for ref in stage:
            weight = ref.module.weight.data
            norm = stat.norm if stat.mean.numel() else stat.mean.new_zeros(weight.shape[1])
            zeros = wanda(weight, norm, self.sparsity, pattern_of(self.pattern))
            scores = (weight.double() * norm.to(weight.device)).square()
            whole = float(scores.sum())
            weight.masked_fill_(zeros, 0.0)
            rows[ref.path] = {
                "lost": float(scores[zeros].sum()) / whole if whole else 0.0,
                "dead": int((norm == 0).sum()),
                "blind": not bool(norm.any()),
                "retries": 0,
            }
        return rows
