"""What the quantizing passes share: what they refuse, what they promise, how their ladder goes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ...compress.base import Context, Json, Pass
from ...compress.errors import PromiseBroken, Unmet, WorkFailed

if TYPE_CHECKING:
    import torch

    from ...compress.anatomy import LinearRef, ModelView, Table
    from ...compress.runtime.codebook import Codebook
    from ...compress.runtime.grid import Grid

P = TypeVar("P", bound=Pass)
LADDER = {2: 3, 3: 4, 4: 8}
SMALLEST_GROUP = 16  # that a width which `group` does not divide falls back to


def milder(step: P) -> P | None:
    """The ladder: the same pass with the next more bits (8 bits are symmetric)."""
    bits = LADDER.get(step.settings()["bits"])
    if bits is None:
        return None
    return type(step).from_settings(step.settings() | {"bits": bits} | ({"symmetric": True} if bits == 8 else {}))


def check_settings(bits: int, group: int, symmetric: bool) -> None:
    """Raise ValueError for settings that no model could take."""
    if bits == 8 and not symmetric:
        raise ValueError(
            "8 bits are symmetric: 256 steps in one direction are finer than bfloat16, so integers would be lost"
        )
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"bits is 2, 3, 4 or 8, not {bits}")
    if group != -1 and group < 1:
        raise ValueError(f"group is a number of input channels, or -1 for one scale a row, not {group}")


def fitting_group(width: int, group: int) -> int:
    """The group of a linear with `width` inputs where `group` was asked for.

    `group` itself if it divides the width, else the largest of group/2, group/4, ... that does and is at least 16, else
    -1, one scale a row (of 64, a width of 4304 gets 16, and one of 3420 gets -1).
    """
    size = group
    while size != -1 and width % size:
        size = size // 2 if size % 2 == 0 and size // 2 >= SMALLEST_GROUP else -1
    return size


def group_notes(groups: Mapping[str, int], group: int) -> dict[str, Json]:
    """How many linears have which group. `groups`: path of a linear -> its group; `group`: what was asked for."""
    count = Counter(groups.values())
    sizes = {"row" if size == -1 else str(size): count[size] for size in sorted(count, reverse=True)}
    return {"group_sizes": sizes, "linears_with_another_group": len(groups) - count[group]}


def check_linears(step: Pass, model: ModelView, refs: Iterable[LinearRef], group: int = -1) -> None:
    """Raise Unmet where a linear is quantized already, is tied, or has a width that `group` does not divide.

    A pass that takes `fitting_group` of every width leaves `group` out.
    """
    refs = tuple(refs)
    common = math.gcd(*(ref.module.in_features for ref in refs))
    for ref in refs:
        width = ref.module.in_features
        if ref.path in model.grids:
            raise Unmet(
                f"{step.name}: a linear is quantized already",
                where=ref.path,
                found=f"{model.grids[ref.path].bits} bits",
                change="name other parts in 'where', or leave out one of the two passes",
            )
        if group != -1 and width % group:
            raise Unmet(
                f"{step.name}: group {group} does not divide a linear's inputs",
                where=ref.path,
                found=f"{width} inputs",
                change=f"groups that divide it: {_divisors(width)}; that divide every linear of 'where': "
                f"{_divisors(common)} (-1 is one scale a row)",
            )
        if ref.unit.part == "head" and model.tied_embeddings:
            raise Unmet(
                f"{step.name}: the head shares its weight with the embedding",
                where=ref.path,
                change="leave 'head' out of 'where'; quantize.rtn and quantize.mixed round the two as one",
            )


def check_data(step: Pass, ctx: Context) -> None:
    """Raise Unmet where the pass needs statistics and there is nothing to take them from."""
    if not ctx.fit:
        raise Unmet(f"{step.name} needs calibration data", found="no fit samples", change="calibration: {fit: 128}")
    if step.settings().get("token_weights") == "gradient" and not all("labels" in batch for batch in ctx.fit):
        raise Unmet(
            f"{step.name}: token_weights 'gradient' needs answers",
            found="fit samples without labels",
            change="token_weights: balanced",
        )


def check_pairs(step: Pass, model: ModelView) -> None:
    """Raise Unmet where the tokens of the model now and after rounding need not be the same ones."""
    from ...compress.runtime.merge import installed as merging
    from ...compress.runtime.seen import chooses_again

    if merging(model.model):
        raise Unmet(
            f"{step.name}: 'asymmetric' compares the inputs of the same tokens, and this model's tower merges tokens",
            change="asymmetric: 0, or quantize before tokens.merge",
        )
    if chooses_again(model.model):
        raise Unmet(
            f"{step.name}: 'asymmetric' compares the inputs of the same tokens, and this model drops visual tokens",
            change="asymmetric: 0, or quantize before the token pass",
        )


def check_inputs(ref: LinearRef | Table, statistic: torch.Tensor) -> None:
    """Raise WorkFailed where a statistic of a linear's inputs is not finite: then an input was NaN or infinite."""
    if bool(statistic.isfinite().all()):
        return
    bad = (~statistic.diagonal().isfinite() if statistic.ndim == 2 else ~statistic.isfinite()).sum()
    raise WorkFailed(
        "the inputs of a linear are not finite on the calibration data",
        where=ref.path,
        found=f"NaN or infinity in {int(bad)} of {statistic.shape[0]} channels",
        change="look for the sample or the weight that overflows, or leave this linear out of 'where'",
    )


