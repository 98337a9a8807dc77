"""The forms in which a linear can run: what each takes, how it is made, how exact it is.

A form is made once from the dequantized weight and its grid and is then a function of the inputs alone. None is
trusted: `check` compares it with the dequantized linear before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..grid import Grid, quantize

Run = Callable[[Tensor], Tensor]  # [..., in] in any float dtype -> [..., out] in the same dtype
TILES = (256, 128, 64, 32)  # groups that torch's 4-bit kernels know
CHECKED = (1, 5)  # numbers of tokens at which a form is compared with the dequantized linear


@dataclass(frozen=True)
class Kernel:
    """A way to compute a linear.

    Attributes:
        bits: what a weight takes in memory, without scales. None: what its grid says, in whole nibbles or bytes.
        tolerance: relative error (Frobenius) against the dequantized linear in float32 above which it is wrong.
        fits: whether it takes a weight of this shape [out, in] and grid on this type of device.
        make: the form, from a weight [out, in] in float32 on its device, its bias, and its grid.
    """

    name: str
    about: str
    bits: int | None
    tolerance: float
    fits: Callable[[tuple[int, int], Grid | None, str], bool]
    make: Callable[[Tensor, Tensor | None, Grid | None], Run]

    def width(self, grid: Grid | None) -> int:
        """Bits a weight."""
        return self.bits or (8 if grid is None or grid.bits == 8 else 4)


# ------------------------------------------------------------------------------------------------ dequantized weights


def _dense(dtype: torch.dtype) -> Callable[[Tensor, Tensor | None, Grid | None], Run]:
    def make(weight: Tensor, bias: Tensor | None, grid: Grid | None) -> Run:
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)

        def run(x: Tensor) -> Tensor:
            return F.linear(x, w, b) if x.dtype is dtype else F.linear(x.to(dtype), w, b).to(x.dtype)

        return run

    return make


class Half(nn.Module):
    """FBGEMM: weights in float16, inputs, sums and outputs in float32. Packing clips what it is given, in place.

    A module, because a trace takes an object that is no tensor from nowhere else.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, grid: Grid | None) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.clone(), bias)

    def forward(self, x: Tensor) -> Tensor:
        linear = torch.ops.quantized.linear_dynamic_fp16.default
        return linear(x, self.packed) if x.dtype is torch.float32 else linear(x.float(), self.packed).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------- integers


def _tile(columns: int, grid: Grid) -> int:
    """The widest group that the 4-bit kernels know and that lies within the grid's groups; 0 where there is none."""
    group = columns // grid.scale.shape[1]
    return next((tile for tile in TILES if group % tile == 0), 0)


def _is_four(shape: tuple[int, int], grid: Grid | None) -> bool:
    return grid is not None and grid.bits <= 4 and shape[0] % 16 == 0 and _tile(shape[1], grid) > 0


def _scale_and_zero(columns: int, grid: Grid) -> tuple[int, Tensor]:
    """(tile, [in / tile, out, 2]): svlm's value (q - z) * s is torch's (u - 8) * s - z * s with u = q + 8.

    A negative scale is a scale like any other.
    """
    tile = _tile(columns, grid)
    repeats = columns // tile // grid.scale.shape[1]
    scale = grid.scale.float()
    zero = torch.zeros_like(scale) if grid.zero is None else -scale * grid.zero.to(scale.device).float()
    both = torch.stack([scale, zero], -1).repeat_interleave(repeats, dim=1)
    return tile, both.transpose(0, 1).contiguous().bfloat16()


def _four_cpu(weight: Tensor, bias: Tensor | None, grid: Grid | None) -> Run:
    """torch's 4-bit product on the CPU: inputs in bfloat16 (every other dtype takes a loop without vectors)."""
    assert grid is not None
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantize(weight, grid).int() + 8, 1)
    tile, scales = _scale_and_zero(weight.shape[1], grid)
    return _bfloat16(lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, tile, scales), weight, bias)


def _four_cuda(weight: Tensor, bias: Tensor | None, grid: Grid | None) -> Run:
    """torch's 4-bit product on CUDA (tinygemm): the even of two inputs in the high nibble."""
    assert grid is not None
    u = quantize(weight, grid).int() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack((u[:, ::2] << 4 | u[:, 1::2]).to(torch.uint8), 2)
    tile, scales = _scale_and_zero(weight.shape[1], grid)
    scales = scales.to(weight.device)
    return _bfloat16(lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, tile, scales), weight, bias)


