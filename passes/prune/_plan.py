"""What prune.structured's settings mean for a model: which MLPs, attentions and residual streams become how wide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...compress.errors import Unmet, WorkFailed
from ._fit import Fit, find_fit
from ._groups import Target, mlp_group, mlp_of, traced
from ._hidden import Stream, Wish, blocks_of, stream_linears, stream_width
from ._importance import fewer_heads, narrower

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView
    from ...compress.base import Context, Json
    from .structured import Structured


def stock_fit(step: Structured, view: ModelView) -> Fit:
    """What becomes narrower, in shapes that a stock config says.

    Of the head counts near the ratio the nearest that a stock config can say is taken.

    Raises:
        Unmet: nothing of that kind is selected, the ratio rounds to nothing, or no stock config says it.
    """
    first: Unmet | None = None
    wishes = wishes_of(step, view) if "hidden" in step.what else []
    rank = 0
    while (targets := targets_of(step, view, rank)) is not None:
        try:
            return find_fit(view, targets, wishes)
        except Unmet as error:
            first = first or error
        if "heads" not in step.what:
            break
        rank += 1
    assert first is not None
    raise first


def targets_of(step: Structured, view: ModelView, rank: int = 0) -> list[Target] | None:
    """MLPs and attentions with the head count that is the `rank`-nearest to the ratio; None where there is none such.

    Raises:
        Unmet: nothing of a kind is selected, or the ratio rounds to nothing.
    """
    selected = {ref.path for ref in view.linears(step.where)}
    targets: list[Target] = []
    for kind in step.what:
        found = kind == "hidden"
        for unit in view.select(step.where):
            mlp, attention = unit.mlp, unit.attention
            if kind == "mlp" and mlp and mlp.down in selected:
                found = True
                size = narrower(mlp.width, step.ratio, step.multiple)
                if size >= mlp.width:
                    raise _nothing(step, unit.name, f"{mlp.width} channels in multiples of {step.multiple}")
                targets.append(Target(unit, "mlp", size))
            if kind == "heads" and attention and attention.o in selected:
                found = True
                options = fewer_heads(attention.n_heads, attention.n_kv_heads, step.ratio)
                if not options:
                    have = f"{attention.n_heads} query heads in {attention.n_kv_heads} key-value groups"
                    raise _nothing(step, unit.name, have)
                if rank >= len(options):
                    return None
                targets.append(Target(unit, "heads", *options[rank]))
        if not found:
            raise Unmet(f"{step.name} finds no {kind} to prune", where=f"where: {step.where}")
    return targets


def wishes_of(step: Structured, view: ModelView) -> list[Wish]:
    """The residual streams that `where` selects as a whole.

    Raises:
        Unmet: none, one of which only a part is selected, one without one width, or the ratio rounds to nothing.
    """
    selected = {ref.path for ref in view.linears(step.where)}
    wishes = []
    for part in ("vision", "language"):
        readers, writers = stream_linears(view, part)
        inside = {ref.path for ref in [*readers, *writers]}
        if not inside & selected:
            continue
        if not inside <= selected:
            raise Unmet(
                f"the residual stream belongs to all blocks of the {part} part",
                where=f"where: {step.where}",
                found=f"{min(inside - selected)} is not selected",
                change=f"select '{part}' as a whole",
            )
        width = stream_width(view, part)
        if width is None:
            raise Unmet(
                f"the {part} part has no residual stream of one width",
                where=f"{len(blocks_of(view, part))} blocks",
                change="prune mlp or heads of this part",
            )
        size = narrower(width, step.ratio, step.multiple)
        if size >= width:
            raise _nothing(step, part, f"{width} channels in multiples of {step.multiple}")
        wishes.append(Wish(part, width, size, step.multiple))
    if not wishes:
        raise Unmet(f"{step.name} finds no hidden to prune", where=f"where: {step.where}")
    return wishes


def _nothing(step: Structured, place: str, found: str) -> Unmet:
    change = "a larger ratio" if step.multiple == 1 else "a larger ratio, or a smaller 'multiple'"
    return Unmet(f"a ratio of {step.ratio} rounds to nothing", where=place, found=found, change=change)


# --------------------------------------------------------------------------------------------------------- in the notes


def counts(targets: list[Target], streams: list[Stream]) -> dict[str, Json]:
    """How many blocks become how narrow, for the notes."""
    numbers: dict[str, Json] = {}
    mlps = [t for t in targets if t.kind == "mlp"]
    heads = [t for t in targets if t.kind == "heads"]
    if mlps:
        numbers |= {
            "mlp_blocks": len(mlps),
            "mlp_width_before": sorted({t.units for t in mlps}),
            "mlp_width": sorted({t.size for t in mlps}),
        }
    if heads:
        numbers |= {
            "head_blocks": len(heads),
            "query_heads_before": sorted({t.units for t in heads}),
            "query_heads": sorted({t.size for t in heads}),
            "kv_heads_before": sorted({t.attention.n_kv_heads for t in heads}),
            "kv_heads": sorted({t.groups for t in heads}),
        }
    for stream in streams:
        numbers[f"{stream.part}_hidden_before"], numbers[f"{stream.part}_hidden"] = stream.width, stream.size
    return numbers


def held_against_trace(view: ModelView, ctx: Context, targets: list[Target], streams: list[Stream]) -> dict[str, Json]:
    """Compare one MLP group a block class, and each stream, with torch-pruning's trace.

    Returns:
        How many groups agree, and why the others did not trace.

    Raises:
        WorkFailed: the trace finds other members than the anatomy.
    """
    first = {type(t.unit.module).__name__: t for t in reversed(targets) if t.kind == "mlp" and t.unit.stack}
    agree = 0
    untraced: dict[str, str] = {}
    for block, target in first.items() if len(ctx.fit) else ():
        mlp = mlp_of(target.unit)
        found = _traced(view, ctx, mlp.up, untraced, block)
        if found is None:
            continue
        wanted = {(path, axis, int(i)) for (path, axis), index in mlp_group(mlp, [0]).items() for i in index}
        if found != wanted:
            raise WorkFailed(
                "the anatomy and torch-pruning's trace disagree about an MLP",
                where=target.unit.name,
                found=f"only traced: {sorted(found - wanted)}; only in the anatomy: {sorted(wanted - found)}",
                change=f"correct the layout of {block} in the anatomy row",
            )
        agree += 1
    for stream in streams if len(ctx.fit) else ():
        label = f"{stream.part} hidden"
        found = _traced(view, ctx, stream.writers[0], untraced, label)
        if found is None:
            continue
        more = found - _members(view, stream)
        if more and (bare := _bare(view, stream)):
            untraced[label] = f"{bare} is a parameter that no layer holds: the trace loses its way there"
            continue
        if more:
            raise WorkFailed(
                "torch-pruning's trace finds more of a residual stream than the anatomy",
                where=stream.part,
                found=f"only traced: {sorted(more)[:5]}",
                change="correct 'widths' in the anatomy row",
            )
        agree += 1
    return {"groups_traced": agree, "groups_untraced": untraced} if first or streams else {}


def _traced(view: ModelView, ctx: Context, path: str, untraced: dict[str, str], label: str) -> Any:
    try:
        return traced(view, ctx.fit[0], path)
    except Exception as error:  # tracers and models raise many kinds; it is counted, the anatomy's group holds
        untraced[label] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        return None


def _members(view: ModelView, stream: Stream) -> set[tuple[str, str, int]]:
    """The modules through which channel 0 runs, as the trace names them."""
    from torch import nn

    members = set()
    for (name, dim), copies in stream.slices.items():
        path, _, key = name.rpartition(".")
        embedding = isinstance(view.model.get_submodule(path), nn.Embedding)
        axis = "in" if key == "weight" and dim == 1 and not embedding else "out"
        members |= {(path, axis, copy * stream.width) for copy in range(copies)}
    return members


def _bare(view: ModelView, stream: Stream) -> str | None:
    """A matrix of the stream that belongs to no layer that the tracer knows."""
    from torch import nn

    known = (nn.Linear, nn.Embedding, nn.MultiheadAttention)
    for name, _ in stream.slices:
        path, _, key = name.rpartition(".")
        module = view.model.get_submodule(path)
        if getattr(module, key).ndim == 2 and not isinstance(module, known):
            return name
    return None
