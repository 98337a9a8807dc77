"""Grids: values and integers, packing, the choice of scales."""

import pytest
import torch

from svlm.compress.runtime.grid import BITS, Grid, dequantize, off_grid, on_grid, pack, quantize, unpack
from svlm.passes.quantize._rtn import absmax_grid, searched_grid


def weight(out=48, columns=64, seed=0):
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 64, -1])
@pytest.mark.parametrize("bits", BITS)
def test_integers_come_back_from_values(bits, group, symmetric, dtype):
    symmetric = symmetric or bits == 8  # the passes refuse 8 bits with zero points: finer than bfloat16
    w = weight()
    grid = absmax_grid(w, bits, group, symmetric, dtype)
    q = quantize(w, grid)
    value = dequantize(q, grid)
    assert torch.equal(quantize(value, grid), q), "exactly"
    assert on_grid(value, grid) and torch.equal(value, value.to(dtype).float())
    assert q.min() >= -(2 ** (bits - 1)) and q.max() <= 2 ** (bits - 1) - 1
    step = grid.scale.float().repeat_interleave(w.shape[1] // grid.scale.shape[1], 1)
    inside = (value - w).abs() <= 0.51 * step + 0.01 * w.abs()
    assert inside.float().mean() > (0.97 if bits > 2 else 0.9)
    off = value.clone()
    off[0, 0] += 0.37 * step[0, 0]
    assert off_grid(off, grid) == pytest.approx(1 / w.numel())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [5, 32, 33, 100])
def test_packing_is_dense_and_comes_back(bits, columns):
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, columns), dtype=torch.int8)
    words = pack(q, bits)
    assert words.dtype == torch.int32 and words.shape == (7, -(-columns * bits // 32))
    assert torch.equal(unpack(words, bits, (7, columns)), q)
    first = int(words[0, 0]) & ((1 << bits) - 1)
    assert first == int(q[0, 0]) + (1 << (bits - 1)), "the first integer, shifted, is in the lowest bits"


def test_groups_of_zeros_and_the_scale_search():
    w = weight()
    w[3, :16] = 0
    grid = absmax_grid(w, 3, 16, True, torch.bfloat16)
    assert torch.equal(dequantize(quantize(w, grid), grid)[3, :16], torch.zeros(16))
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4
    best = searched_grid(w, importance, 3, 16, True, torch.bfloat16)

    def error(g):
        return float(((dequantize(quantize(w, g), g) - w).square() * importance).sum())

    assert error(best) < 0.8 * error(grid)


def test_the_grid_of_a_group():
    grid = Grid(4, 16, True, torch.arange(1.0, 9.0).reshape(2, 4))
    assert torch.equal(grid.column(2).scale, torch.tensor([[3.0], [7.0]]))