def _is_rows(shape: tuple[int, int], grid: Grid | None) -> bool:
    """torch's 8-bit product reads beyond its tensors where sizes are no multiples of its blocks."""
    by_row = grid is not None and grid.bits == 8 and grid.zero is None and grid.scale.shape[1] == 1
    return by_row and shape[0] % 16 == 0 and shape[1] % 32 == 0


def _eight_cpu(weight: Tensor, bias: Tensor | None, grid: Grid | None) -> Run:
    """torch's 8-bit product on the CPU, one scale a row: inputs in bfloat16."""
    assert grid is not None
    q, scale = quantize(weight, grid), grid.scale.flatten().bfloat16()
    return _bfloat16(lambda x: torch.ops.aten._weight_int8pack_mm(x, q, scale), weight, bias)


def _bfloat16(product: Run, weight: Tensor, bias: Tensor | None) -> Run:
    out, columns = weight.shape
    b = None if bias is None else bias.clone()

    def run(x: Tensor) -> Tensor:
        y = product(x.reshape(-1, columns).bfloat16()).to(x.dtype).view(*x.shape[:-1], out)
        return y if b is None else y + b.to(x.dtype)

    return run


def _unpack(weight: Tensor, bias: Tensor | None, grid: Grid | None) -> Run:
    """Integers that become the weight anew at every call, in the dtype of the inputs."""
    assert grid is not None
    q, (out, groups), eight = quantize(weight, grid), grid.scale.shape, grid.bits == 8
    if not eight:
        u = (q + 8).to(torch.uint8)
        q = u[:, ::2] | u[:, 1::2] << 4
    scale, b = grid.scale.to(weight.device)[..., None], None if bias is None else bias.clone()
    zero = torch.zeros_like(scale) if grid.zero is None else grid.zero.to(scale)[..., None]
    zero = zero if eight else zero + 8

    def run(x: Tensor) -> Tensor:
        u = q if eight else torch.stack([q & 15, q >> 4], -1)
        w = (u.view(out, groups, -1).to(x.dtype) - zero.to(x.dtype)) * scale.to(x.dtype)
        return F.linear(x, w.view(out, -1), None if b is None else b.to(x.dtype))

    return run


def _everywhere(shape: tuple[int, int], grid: Grid | None, device: str) -> bool:
    return True


KERNELS: dict[str, Kernel] = {
    k.name: k
    for k in (
        Kernel("float32", "dequantized", 32, 1e-5, _everywhere, _dense(torch.float32)),
        Kernel("bfloat16", "dequantized, products in bfloat16", 16, 1e-2, _everywhere, _dense(torch.bfloat16)),
        Kernel(
            "float16w", "weights in float16, products in float32 (FBGEMM)", 16, 1e-3, lambda s, g, d: d == "cpu", Half
        ),
        Kernel(
            "int4", "torch's 4-bit product, inputs in bfloat16", 4, 1e-2,
            lambda s, g, d: d == "cpu" and _is_four(s, g), _four_cpu,
        ),
        Kernel(
            "int4cuda", "torch's 4-bit product on CUDA, inputs in bfloat16", 4, 1e-2,
            lambda s, g, d: d == "cuda" and _is_four(s, g) and s[1] % 32 == 0, _four_cuda,
        ),
        Kernel(
            "int8", "torch's 8-bit product, inputs in bfloat16", 8, 1e-2,
            lambda s, g, d: d == "cpu" and _is_rows(s, g), _eight_cpu,
        ),
        Kernel(
            "unpack", "integers, dequantized at every call", None, 1e-2,
            lambda s, g, d: g is not None and (g.bits == 8 or s[1] % 2 == 0), _unpack,
        ),
    )
}  # fmt: skip


def check(kernel: Kernel, run: Run, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> str:
    """Why `run` must not stand for the linear with this weight; empty where it may.

    Args:
        dtype: of the inputs. A form in it may err by what rounding inputs and outputs to it costs, twice over.
    """
    g = torch.Generator().manual_seed(0)
    allowed = max(kernel.tolerance, 4 * torch.finfo(dtype).eps if dtype is not torch.float32 else 0.0)
    for tokens in CHECKED:
        x = torch.randn(tokens, weight.shape[1], generator=g).to(weight.device, dtype)
        wanted = F.linear(x.float(), weight, bias)
        off = float((run(x).float() - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not off <= allowed:
            return f"off by {off:.1e} of the dequantized linear, {allowed:.1e} is allowed"
    return ""
