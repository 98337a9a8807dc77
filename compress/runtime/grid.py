"""The grid that a quantized weight lies on, and the way between weights, integers and packed words.

A model keeps ordinary `nn.Linear` modules whose weights are the dequantized values; `ModelView.grids` says which grid
each lies on. Integers are signed, `q` in [-2^(b-1), 2^(b-1) - 1], as compressed-tensors stores them, and

    value = (q - zero) * scale          rounded to the dtype of `scale`

which is, bit for bit, what compressed-tensors decompresses. From a value on the grid the integers come back exactly, so
nothing but the scales has to be kept beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

BITS = (2, 3, 4, 8)


@dataclass(eq=False)
class Grid:
    """Where a weight [out, in] may lie.

    Attributes:
        bits: 2, 3, 4 or 8. group: input channels that share a scale, -1 for a whole row.
        symmetric: no zero point.
        scale: [out, groups], in the dtype that weights are saved in; where symmetric it may be negative, which puts
            the level -2^(b-1) on the positive side. zero: [out, groups] int8, None where symmetric.
    """

    bits: int
    group: int
    symmetric: bool
    scale: torch.Tensor
    zero: torch.Tensor | None = None

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def bytes(self) -> int:
        """Of the scales and zero points on disk (zero points are packed like weights, along the rows)."""
        out, groups = self.scale.shape
        zeros = 0 if self.zero is None else -(-out * self.bits // 32) * 4 * groups
        return self.scale.numel() * self.scale.element_size() + zeros

    def column(self, group: int) -> Grid:
        """The grid of one group of columns alone, as a per-row grid."""
        zero = None if self.zero is None else self.zero[:, group : group + 1]
        return Grid(self.bits, -1, self.symmetric, self.scale[:, group : group + 1], zero)


def packed_bytes(shape: tuple[int, int], grid: Grid) -> int:
    """Bytes of a weight [out, in] on disk: packed integers, scales, zero points, its shape."""
    out, columns = shape
    return out * (-(-columns * grid.bits // 32) * 4) + grid.bytes + 16


def _spread(values: torch.Tensor, columns: int) -> torch.Tensor:
    """[out, groups] to [out, columns]: every column with the value of its group."""
    return values.repeat_interleave(columns // values.shape[1], dim=1)


def quantize(w: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round `w` [out, in] to the nearest point of the grid: int8 [out, in]."""
    q = (w.float() / _spread(grid.scale.float(), w.shape[1])).round_()
    if grid.zero is not None:
        q += _spread(grid.zero.float(), w.shape[1])
    return q.clamp_(grid.low, grid.high).to(torch.int8)


def dequantize(q: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The values of integers `q` [out, in], float32, each rounded to the dtype of the scale."""
    value = q.float()
    if grid.zero is not None:
        value = value - _spread(grid.zero.float(), q.shape[1])
    return (value * _spread(grid.scale.float(), q.shape[1])).to(grid.scale.dtype).float()


def off_grid(w: torch.Tensor, grid: Grid) -> float:
    """Share of the weights `w` [out, in] that do not lie on the grid."""
    return float((dequantize(quantize(w, grid), grid) != w.float()).float().mean())


def on_grid(w: torch.Tensor, grid: Grid) -> bool:
    """Whether every weight lies on the grid, so that its integers come back exactly."""
    return off_grid(w, grid) == 0.0


def pack(q: torch.Tensor, bits: int, dim: Literal[0, 1] = 1) -> torch.Tensor:
    """int8 [out, in] to int32 [out, ceil(in * bits / 32)], dense along the inputs (compressed-tensors' layout).

    dim: 0 packs along the outputs instead.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # seconds to import: who packs

    return pack_to_int32(q, bits, packed_dim=dim)


def unpack(words: torch.Tensor, bits: int, shape: tuple[int, int], dim: Literal[0, 1] = 1) -> torch.Tensor:
    """The inverse of `pack`: int8 of `shape` [out, in]."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    return unpack_from_int32(words, bits, torch.Size(shape), packed_dim=dim)
