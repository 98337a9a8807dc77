"""Moving a per-channel scale from the inputs of linears into what writes them: a norm, or the linear before.

``s`` divides output channel j of the writer and multiplies input column j of every reader, so the function stays
(SmoothQuant, arXiv 2211.10438, equation 3; AWQ, arXiv 2306.00978). Where that is possible the anatomy says:
`ModelView.smoothing_pairs`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...compress.anatomy import LinearRef, ModelView, Unit


@dataclass(frozen=True)
class Pair:
    """A writer (path of a norm or linear) and the linears that read it; `obstacle` says why no scale may be moved.

    A linear may read the writer's channels several times over (several positions side by side), and a bare parameter
    [inputs, outputs] at the path `matrix` may read them in place of linears.
    """

    source: str
    targets: tuple[LinearRef, ...]
    obstacle: str | None = None
    matrix: str | None = None


def pairs_of(view: ModelView, unit: Unit, selected: Collection[LinearRef]) -> Iterator[Pair]:
    """The smoothing pairs of a unit that reach a selected linear, each with what stands in its way."""
    for source, paths in view.smoothing_pairs(unit):
        targets = tuple(view.linear(path) for path in paths)
        inside = [ref in selected for ref in targets]
        if not any(inside):
            continue
        writer, obstacle = view.model.get_submodule(source), None
        if not all(inside):
            obstacle = "a linear with the same input is not selected"
        elif source in view.grids:
            obstacle = "the linear before is quantized already"
        elif not isinstance(writer, nn.Linear) and gain_offset(writer) is None:
            obstacle = "the norm does not scale by its weight"
        yield Pair(source, targets, obstacle)


def gain_offset(norm: nn.Module) -> float | None:
    """What a norm adds to its weight before it scales by it: 0 for most, 1 for Gemma's. None: it is neither.

    Found by running the norm with other weights, not by its name.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    x = torch.linspace(-1.0, 2.0, len(weight), dtype=weight.dtype, device=weight.device)[None, None]
    bias = {} if getattr(norm, "bias", None) is None else {"bias": torch.zeros_like(weight)}

    def out(value: float) -> torch.Tensor:
        given = {"weight": torch.full_like(weight, value), **bias}
        with torch.no_grad():
            return torch.func.functional_call(norm, given, (x,)).float()

    slope = out(1.0) - out(0.0)
    for offset in (0.0, 1.0):
        expected = [(value + offset) * slope for value in (-1.0, 0.0, 3.0)]
        found = [out(value) for value in (-1.0, 0.0, 3.0)]
        if bool(slope.abs().max() > 0) and all(
            torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(found, expected, strict=True)
        ):
            return offset
    return None


def fold(view: ModelView, pair: Pair, scale: torch.Tensor) -> torch.Tensor:
    """Divide the writer's channels by `scale` [channels] and multiply the readers' columns.

    A norm's new weight is rounded to the dtype that it is saved in before the readers are scaled by what it became, so
    that saving does not change the function; a channel whose gain that rounding would lose keeps it. A bias is rounded
    to that dtype as well, which is all that changes.

    Returns:
        The scale that was moved, [channels].
    """
    writer = view.model.get_submodule(pair.source)
    with torch.no_grad():
        if isinstance(writer, nn.Linear):
            writer.weight.div_(scale[:, None].to(writer.weight))
        else:
            offset = gain_offset(writer)
            assert offset is not None and isinstance(writer.weight, nn.Parameter)
            old = writer.weight.float()
            new = ((old + offset) / scale - offset).to(view.storage_dtype).float()
            new = torch.where((new + offset == 0) | ~new.isfinite(), old, new)
            scale = torch.where(old + offset == 0, 1.0, (old + offset) / (new + offset))
            writer.weight.copy_(torch.where(old + offset == 0, old, new))
        bias = writer.bias if isinstance(getattr(writer, "bias", None), nn.Parameter) else None
        if isinstance(bias, nn.Parameter):
            bias.copy_((bias / scale.to(bias)).to(view.storage_dtype))
        for ref in pair.targets:
            ref.module.weight.mul_(scale.repeat(ref.module.in_features // len(scale)).to(ref.module.weight))
        if pair.matrix is not None:
            matrix = view.model.get_parameter(pair.matrix)
            matrix.mul_(scale[:, None].to(matrix))
    return scale


def joined(targets: Sequence[LinearRef]) -> torch.Tensor:
    """The weights of the readers below each other, [sum of outs, in], float32."""
    return torch.cat([ref.module.weight.detach().float() for ref in targets])
