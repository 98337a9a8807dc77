"""svlm's integers as constants of an OpenVINO graph: never quantized again.

A weight on a grid becomes

    Constant(i4 | u4 | i8)  ->  Convert  [->  Subtract(Convert(zero))]  ->  Multiply(scale)  ->  Reshape

the shape of graph that OpenVINO's CPU plugin runs packed. All other weights are kept in the dtype that they were stored
in wherever their values allow it, behind one Convert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..grid import Grid, quantize

SMALL = 1024  # values; constants below this stay as the converter made them


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [out, in] as constants.

    Attributes:
        kind: OpenVINO's element type: ``i4``, ``u4`` or ``i8`` (2 and 3 bits lie in 4).
        data: the integers; two in a byte, low nibble first, for 4 bits. shape: [out, groups, in / groups].
        scale: float16 where that is exact, else float32, [out, groups, 1].
        zero: the same dense bytes as `data`, of the integers [out, groups, 1]; None where symmetric.
        weights: of how many linears it is the weight.
    """

    kind: str
    data: np.ndarray
    shape: tuple[int, int, int]
    scale: np.ndarray
    zero: np.ndarray | None = None
    weights: int = 1


def nibbles(q: np.ndarray) -> np.ndarray:
    """Integers in [-8, 15] as bytes, two in each, the first in the low half; an odd one out is filled up with 0."""
    flat = q.reshape(-1).astype(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | (flat[1::2] << 4)


def pack_constants(weight: torch.Tensor, grid: Grid) -> Packed:
    """The integers and scales of a `weight` [out, in] that lies on `grid`."""
    q = quantize(weight, grid).cpu().numpy()
    out, groups = grid.scale.shape
    shape = (out, groups, q.shape[1] // groups)
    scale = _scale(grid.scale).reshape(out, groups, 1)
    if grid.bits == 8:
        zero = None if grid.zero is None else grid.zero.cpu().numpy().reshape(-1)
        return Packed("i8", q.reshape(-1), shape, scale, zero)
    if grid.zero is None:
        return Packed("i4", nibbles(q), shape, scale)
    return Packed("u4", nibbles(q + 8), shape, scale, nibbles(grid.zero.cpu().numpy() + 8))


def unpack_constants(packed: Packed) -> np.ndarray:
    """The values [out, in] that the constants stand for, float32 (before any rounding to a storage dtype)."""
    out, groups, width = packed.shape

    def integers(data: np.ndarray, count: int) -> np.ndarray:
        if packed.kind == "i8":
            return data.astype(np.float32)
        q = np.stack([data & 15, data >> 4], 1).reshape(-1)[:count].astype(np.float32)
        return np.where(q > 7, q - 16, q) if packed.kind == "i4" else q

    value = integers(packed.data, out * groups * width).reshape(packed.shape)
    if packed.zero is not None:
        value = value - integers(packed.zero, out * groups).reshape(out, groups, 1)
    return (value * packed.scale.astype(np.float32)).reshape(out, groups * width)


def _scale(scale: torch.Tensor) -> np.ndarray:
    wide = scale.float().cpu().numpy()
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), wide) else wide


# ------------------------------------------------------------------------------------------------------- in the graph


@dataclass
class Counts:
    """How many constants became what."""

    integers: dict[str, int] = field(default_factory=dict)  # kind -> weights
    stored: int = 0  # in the stored dtype
    wide: int = 0  # float32: their values do not fit the stored dtype
    missed: list[str] = field(default_factory=list)  # on a grid, but not found in the graph
    static: int = 0  # inputs of linears that are rounded to a calibrated range: FakeQuantize, for integer kernels
    token: int = 0  # inputs that are rounded with a scale a token: in plain operators, the product in floats


def compress_constants(model: Any, packed: Mapping[str, Packed], stored: torch.dtype) -> Counts:
    """Put `packed` (by the name of the weight in the traced module) and narrow floats into `model` in place."""
    counts = Counts()
    left = dict(packed)
    for node in list(model.get_ops()):
        if node.get_type_name() != "Constant":
            continue
        name = node.get_friendly_name()
        mine = key_of(node, left)
        if mine is not None:
            _replace(node, _decompress(left.pop(mine), name, node))
            kind = packed[mine].kind
            counts.integers[kind] = counts.integers.get(kind, 0) + packed[mine].weights
        elif node.get_element_type().get_type_name() == "f32" and node.data.size >= SMALL:
            if _narrow(node, stored):
                counts.stored += 1
            else:
                counts.wide += 1
    counts.missed = sorted(left)
    return counts


def key_of(node: Any, packed: Mapping[str, Packed]) -> str | None:
    """The key in `packed` of the weight that a node of a traced graph is; None where it is none of them."""
    name = node.get_friendly_name()
    known = (name, name.removeprefix("self."))
    return next((key for key in known if key in packed), None) if node.get_type_name() == "Constant" else None


def _replace(node: Any, new: Any) -> None:
    for target in list(node.output(0).get_target_inputs()):
        target.replace_source_output(new.output(0))


def _constant(kind: str, shape: tuple[int, ...], data: np.ndarray) -> Any:
    import openvino as ov

    tensor = ov.Tensor(getattr(ov.Type, kind), ov.Shape(list(shape)))
    raw = tensor.data.view(np.uint8).reshape(-1)
    raw[:] = data.view(np.uint8).reshape(-1)
    return ov.op.Constant(tensor)


def _decompress(packed: Packed, name: str, node: Any) -> Any:
    import openvino as ov
    from openvino import opset13 as op

    out, groups, width = packed.shape
    shape: tuple[int, ...] = packed.shape if groups > 1 else (out, width)
    thin: tuple[int, ...] = (out, groups, 1) if groups > 1 else (out, 1)
    dtype = np.float16 if packed.scale.dtype == np.float16 else np.float32
    value = op.convert(_constant(packed.kind, shape, packed.data), dtype)
    if packed.zero is not None:
        value = op.subtract(value, op.convert(_constant(packed.kind, thin, packed.zero), dtype))
    value = op.multiply(value, ov.op.Constant(np.ascontiguousarray(packed.scale.reshape(thin))))
    if groups > 1:
        value = op.reshape(value, np.array([out, groups * width], dtype=np.int64), False)
    if dtype == np.float16:
        value = op.convert(value, np.float32)
    value.set_friendly_name(f"{name}/dequantized")
    return value


def _narrow(node: Any, stored: torch.dtype) -> bool:
    """Keep a float32 constant in the stored dtype where that changes no value."""
    from openvino import opset13 as op

    if stored not in (torch.bfloat16, torch.float16):
        return False
    wide = torch.from_numpy(np.array(node.data, copy=True))
    narrow = wide.to(stored)
    if not torch.equal(narrow.float(), wide):
        return False
    kind = "bf16" if stored is torch.bfloat16 else "f16"
    constant = _constant(kind, tuple(wide.shape), narrow.view(torch.uint8).numpy())
    constant.set_friendly_name(node.get_friendly_name())
    _replace(node, op.convert(constant, np.float32))
    return True
