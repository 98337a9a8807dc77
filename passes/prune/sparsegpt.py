"""prune.sparsegpt: zeros column by column, the other weights changed to make up for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...compress.base import Json
from ..quantize._common import check_inputs
from ..quantize.gptq import square
from ._sparsify import Sparsify, pattern_of

if TYPE_CHECKING:
    from ...calib.stats import Hessian
    from ...compress.anatomy import LinearRef, ModelView


@dataclass(frozen=True)
class SparseGPT(Sparsify):
    """Set weights to zero column by column, by what a zero costs after the columns to come have made up for it.

    Blocks are walked in forward order, and inside a block each stage sees what the pruned ones before it produce. Zeros
    that an earlier pass promised stay. Later quantizing passes keep the zeros, and so does training (LoRA refuses).
    Zeros save no bytes where weights are stored densely, as they are here, and no time without kernels that skip them:
    2:4 is what GPUs have such kernels for.

    Settings:
        sparsity: share of a linear's weights that become zero, in (0, 1), the same in every block of columns.
        pattern: ``unstructured``, or ``n:m``: at most n of every m consecutive inputs stay (``2:4``, ``4:8``); the
            sparsity is then 1 - n/m, and the setting `sparsity` does not count.
        where: selector of the linears; vision tower and connector are included by default.
        token_weights: which inputs make the Hessian in the language model: ``drift`` (ATV-Pruning) all tokens of text
            and the visual tokens that a block turns the furthest, 1 - cos(x_in, x_out); ``text``, ``uniform``,
            ``balanced`` (half each), ``gradient`` (MBQ's ratio). In the vision tower and the connector every token
            counts the same. A linear beside the blocks has no drift and takes ``balanced``; the notes count them.
        drift_share: share of a sample's visual tokens that count with ``drift``, chosen anew in every block.
        damp: share of the Hessian's mean diagonal added to its diagonal; raised tenfold until it is positive definite,
            and every raise is counted in the notes.
        blocksize: columns whose zeros are chosen together; a multiple of m.
    """

    name: ClassVar[str] = "prune.sparsegpt"
    summary: ClassVar[str] = "zeros, unstructured or n:m, with second-order compensation by the other weights"
    paper: ClassVar[str] = "SparseGPT, arXiv 2301.00774; tokens: ATV-Pruning, CVPR 2026"

    damp: float = 0.01
    blocksize: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damp > 0:
            raise ValueError(f"damp is a positive share, not {self.damp}")
        _, m = pattern_of(self.pattern) or (0, 1)
        if self.blocksize < 1 or self.blocksize % m:
            raise ValueError(f"blocksize is a multiple of {m}, not {self.blocksize}")

    def _statistic(self) -> Callable[[], Hessian]:
        from ...calib.stats import Hessian

        return Hessian

    def _prune(self, model: ModelView, stage: Sequence[LinearRef], stat: Hessian) -> dict[str, dict[str, Json]]:
        """`lost`: the layer's output error as a share of its output."""
        from ..quantize._gptq import factor_of
        from ._sparse import sparsegpt

        rows: dict[str, dict[str, Json]] = {}
        h = square(stat.matrix, stage[0].module.in_features)
        check_inputs(stage[0], h)
        factor = factor_of(h, self.damp, "none")
        for ref in stage:
            pruned = sparsegpt(
                ref.module.weight,
                h,
                sparsity=self.sparsity,
                pattern=pattern_of(self.pattern),
                blocksize=self.blocksize,
                factor=factor,
                gone=model.promised_zeros(ref.path),
            )
            ref.module.weight.data.copy_(pruned.weight)
            rows[ref.path] = {
                "lost": pruned.error,
                "dead": int(factor.dead.sum()),
                "blind": pruned.fallback,
                "retries": pruned.retries,
            }
        return rows
