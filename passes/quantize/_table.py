"""The token embedding in the hands of a quantizing pass; with a head that shares its weight it is one tensor, one grid.

Every row has scales of its own and is read one token at a time, so that an embedding has no second-order statistics,
and how often a token occurs changes nothing about its row. Where a head shares the weight, E[x^2] of the head's inputs
weighs the errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...compress.base import Context, Pass
from ...compress.errors import SelectorError, Unmet

if TYPE_CHECKING:
    import torch

    from ...calib.stats import TokenWeights
    from ...compress.anatomy import LinearRef, ModelView, Table

NAME = "embeddings"  # in `where`


def chosen(model: ModelView, where: tuple[str, ...] | str) -> tuple[tuple[str, ...], Table | None]:
    """`where` without what selects the token embedding alone, and the embedding if it was selected.

    ``embeddings`` selects it, and so does ``head`` where the head shares its weight.
    """
    entries = [where] if isinstance(where, str) else list(where)
    if not entries:
        model.linears(where)  # says that nothing is selected
    table, wanted, left = model.table, False, []
    for entry in entries:
        if entry == NAME:
            wanted = True
            continue
        try:
            tied = model.linears(entry) == (table.head,)
        except SelectorError as error:
            raise SelectorError(error.what, found=error.found, change=f"{error.change}; or '{NAME}'") from error
        wanted = wanted or tied
        if not tied:
            left.append(entry)
    return tuple(left), table if wanted else None


def selected(model: ModelView, where: tuple[str, ...]) -> tuple[LinearRef, ...]:
    """The linears of what `chosen` left, none where it left nothing."""
    return model.linears(where) if where else ()


def check_table(step: Pass, model: ModelView, table: Table) -> None:
    """Raise Unmet where the embedding is quantized already."""
    if table.path in model.grids:
        raise Unmet(
            f"{step.name}: the embedding is quantized already",
            where=table.path,
            found=f"{model.grids[table.path].bits} bits",
            change="leave 'embeddings' (and a tied 'head') out of 'where', or leave out one of the two passes",
        )


def importance(ctx: Context, table: Table, token_weights: TokenWeights) -> torch.Tensor | None:
    """E[x^2] of the inputs of the head that shares the weight, [channels]; None where there is none, or no samples."""
    import torch

    from ...calib.stats import MeanSquare
    from ._common import check_inputs

    if table.head is None or not ctx.fit:
        return None
    walk = ctx.walk("head", name="head")
    for unit in walk:
        stat = unit.observe(MeanSquare, [table.head], token_weights)[table.head]
        check_inputs(table.head, stat.mean)
        unit.notes["mean"] = stat.mean.tolist()
    (notes,) = walk.notes.values()
    mean = torch.tensor(notes["mean"], dtype=torch.float64)
    return mean if bool(mean.any()) else None


def stock_note(model: ModelView) -> str:
    """For a pass's notes: whether stock transformers loads what will be saved."""
    from ...compress.export.compressed_tensors import stock_obstacle

    obstacle = stock_obstacle(model)
    return f"does not load it, svlm.load does: {obstacle}" if obstacle else "loads it"
