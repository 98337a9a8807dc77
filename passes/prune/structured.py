"""prune.structured: fewer MLP channels and attention heads, in shapes that stock loaders accept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import PromiseBroken, SelectorError, Unmet, WorkFailed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...compress.anatomy import ModelView
    from ._groups import Target

LEAST_RATIO = 0.05


@dataclass(frozen=True)
class Structured(Pass):
    """Remove the least important MLP channels or attention heads of every selected block; all blocks keep equal widths.

    Which ones go is decided block by block. A channel goes with its rows in gate and up and its column in down; heads
    go as whole key-value groups with their query heads, or as the same number of query heads from every group,
    whichever comes nearer to `ratio`. The config is edited with the weights, so a stock `from_pretrained` loads the
    result; shapes that no stock config can say are refused before any weight is touched.

    Settings:
        ratio: share of the MLP channels (and of the heads) to remove, in (0, 1). At most about a third in one go; train
            the rest back with `distill.logits`.
        where: selector. An MLP or an attention belongs to it when the linear that reads the removed channels (down, or
            the output projection) does.
        what: ``mlp``, ``heads``, or both.
        importance: ``minitron``: mean absolute activation of a channel, mean L2 norm of a head's output; needs data.
            ``taylor``: first-order change of the loss (LLM-Pruner, arXiv 2305.11627); needs data. ``magnitude``: L2
            norm of all weights that belong to it. ``random``: the control.
        multiple: MLP widths are rounded to multiples of it, as kernels and quantization groups like them.
        token_weights: how much visual and text tokens count in `minitron`'s means: ``balanced`` (each half; loses least
            on the demo model), ``text`` (ATV-Pruning's advice for large models) or ``uniform``.
        seed: of `random`.
    """

    name: ClassVar[str] = "prune.structured"
    summary: ClassVar[str] = "narrower: fewer MLP channels and attention heads, loadable by stock transformers"
    paper: ClassVar[str] = "Minitron, arXiv 2407.14679; DepGraph, arXiv 2301.12900"

    ratio: float = 0.3
    where: tuple[str, ...] | str = ("language",)
    what: tuple[Literal["mlp", "heads"], ...] = ("mlp",)
    importance: Literal["minitron", "taylor", "magnitude", "random"] = "minitron"
    multiple: int = 64
    token_weights: Literal["balanced", "text", "uniform"] = "balanced"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share in (0, 1), not {self.ratio}")
        if self.multiple < 1:
            raise ValueError(f"multiple is at least 1, not {self.multiple}")
        if not self.what or len(set(self.what)) < len(self.what):
            raise ValueError("what names mlp, heads, or both, each once")

    def requires(self, model: ModelView, ctx: Context) -> None:
        targets, _, _ = self._plan(model)
        gridded = [path for target in targets for path in target.paths if path in model.grids]
        if gridded:
            raise Unmet(
                f"{self.name} cannot narrow linears that are quantized already",
                where=gridded[0],
                change="put the quantizing pass after this one",
            )
        if self.importance in ("minitron", "taylor") and not len(ctx.fit):
            raise Unmet(f"importance '{self.importance}' needs fit samples", change="give data, or take 'magnitude'")

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ._groups import cut
        from ._shapes import take_on

        targets, edits, built = self._plan(model)
        numbers = self._count(targets) | self._held_against_trace(model, ctx, targets)
        chosen = self._choose(model, ctx, targets)
        before = sum(p.numel() for p in model.model.parameters())
        shapes: dict[str, Json] = {path: list(s) for target in targets for path, s in target.shapes().items()}
        for target, kept in zip(targets, chosen):
            cut(model.model, target.keep(kept))
        take_on(model.model, built, edits)
        model.refresh()
        after = sum(p.numel() for p in model.model.parameters())
        numbers |= {"config": edits, "parameters_before": before, "parameters": after}
        return Notes(numbers, {"shapes": shapes, "config": edits})

    def ensures(self, model: ModelView) -> None:
        from ...compress.blueprint import config_tree

        record = model.ledger.record_of(self)
        seen = 0
        for path, found, wanted in _recorded(model, record):
            seen += 1
            if _wider(found, wanted):
                raise PromiseBroken(
                    f"{self.name} promised a narrower linear", where=path, found=f"{found}, at most {wanted}"
                )
        if not seen:
            raise PromiseBroken(f"none of the linears that {self.name} narrowed is there any more")
        parts = dict(config_tree(model.model.config))
        for entry, value in record["config"].items():
            place, dot, key = entry.rpartition(".")
            if vars(parts[place + dot]).get(key, value) > value:
                raise PromiseBroken(
                    f"the config no longer says what {self.name} made of the model",
                    where=entry,
                    found=f"{vars(parts[place + dot])[key]}, at most {value}",
                )

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        """Empty linears of the recorded shapes; nothing where the model was built from the pruned config."""
        import copy

        from ...compress.blueprint import blueprint
        from ._shapes import edit, take_on

        if not any(_wider(found, wanted) for _, found, wanted in _recorded(model, record)):
            return
        built = blueprint(model.model, edit(copy.deepcopy(model.model.config), record["config"]))
        take_on(model.model, built, record["config"])
        model.refresh()

    def weaker(self) -> Self | None:
        """Half the ratio, down to 0.05."""
        return replace(self, ratio=self.ratio / 2) if self.ratio / 2 >= LEAST_RATIO else None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _plan(self, model: ModelView) -> tuple[list[Target], dict[str, int], nn.Module]:
        """What becomes narrower, the config edits for it, and a model of that config without data.

        Of the head counts near `ratio` the nearest that a stock config can say is taken.

        Raises:
            Unmet: nothing of that kind is selected, the ratio rounds to nothing, or no stock config says it.
        """
        from ._shapes import find_edits

        first: Unmet | None = None
        rank = 0
        while targets := self._targets(model, rank):
            try:
                return targets, *find_edits(model.model, targets)
            except Unmet as error:
                first = first or error
            if "heads" not in self.what:
                break
            rank += 1
        assert first is not None
        raise first

    def _targets(self, model: ModelView, rank: int = 0) -> list[Target]:
        """The targets with the head count that is the `rank`-nearest to the ratio; empty where there is none such."""
        from ._groups import Target
        from ._importance import fewer_heads, narrower

        selected = {ref.path for ref in model.linears(self.where)}
        targets: list[Target] = []
        for kind in self.what:
            found = 0
            for unit in model.select(self.where):
                mlp, attention = unit.mlp, unit.attention
                if kind == "mlp" and mlp and mlp.down in selected:
                    found += 1
                    size = narrower(mlp.width, self.ratio, self.multiple)
                    if size < mlp.width:
                        targets.append(Target(unit, "mlp", size))
                        continue
                    raise self._nothing(unit.name, f"{mlp.width} channels in multiples of {self.multiple}")
                if kind == "heads" and attention and attention.o in selected:
                    found += 1
                    options = fewer_heads(attention.n_heads, attention.n_kv_heads, self.ratio)
                    if not options:
                        have = f"{attention.n_heads} query heads in {attention.n_kv_heads} key-value groups"
                        raise self._nothing(unit.name, have)
                    if rank >= len(options):
                        return []
                    targets.append(Target(unit, "heads", *options[rank]))
            if not found:
                raise Unmet(f"{self.name} finds no {kind} to prune", where=f"where: {self.where}")
        return targets

    def _nothing(self, place: str, found: str) -> Unmet:
        change = "a larger ratio" if self.multiple == 1 else "a larger ratio, or a smaller 'multiple'"
        return Unmet(f"a ratio of {self.ratio} rounds to nothing", where=place, found=found, change=change)

    def _count(self, targets: list[Target]) -> dict[str, Json]:
        from ._groups import attention_of, mlp_of

        numbers: dict[str, Json] = {}
        mlps = [t for t in targets if t.kind == "mlp"]
        heads = [t for t in targets if t.kind == "heads"]
        if mlps:
            numbers |= {
                "mlp_blocks": len(mlps),
                "mlp_width_before": sorted({mlp_of(t.unit).width for t in mlps}),
                "mlp_width": sorted({t.size for t in mlps}),
            }
        if heads:
            numbers |= {
                "head_blocks": len(heads),
                "query_heads_before": sorted({attention_of(t.unit).n_heads for t in heads}),
                "query_heads": sorted({t.size for t in heads}),
                "kv_heads_before": sorted({attention_of(t.unit).n_kv_heads for t in heads}),
                "kv_heads": sorted({t.groups for t in heads}),
            }
        return numbers

    def _held_against_trace(self, model: ModelView, ctx: Context, targets: list[Target]) -> dict[str, Json]:
        """Compare one MLP group a block class with torch-pruning's trace; says how many agree and what did not trace.

        Raises:
            WorkFailed: the trace finds other members than the anatomy.
        """
        from ._groups import mlp_group, mlp_of, traced

        first = {type(t.unit.module).__name__: t for t in reversed(targets) if t.kind == "mlp"}
        agree, untraced = 0, {}
        for block, target in first.items() if len(ctx.fit) else ():
            mlp = mlp_of(target.unit)
            try:
                found = traced(model, ctx.fit[0], mlp.up)
            except Exception as error:  # tracers and models raise many kinds; it is counted, the anatomy's group holds
                untraced[block] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
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
        return {"groups_traced": agree, "groups_untraced": untraced} if first else {}

    def _choose(self, model: ModelView, ctx: Context, targets: list[Target]) -> list[list[int]]:
        """For each target the channels or query heads that stay."""
        from ._groups import attention_of
        from ._importance import best, best_heads

        kept = []
        for target, scores in zip(targets, self._scores(model, ctx, targets)):
            if target.kind == "mlp":
                kept.append(best(scores, target.size))
            else:
                kept.append(best_heads(scores, attention_of(target.unit).n_kv_heads, target.size, target.groups))
        return kept

    def _scores(self, model: ModelView, ctx: Context, targets: list[Target]) -> list[Tensor]:
        """Importance of every channel or query head of each target."""
        import torch

        from ._measure import gradient_scores, weight_scores

        if self.importance == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return [torch.rand(_units(target), generator=generator, dtype=torch.float64) for target in targets]
        if self.importance == "magnitude":
            return [weight_scores(model.model, target) for target in targets]
        if self.importance == "taylor":
            return gradient_scores(model, ctx, targets)
        return self._activation_scores(ctx, targets)

    def _activation_scores(self, ctx: Context, targets: list[Target]) -> list[Tensor]:
        import torch

        from ._groups import attention_of
        from ._importance import AbsMean, HeadNorm

        walk = ctx.walk(self.where, name="importance")
        for block in walk:
            for target in targets:
                if target.unit.name != block.name:
                    continue
                reader = next(ref for ref in block.linears if ref.path == target.reader)
                width = 0 if target.kind == "mlp" else attention_of(target.unit).head_dim
                made = AbsMean if target.kind == "mlp" else (lambda width=width: HeadNorm(width))
                (stat,) = block.observe(made, [reader], token_weights=self.token_weights).values()
                block.notes[target.kind] = stat.mean.tolist()  # survives a kill; the weights stay until all is measured
        return [torch.tensor(walk.notes[t.unit.name][t.kind], dtype=torch.float64) for t in targets]


def _recorded(model: ModelView, record: Mapping[str, Json]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(path, shape, recorded shape) of the narrowed linears; without those whose block a later pass took out."""
    for path, wanted in record["shapes"].items():
        try:
            yield path, tuple(model.linear(path).module.weight.shape), tuple(wanted)
        except SelectorError:
            continue


def _wider(found: Sequence[int], wanted: Sequence[int]) -> bool:
    return found[0] > wanted[0] or found[1] > wanted[1]


def _units(target: Target) -> int:
    from ._groups import attention_of, mlp_of

    return mlp_of(target.unit).width if target.kind == "mlp" else attention_of(target.unit).n_heads
