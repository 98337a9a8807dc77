"""Weights that name levels of a table: the 4-bit formats of bitsandbytes, NF4 and FP4 (QLoRA, arXiv 2305.14314).

A weight [out, in] is read as one long row, cut into blocks of 64 (the last may be shorter; a block may span two rows)::

    value = level[code] * absmax[block]         in float32, rounded to the dtype that weights are saved in

With double quantization absmax is stored in 8 bits, in runs of 256 blocks::

    absmax = dynamic_map[code8] * nested[run] + offset                                                      in float32

The codes come back from the values, as integers do on a `Grid`: the model keeps ordinary linears with the values, and
nothing but the absmax is kept beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .grid import Grid

BLOCK = 64  # weights that share an absmax
RUN = 256  # absmax that share a scale
LEVELS = {  # by code
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),  # quantiles of the normal distribution (QLoRA, appendix E)
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip


@dataclass(eq=False)
class Codebook:
    """Where a weight may lie, like `Grid`.

    Attributes:
        levels: ``nf4`` or ``fp4``. dtype: what values are rounded to, as a word (``bfloat16``).
        absmax: [blocks] float32; uint8 codes of it where it is quantized too.
        nested: [runs] float32, the scale of these codes, or None. offset: [] float32, or None.
    """

    bits: ClassVar[int] = 4

    levels: str
    dtype: str
    absmax: Tensor
    nested: Tensor | None = None
    offset: Tensor | None = None

    @property
    def double(self) -> bool:
        """Whether absmax is quantized too."""
        return self.nested is not None

    @property
    def bytes(self) -> int:
        """Of what lies beside the codes on disk: absmax, and the tables, which bitsandbytes keeps with every weight."""
        tables = 4 * 16 if self.nested is None else 4 * (16 + 256 + self.nested.numel())
        return self.absmax.numel() * self.absmax.element_size() + tables

    def scales(self) -> Tensor:
        """The absmax of every block, [blocks] float32."""
        if self.nested is None or self.offset is None:
            return self.absmax
        spread = self.nested.repeat_interleave(RUN)[: self.absmax.numel()]
        return dynamic_map().to(spread.device)[self.absmax.long()] * spread + self.offset

    def quantize(self, w: Tensor) -> Tensor:
        """The codes of the levels nearest to `w` [out, in]: uint8 [out, in]."""
        scale = self.scales()
        scale = torch.where(scale == 0, 1.0, scale)  # then all values are 0, whatever the code
        return nearest(blocks_of(w) / scale[:, None], self.levels).flatten()[: w.numel()].view(w.shape)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of `codes` [out, in], float32, each rounded to `dtype`."""
        values = blocks_of(table(self.levels).to(codes.device)[codes.long()]) * self.scales()[:, None]
        return values.flatten()[: codes.numel()].view(codes.shape).to(getattr(torch, self.dtype)).float()

    def off_grid(self, w: Tensor) -> float:
        """Share of the weights `w` [out, in] that are no level times the absmax of their block."""
        return float((self.dequantize(self.quantize(w)) != w.float()).float().mean())


def integer_grids(grids: Mapping[str, Grid | Codebook]) -> dict[str, Grid]:
    """Those that are integers with scales."""
    return {path: grid for path, grid in grids.items() if isinstance(grid, Grid)}


def codebooks(grids: Mapping[str, Grid | Codebook]) -> dict[str, Codebook]:
    """Those that are codes with an absmax."""
    return {path: grid for path, grid in grids.items() if isinstance(grid, Codebook)}


def blocks_of(w: Tensor) -> Tensor:
    """`w` of any shape as [blocks, 64] float32, the last block filled up with 0."""
    flat = w.detach().float().flatten()
    return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def table(levels: str) -> Tensor:
    """The levels by code, [16] float32."""
    return torch.tensor(LEVELS[levels])


def nearest(x: Tensor, levels: str) -> Tensor:
    """The code of the level nearest to each value, uint8; between two, the lower level."""
    return _nearest(x, table(levels))


def nearest_dynamic(x: Tensor) -> Tensor:
    """The same in `dynamic_map`."""
    return _nearest(x, dynamic_map())


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    values, order = levels.to(x.device).sort(stable=True)
    return order[torch.bucketize(x, (values[1:] + values[:-1]) / 2)].to(torch.uint8)


@functools.cache
def dynamic_map() -> Tensor:
    """The 8-bit dynamic data type (arXiv 1511.04561), [256] float32, ascending from about -1 to 1.

    Per sign seven decades, of which the highest has 64 values, each lower one half as many: the centres of equal steps
    between a tenth of the decade's end and its end. Then 0 and 1.
    """
    centres = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        centres.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    positive = torch.cat(centres)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values


def pack(codes: Tensor) -> Tensor:
    """Codes of any shape as bytes [ceil(n / 2), 1], the first of two in the high half, an odd one out filled up."""
    flat = F.pad(codes.flatten(), (0, codes.numel() % 2))
    return (flat[::2] << 4 | flat[1::2]).unsqueeze(1)


def unpack(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack`: uint8 of `shape`."""
    flat = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()
    return flat[: shape[0] * shape[1]].view(shape)
