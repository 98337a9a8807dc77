"""What prune.structured's settings mean for a model: which MLPs, attentions and residual streams become how wide."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...compress.errors import Unmet, WorkFailed
from ._fit import Fit, check_uncounted, find_fit, with_biases
from ._groups import Target, mlp_group, mlp_of, traced
from ._hidden import Stream, Wish, blocks_of, stream_linears, stream_width
from ._importance import allocate, fewer_heads, narrower, near_widths

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView
    from ...compress.base import Context, Json
    from .structured import Structured


def plan_of(step: Structured, view: ModelView) -> Fit:
    """What becomes narrower, and what says so: a stock config, or with ``allocation: global`` the ledger alone.

    Raises:
        Unmet: it cannot be done, for the reason that it names.
    """
    fit = stock_fit(step, view) if step.allocation == "uniform" else Fit(uneven_targets(step, view), [], {}, None)
    if step.importance != "flap" or step.compensate == "never":
        return fit
    fit = with_biases(view, fit)
    if step.compensate == "always" and fit.unshifted:
        raise Unmet(
            "no stock config gives these linears the bias that compensates",
            where=fit.unshifted[0],
            found=f"{len(fit.unshifted)} of {len(fit.targets)} linears without",
            change="compensate: auto, or allocation: global",
        )
    return fit


def stock_fit(step: Structured, view: ModelView) -> Fit:
    """What becomes narrower, in shapes that a stock config says.

    Of the head counts near the ratio the nearest that a stock config can say is taken.

    Raises:
        Unmet: nothing of that kind is selected, the ratio rounds to nothing, or no stock config says it.
    """
    if view.ledger.uneven:
        raise Unmet(
            "the blocks of this model differ in shape already, which no stock config says",
            where=step.name,
            change="allocation: global, or put this pass before the one that has it",
        )
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
    targets: list[Target] = []
    for whole in whole_targets(step, view):
        if whole.kind == "mlp":
            size = narrower(whole.units, step.ratio, step.multiple)
            if size >= whole.units:
                raise _nothing(step, whole.unit.name, f"{whole.units} channels in multiples of {step.multiple}")
            targets.append(replace(whole, size=size))
            continue
        options = fewer_heads(whole.units, whole.groups, step.ratio)
        if not options:
            have = f"{whole.units} query heads in {whole.groups} key-value groups"
            raise _nothing(step, whole.unit.name, have)
        if rank >= len(options):
            return None
        targets.append(replace(whole, size=options[rank][0], groups=options[rank][1]))
    return targets


def whole_targets(step: Structured, view: ModelView) -> list[Target]:
    """The selected MLPs and attentions, nothing of them removed.

    Raises:
        Unmet: nothing of a kind is selected.
    """
    selected = {ref.path for ref in view.linears(step.where)}
    units = view.select(step.where)
    found: dict[str, list[Target]] = {
        "mlp": [Target(u, "mlp", u.mlp.width) for u in units if u.mlp and u.mlp.down in selected],
        "heads": [
            Target(u, "heads", u.attention.n_heads, u.attention.n_kv_heads)
            for u in units
            if u.attention and u.attention.o in selected
        ],
    }
    for kind in step.what:
        if kind != "hidden" and not found[kind]:
            raise Unmet(f"{step.name} finds no {kind} to prune", where=f"where: {step.where}")
    return [target for kind in step.what for target in found.get(kind, [])]


def uneven_targets(step: Structured, view: ModelView) -> list[Target]:
    """The selected MLPs and attentions, whose sizes their scores are to decide.

    Raises:
        Unmet: nothing of a kind is selected, none may become narrower, or blocks count their heads.
    """
    targets = whole_targets(step, view)
    rough = [torch.arange(_runs(target)[0], dtype=torch.float64) for target in targets]
    for kind in step.what:
        mine = [i for i, target in enumerate(targets) if target.kind == kind]
        before = [len(rough[i]) for i in mine]
        multiple = step.multiple if kind == "mlp" else 1
        if allocate([rough[i] for i in mine], step.ratio, step.floor, multiple) == before:
            raise _nothing(step, f"{kind} of {len(mine)} blocks", f"{sorted(set(before))} in multiples of {multiple}")
    check_uncounted(view, targets)
    return targets


def allotted(step: Structured, targets: list[Target], scores: list[Tensor]) -> list[Target]:
    """`targets` with the sizes that their scores give them, ranked over all blocks, each kind by itself.

    Heads go as whole key-value groups.
    """
    sized = list(targets)
    for kind in step.what:
        mine = [i for i, target in enumerate(targets) if target.kind == kind]
        by_run = [scores[i].reshape(_runs(targets[i])).sum(1) for i in mine]
        multiple = step.multiple if kind == "mlp" else 1
        for i, kept in zip(mine, allocate(by_run, step.ratio, step.floor, multiple)):
            each = _runs(targets[i])[1]
            sized[i] = replace(targets[i], size=kept * each, groups=kept if kind == "heads" else 0)
    return sized


def _runs(target: Target) -> tuple[int, int]:
    """What goes as a whole: how many there are, and how many channels or query heads in each."""
    return (target.units, 1) if target.kind == "mlp" else (target.groups, target.units // target.groups)


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
        if narrower(width, step.ratio, step.multiple) >= width:
            raise _nothing(step, part, f"{width} channels in multiples of {step.multiple}")
        wishes.append(Wish(part, width, near_widths(width, step.ratio, step.multiple), step.multiple))
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
    members = set()
    for (name, dim), copies in stream.slices.items():
        path, _, key = name.rpartition(".")
        embedding = isinstance(view.model.get_submodule(path), nn.Embedding)
        axis = "in" if key == "weight" and dim == 1 and not embedding else "out"
        members |= {(path, axis, copy * stream.width) for copy in range(copies)}
    return members


def _bare(view: ModelView, stream: Stream) -> str | None:
    """A matrix of the stream that belongs to no layer that the tracer knows."""
    known = (nn.Linear, nn.Embedding, nn.MultiheadAttention)
    for name, _ in stream.slices:
        path, _, key = name.rpartition(".")
        module = view.model.get_submodule(path)
        if getattr(module, key).ndim == 2 and not isinstance(module, known):
            return name
    return None
