"""quantize.bnb: the formats of bitsandbytes, NF4 and the weights of LLM.int8, without bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import PromiseBroken
from ._common import check_grids, check_linears, place
from ._table import check_table, chosen, selected, stock_note

if TYPE_CHECKING:
    import torch

    from ...compress.anatomy import LinearRef, ModelView, Table
    from ...compress.runtime.codebook import Codebook
    from ...compress.runtime.grid import Grid


@dataclass(frozen=True)
class BNB(Pass):
    """Round as bitsandbytes does, without data, into what bitsandbytes loads as it is.

    4 bits name one of 16 levels, which a block of 64 weights scales by its largest one. What is saved is bitsandbytes'
    own layout: stock transformers with bitsandbytes loads it, svlm needs no bitsandbytes. 8 bits are the weights of
    LLM.int8: integers with one scale a row, the row's largest weight over 127, saved as compressed-tensors;
    ``svlm export --format bnb`` writes them for bitsandbytes. The other half of LLM.int8 is done where bitsandbytes
    runs the model: it rounds inputs too, and leaves out channels with outliers; svlm measures exact inputs.

    Settings:
        bits: 4 or 8.
        levels: of 4 bits: ``nf4``, quantiles of a normal distribution, or ``fp4``, floats with 2 exponent bits.
        double: of 4 bits: the largest weights of the blocks are themselves rounded to 8 bits, which leaves 4.13 bits a
            weight of 4.5.
        where: selector of the linears; ``embeddings`` is the token embedding, one tensor with a head that shares its
            weight, which ``head`` selects as well. bitsandbytes loads no embedding of 4 bits, svlm does.
    """

    name: ClassVar[str] = "quantize.bnb"
    summary: ClassVar[str] = "weights to NF4 or 8 bits as bitsandbytes rounds them, loaded by it"
    paper: ClassVar[str] = "QLoRA, arXiv 2305.14314; LLM.int8, arXiv 2208.07339"
    needs_data: ClassVar[bool] = False

    bits: int = 4
    levels: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    where: tuple[str, ...] | str = ("vision", "connector", "language")

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is 4 or 8, not {self.bits}")
        if self.levels not in ("nf4", "fp4"):
            raise ValueError(f"levels is nf4 or fp4, not {self.levels}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        where, table = chosen(model, self.where)
        check_linears(self, model, selected(model, where))
        if table:
            check_table(self, model, table)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        where, table = chosen(model, self.where)
        refs: list[LinearRef | Table] = [*([table] if table else []), *selected(model, where)]
        squared = whole = 0.0
        ctx.progress.start("bnb", len(refs))
        for ref in refs:
            weight = ref.module.weight.detach().float()
            rounded, grid = self._round(weight, model.storage_dtype)
            squared += float((weight - rounded).square().sum())
            whole += float(weight.square().sum())
            place(model, ref, rounded, grid)
            ctx.progress.step(note=ref.path)
        ctx.progress.done()
        numbers: dict[str, Json] = {
            "linears": len(refs) - bool(table),
            "embeddings": int(bool(table)),
            "relative_weight_error": squared / whole if whole else 0.0,
            "stock_transformers": stock_note(model),
        }
        return Notes(numbers, {"linears": [ref.path for ref in refs]})

    def _round(self, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Grid | Codebook]:
        """The rounded weight [out, in], and what it lies on."""
        from ...compress.runtime.grid import dequantize, quantize
        from ._bnb import blockwise
        from ._rtn import absmax_grid

        if self.bits == 8:
            grid = absmax_grid(weight, 8, -1, True, dtype)
            return dequantize(quantize(weight, grid), grid), grid
        codes, book = blockwise(weight, self.levels, dtype, self.double)
        return book.dequantize(codes), book

    def ensures(self, model: ModelView) -> None:
        from ...compress.runtime.codebook import Codebook

        paths = model.ledger.record_of(self)["linears"]
        if self.bits == 8:
            check_grids(self, model, paths, 8, -1, True)
            return
        for path in paths:
            book = model.grids.get(path)
            if not isinstance(book, Codebook) or (book.levels, book.double) != (self.levels, self.double):
                raise PromiseBroken(f"{self.name} promised the codebook {self.levels}", where=path, found="it is gone")
            if share := book.off_grid(model.weight(path)):
                raise PromiseBroken(
                    f"{self.name} promised weights on the codebook {self.levels}",
                    where=path,
                    found=f"{100 * share:.1f} % of the weights are off it",
                    change="quantize last",
                )

    def weaker(self) -> Self | None:
        return replace(self, bits=8) if self.bits == 4 else None