def visual_share(model: ModelView, batches: Sequence[Mapping[str, Any]]) -> float:
    """Share of the tokens of the prompts that are visual, before any is dropped or weighted; padding does not count."""
    tokens = "prompt" if model.family.seq2seq and all("input_ids" in batch for batch in batches) else "sequence"
    masks = [model.token_masks(batch, tokens) for batch in batches]
    vision, text = (sum(int(getattr(m, kind).sum()) for m in masks) for kind in ("vision", "text"))
    return vision / max(vision + text, 1)


def _divisors(width: int) -> str:
    """Usual group sizes that divide `width`, all its divisors from 8 to 256 where none does, and -1."""
    usual = [g for g in (16, 32, 64, 128, 256) if width % g == 0]
    fits = usual or [g for g in range(8, 257) if width % g == 0]
    return ", ".join(map(str, [*fits, -1]))


def place(model: ModelView, ref: LinearRef | Table, weight: torch.Tensor, grid: Grid | Codebook) -> None:
    """Put the rounded weight into the model, and its grid into the books."""
    ref.module.weight.data.copy_(weight)
    model.grids[ref.path] = grid


def check_grids(
    step: Pass,
    model: ModelView,
    paths: Iterable[str] | Mapping[str, int],
    bits: int,
    group: int,
    symmetric: bool,
) -> None:
    """The promise: every linear in `paths` still lies on a grid of these bits, groups and symmetry.

    A mapping of paths says the group of each linear, as the record has it; where it is a list, all have `group`.
    """
    from ...compress.mapped import release
    from ...compress.runtime.grid import Grid, off_grid

    for path in paths:
        grid = model.grids.get(path)
        size = paths[path] if isinstance(paths, Mapping) else group
        if not isinstance(grid, Grid) or (grid.bits, grid.group, grid.symmetric) != (bits, size, symmetric):
            raise PromiseBroken(
                f"{step.name} promised a grid of {_spell(bits, size, symmetric)}",
                where=path,
                found=_spell(grid.bits, grid.group, grid.symmetric) if isinstance(grid, Grid) else "no such grid",
            )
        weight = model.weight(path)
        share = off_grid(weight, grid)
        release(weight)
        if share > 0:
            raise PromiseBroken(
                f"{step.name} promised weights on a {bits}-bit grid",
                where=path,
                found=f"{100 * share:.1f} % of the weights are off it",
                change="quantize last",
            )


def _spell(bits: int, group: int, symmetric: bool) -> str:
    return f"{bits} bits, group {group}, {'symmetric' if symmetric else 'asymmetric'}"
