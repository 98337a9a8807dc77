"""Keys and values as small integers: asymmetric min-max grids and their packing, pure maths.

What lies in a group becomes codes 0 .. 2^bits - 1 between its smallest and its largest value (KIVI, arXiv 2402.02750):

    scale = (max - min) / (2^bits - 1)      code = round((x - min) / scale)      x' = min + code * scale

KIVI groups keys along the tokens, channel by channel, because keys have channels that stand far out, and values along
the channels, token by token. Scales and minima are rounded to the dtype of the states; codes are chosen for these.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 4, 8)


def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, shape of `x`), scales and minima (dtype of `x`, `dim` kept with length 1) of groups along `dim`.

    A group of equal values has scale 0 and comes back exactly. A value that is not finite leaves no finite value in its
    group: it is not hidden.
    """
    top = (1 << bits) - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high.float() - low.float()) / top).to(x.dtype)
    step = torch.where(scale == 0, 1.0, scale.float())
    codes = ((x.float() - low.float()) / step).round().clamp(0, top).nan_to_num(0).to(torch.uint8)
    return codes, scale, low


def dequantize(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """The values of `codes`, in the dtype of `scale`; scales and minima broadcast against the codes."""
    return torch.addcmul(low, codes.to(scale.dtype), scale)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] as bytes [..., ceil(n * bits / 8)], the first code in the lowest bits."""
    each = 8 // bits
    if each == 1:
        return codes
    rest = -codes.shape[-1] % each
    places = torch.nn.functional.pad(codes, (0, rest)).unflatten(-1, (-1, each))
    packed = places[..., 0].clone()
    for i in range(1, each):
        packed |= places[..., i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The `n` codes [..., n] of each row of bytes; undoes `pack`."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :n]


def value_group(channels: int, group: int) -> int:
    """How many channels of a value share a scale: the largest divisor of `channels` that is not above `group`."""
    return next(size for size in range(min(group, channels), 0, -1) if channels % size == 0)
