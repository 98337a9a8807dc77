"""What the formats share that hold integers and scales: which linears they can hold, and scales in half precision.

Both formats store scales as fp16, where svlm's are of the checkpoint's dtype, mostly bf16. fp16 has more digits and
less range: a bf16 scale from 2^-17 to 65504 keeps its value exactly. A smaller one moves by at most 2^-25, hence a
weight by less than 2^-25 times its integer; a larger one cannot be written. Scales of an fp32 checkpoint lose digits.
All of it is counted. The loaders multiply integer and scale in fp16 and round there, where svlm's values are rounded to
the checkpoint's dtype; a weight differs by one rounding at most, 2^-8 of itself in bf16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..anatomy import ModelView
from ..errors import UsageError, WorkFailed
from ..runtime.codebook import codebooks, integer_grids
from ..runtime.grid import Grid, off_grid, quantize
from .skeleton import initialised_by_weight

HALF_MAX = torch.finfo(torch.float16).max
Reason = Callable[[str, nn.Linear, Grid], str]  # why the format cannot hold this linear; "" where it can
Kind = tuple[int, int, bool]
INPUT_ROUNDED = "its input is rounded to 8 bits, which the format cannot say (its weight alone can be written)"


@dataclass(frozen=True)
class Choice:
    """Which quantized linears are packed, and why the others are written dense (path -> reason)."""

    packed: Mapping[str, Grid]
    dense: dict[str, str]
    kind: Kind


@dataclass
class Rounded:
    """What rounding scales to half precision changed."""

    scales: int = 0
    changed: int = 0
    largest: float = 0.0  # change of any weight
    where: str = ""
    share: float = 0.0  # that change as a share of the linear's largest weight
    notes: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        if not self.changed:
            return f"all {self.scales} scales have the same value in fp16"
        return (
            f"{self.changed} of {self.scales} scales have no exact fp16 value; weights move by at most "
            f"{self.largest:.1e} ({self.share:.1e} of the largest weight in {self.where})"
        )


def choose(view: ModelView, name: str, reason: Reason, *, dense: bool, stub: bool = False) -> Choice:
    """Split the quantized linears of `view` into those that format `name` holds and those that it does not.

    A format holds one kind of grid (bits, group, symmetry): the one that covers most weights. `stub`: see skeleton.py.

    Raises:
        UsageError: nothing is quantized, nothing can be held, or something cannot and `dense` was not asked for.
    """
    if not view.grids:
        raise UsageError(
            f"{name} holds quantized linears, and this model has none",
            where=str(view.source),
            change="run a recipe with a quantize pass first (svlm compress MODEL -r int4)",
        )
    left = {path: f"it is on the codebook {book.levels}" for path, book in codebooks(view.grids).items()}
    grids = integer_grids(view.grids)
    linears = [path for path in grids if type(view.model.get_submodule(path)) is nn.Linear]
    by_weight = initialised_by_weight(view.model, linears, stub=stub)
    weights: Counter[Kind] = Counter()
    for path, grid in grids.items():
        module = view.model.get_submodule(path)
        if type(module) is not nn.Linear:
            left[path] = f"it is a {type(module).__name__}, and the loader packs nn.Linear only"
        elif view.linear(path).unit.part == "head":
            left[path] = "it is the head, which the loader keeps dense"
        elif path in view.activations:
            left[path] = INPUT_ROUNDED
        elif float(grid.scale.abs().max()) > HALF_MAX:
            left[path] = f"it has a scale of {float(grid.scale.abs().max()):.3g}, beyond fp16"
        elif module.bias is not None and float(module.bias.detach().abs().max()) > HALF_MAX:
            left[path] = f"it has a bias of {float(module.bias.detach().abs().max()):.3g}, beyond fp16"
        elif path in by_weight:
            left[path] = "transformers initialises it through its weight, which a packed linear does not have"
        elif why := reason(path, module, grid):
            left[path] = why
        else:
            weights[kind_of(grid)] += module.weight.numel()
    if not weights:
        settle(view, name, left, dense=dense)
    kind = weights.most_common(1)[0][0]
    for path, grid in grids.items():
        if path not in left and kind_of(grid) != kind:
            left[path] = f"it has {spell_kind(kind_of(grid))}, and the format one kind in a model: {spell_kind(kind)}"
    settle(view, name, left, dense=dense)
    return Choice({p: g for p, g in grids.items() if p not in left}, left, kind)


def settle(view: ModelView, name: str, left: Mapping[str, str], *, dense: bool) -> None:
    """Raise UsageError where format `name` holds no quantized linear, or not those in `left` (path -> reason) and
    `dense` was not asked for."""
    path, why = next(iter(left.items()), ("", ""))
    if len(left) == len(view.grids):
        raise UsageError(
            f"{name} cannot hold any quantized linear of this model",
            where=path,
            found=why,
            change="--format compressed-tensors holds every grid, bnb the codes of quantize.bnb; "
            "'svlm export --help' says what each format can hold",
        )
    if left and not dense:
        bytes_ = sum(view.model.get_submodule(p).weight.numel() * view.storage_dtype.itemsize for p in left)
        raise UsageError(
            f"{name} cannot hold {len(left)} of {len(view.grids)} quantized linears",
            where=path,
            found=why + _others(left),
            change=f"--dense writes them unpacked with the same values, {bytes_ / 1e6:.1f} MB; "
            "--format compressed-tensors holds every grid, bnb the codes of quantize.bnb",
        )


def dense_notes(left: Mapping[str, str]) -> list[str]:
    """A sentence for each reason for which linears were written dense."""
    reasons: dict[str, list[str]] = {}
    for path, why in left.items():
        reasons.setdefault(why, []).append(path)
    return [f"{_counted(paths)} written dense, with the same values: {why}" for why, paths in reasons.items()]


def integers(path: str, weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The integers of a weight [out, in] on its grid, int8. WorkFailed where it is off the grid."""
    share = off_grid(weight.float(), grid)
    if share > 0:
        raise WorkFailed("a quantized weight is off its grid", where=path, found=f"{100 * share:.2f} % of its values")
    return quantize(weight, grid)


