"""prune.structured: fewer MLP channels, attention heads and hidden channels, in shapes that stock loaders accept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import PromiseBroken, SelectorError, Unmet

if TYPE_CHECKING:
    from torch import Tensor

    from ...compress.anatomy import ModelView
    from ._groups import Cuts, Target
    from ._hidden import Stream

LEAST_RATIO = 0.05


@dataclass(frozen=True)
class Structured(Pass):
    """Remove the least important MLP channels, attention heads or hidden channels; all blocks keep equal widths.

    Which MLP channels and heads go is decided block by block. A channel goes with its rows in gate and up and its
    column in down; heads go as whole key-value groups with their query heads, or as the same number of query heads from
    every group, whichever comes nearer to `ratio`. A hidden channel, one of the residual stream, goes from everything
    that reads or writes the stream: embeddings, norms, all blocks, the connector's side of it, the head. The config is
    edited with the weights, so a stock `from_pretrained` loads the result; shapes that no stock config can say are
    refused before any weight is touched.

    Settings:
        ratio: share of the channels (and of the heads) to remove, in (0, 1). At most about a third in one go; train
            the rest back with `distill.logits`.
        where: selector. An MLP or an attention belongs to it when the linear that reads the removed channels (down, or
            the output projection) does.
        what: ``mlp``, ``heads``, ``hidden``, or several of them. Heads keep their width. Where a config ties the width
            of the attention to the hidden width (CLIP, Qwen2-VL), `hidden` needs `heads` beside it, and as many
            channels stay as the heads that stay have. MLPs whose inner width is a hidden width (connectors) follow it.
        importance: ``minitron``: mean absolute activation of a channel (of a hidden one: behind the norms, summed over
            the blocks), mean L2 norm of a head's output; needs data.
            ``taylor``: first-order change of the loss (LLM-Pruner, arXiv 2305.11627); needs data. ``magnitude``: L2
            norm of all weights that belong to it. ``random``: the control.
        multiple: MLP and hidden widths are rounded to multiples of it, as kernels and quantization groups like them.
        token_weights: how much visual and text tokens count in `minitron`'s means: ``balanced`` (each half; loses least
            on the demo model), ``text`` (ATV-Pruning's advice for large models) or ``uniform``.
        seed: of `random`.
    """

    name: ClassVar[str] = "prune.structured"
    summary: ClassVar[str] = "narrower: fewer MLP channels, heads and hidden channels, loadable by stock transformers"
    paper: ClassVar[str] = "Minitron, arXiv 2407.14679; DepGraph, arXiv 2301.12900"

    ratio: float = 0.3
    where: tuple[str, ...] | str = ("language",)
    what: tuple[Literal["mlp", "heads", "hidden"], ...] = ("mlp",)
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
            raise ValueError("what names mlp, heads, hidden, or several of these, each once")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ._plan import stock_fit

        fit = stock_fit(self, model)
        paths = [path for target in fit.targets for path in target.paths]
        paths += [name.rpartition(".")[0] for stream in fit.streams for name, _ in stream.slices]
        gridded = [path for path in paths if path in model.grids]
        if gridded:
            raise Unmet(
                f"{self.name} cannot narrow linears that are quantized already",
                where=gridded[0],
                change="put the quantizing pass after this one",
            )
        if self.importance in ("minitron", "taylor") and not len(ctx.fit):
            raise Unmet(f"importance '{self.importance}' needs fit samples", change="give data, or take 'magnitude'")

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ._groups import cut, tensors_of
        from ._importance import best
        from ._plan import counts, held_against_trace, stock_fit
        from ._shapes import shapes_of, take_on

        fit = stock_fit(self, model)
        numbers = counts(fit.targets, fit.streams) | held_against_trace(model, ctx, fit.targets, fit.streams)
        of_targets, of_streams = self._scores(model, ctx, fit.targets, fit.streams)
        before, names = sum(p.numel() for p in model.model.parameters()), shapes_of(model.model)
        cuts: Cuts = {}
        for target, scores in zip(fit.targets, of_targets):
            cuts |= tensors_of(target.keep(_stay(target, scores)), names)
        for stream, scores in zip(fit.streams, of_streams):
            cuts |= stream.cuts(best(scores, stream.size))
        cut(model.model, cuts)
        factors = take_on(model.model, fit.built, fit.edits)
        model.refresh()
        touched = dict.fromkeys(name.rpartition(".")[0] for name, _ in cuts)
        shapes = {path: list(shape) for path, shape in _weights(model, touched)}
        after = sum(p.numel() for p in model.model.parameters())
        numbers |= {"config": fit.edits, "parameters_before": before, "parameters": after}
        numbers |= {"mlps_tied_to_hidden": fit.implied} if fit.implied else {}
        numbers |= {"factors": factors} if factors else {}
        return Notes(numbers, {"shapes": shapes, "config": fit.edits})

    def ensures(self, model: ModelView) -> None:
        from ._shapes import config_tree

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

        from ._shapes import blueprint, edit, take_on

        if not any(_wider(found, wanted) for _, found, wanted in _recorded(model, record)):
            return
        built = blueprint(model.model, edit(copy.deepcopy(model.model.config), record["config"]))
        take_on(model.model, built, record["config"])
        model.refresh()

    def weaker(self) -> Self | None:
        """Half the ratio, down to 0.05."""
        return replace(self, ratio=self.ratio / 2) if self.ratio / 2 >= LEAST_RATIO else None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _scores(
        self, model: ModelView, ctx: Context, targets: list[Target], streams: list[Stream]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Importance of every channel or query head of each target, and of every channel of each stream."""
        from ._measure import activation_scores, gradient_scores, random_scores, weight_scores

        if self.importance == "random":
            return random_scores(targets, streams, self.seed)
        if self.importance == "magnitude":
            return weight_scores(model.model, targets, streams)
        if self.importance == "taylor":
            return gradient_scores(model, ctx, targets, streams)
        where = [self.where] if isinstance(self.where, str) else self.where
        return activation_scores(ctx, where, targets, streams, self.token_weights)


def _stay(target: Target, scores: Tensor) -> list[int]:
    """The channels or query heads that stay."""
    from ._importance import best, best_heads

    if target.kind == "mlp":
        return best(scores, target.size)
    return best_heads(scores, target.attention.n_kv_heads, target.size, target.groups)


def _weights(model: ModelView, paths: Iterable[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(path, shape of the weight) of those paths that are linears of the anatomy."""
    for path in paths:
        try:
            yield path, tuple(model.linear(path).module.weight.shape)
        except SelectorError:
            continue


def _recorded(model: ModelView, record: Mapping[str, Json]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(path, shape, recorded shape) of the narrowed linears; without those whose block a later pass took out."""
    for path, found in _weights(model, record["shapes"]):
        yield path, found, tuple(record["shapes"][path])


def _wider(found: Sequence[int], wanted: Sequence[int]) -> bool:
    return found[0] > wanted[0] or found[1] > wanted[1]