def zeros_of(grid: Grid) -> torch.Tensor:
    """Signed zero points [out, groups], int8: 0 where the grid is symmetric."""
    return torch.zeros(grid.scale.shape, dtype=torch.int8) if grid.zero is None else grid.zero.to(torch.int8)


def half_scales(path: str, grid: Grid, q: torch.Tensor, books: Rounded) -> torch.Tensor:
    """The scales [out, groups] in fp16; what that changes goes into `books`. `q`: the integers [out, in]."""
    half = grid.scale.to(torch.float16)
    moved = (half.double() - grid.scale.double()).abs()
    books.scales += moved.numel()
    books.changed += int((moved > 0).sum())
    if bool((moved > 0).any()):
        out, groups = moved.shape
        steps = (q.view(out, groups, -1).double() - zeros_of(grid).double()[..., None]).abs().amax(-1)
        change, largest = float((steps * moved).max()), float((steps * grid.scale.double().abs()).max())
        if change > books.largest:
            books.largest, books.where, books.share = change, path, change / largest
    return half


def kind_of(grid: Grid) -> Kind:
    return grid.bits, grid.group, grid.symmetric


def spell_kind(kind: Kind) -> str:
    bits, group, symmetric = kind
    return f"{bits} bits, group {group}, {'symmetric' if symmetric else 'asymmetric'}"


def _others(left: Mapping[str, str]) -> str:
    return f" (and {len(left) - 1} more)" if len(left) > 1 else ""


def _counted(paths: list[str]) -> str:
    return f"{paths[0]} is" if len(paths) == 1 else f"{len(paths)} linears ({paths[0]}, ...) are"
