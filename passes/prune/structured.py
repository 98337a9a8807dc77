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
    from ._fit import Fit
    from ._groups import Cuts, Target
    from ._hidden import Stream
    from ._measure import Scores

LEAST_RATIO = 0.05


@dataclass(frozen=True)
class Structured(Pass):
    """Remove the least important MLP channels, attention heads or hidden channels.

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
            Some configs want a hidden width that their number of heads divides: then the nearest such is taken.
        importance: ``minitron``: mean absolute activation of a channel (of a hidden one: behind the norms, summed over
            the blocks), mean L2 norm of a head's output; needs data.
            ``flap``: how much the output moves about its mean through a channel (arXiv 2312.11983); needs data. What
            the gone channels gave on average goes into a bias: see `compensate`. For `mlp` and `heads`.
            ``taylor``: first-order change of the loss (LLM-Pruner, arXiv 2305.11627); needs data. ``magnitude``: L2
            norm of all weights that belong to it. ``random``: the control.
        allocation: ``uniform``: every block loses the same share, stock transformers loads the result. ``global``: the
            units of all selected blocks are ranked together by their share of their block's importance, MLP channels
            and key-value groups each by themselves, so blocks differ in width and only `svlm.load` loads the result.
            For `mlp` and `heads`.
        floor: with `global`, the least share that every block keeps.
        compensate: with `flap`. ``auto``: where the linear has a bias or a config key gives it one (with `global`:
            everywhere). ``always``: refuse where it cannot. ``never``.
        multiple: MLP and hidden widths are rounded to multiples of it, as kernels and quantization groups like them.
        token_weights: how much visual and text tokens count in the means of `minitron` and `flap`: ``balanced`` (each
            half; loses least on the demo model), ``text`` (ATV-Pruning's advice for large models) or ``uniform``.
        seed: of `random`.
    """

    name: ClassVar[str] = "prune.structured"
    summary: ClassVar[str] = "narrower: fewer MLP channels, heads and hidden channels, loadable by stock transformers"
    paper: ClassVar[str] = "Minitron, arXiv 2407.14679; FLAP, arXiv 2312.11983; DepGraph, arXiv 2301.12900"

    ratio: float = 0.3
    where: tuple[str, ...] | str = ("language",)
    what: tuple[Literal["mlp", "heads", "hidden"], ...] = ("mlp",)
    importance: Literal["minitron", "flap", "taylor", "magnitude", "random"] = "minitron"
    allocation: Literal["uniform", "global"] = "uniform"
    floor: float = 0.25
    compensate: Literal["auto", "always", "never"] = "auto"
    multiple: int = 64
    token_weights: Literal["balanced", "text", "uniform"] = "balanced"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share in (0, 1), not {self.ratio}")
        if self.multiple < 1:
            raise ValueError(f"multiple is at least 1, not {self.multiple}")
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor is a share in [0, 1), not {self.floor}")
        if not self.what or len(set(self.what)) < len(self.what):
            raise ValueError("what names mlp, heads, hidden, or several of these, each once")
        if "hidden" in self.what and (self.importance == "flap" or self.allocation == "global"):
            raise ValueError("hidden goes with allocation uniform and every importance but flap")
        if self.compensate == "always" and self.importance != "flap":
            raise ValueError("compensate goes with importance flap")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ._plan import plan_of
        from ._shapes import refuse_added

        refuse_added(self, model)
        fit = plan_of(self, model)
        paths = [path for target in fit.targets for path in target.paths]
        paths += [name.rpartition(".")[0] for stream in fit.streams for name, _ in stream.slices]
        gridded = [path for path in paths if path in model.grids]
        if gridded:
            raise Unmet(
                f"{self.name} cannot narrow linears that are quantized already",
                where=gridded[0],
                change="put the quantizing pass after this one",
            )
        if self.importance in ("minitron", "flap", "taylor") and not len(ctx.fit):
            raise Unmet(f"importance '{self.importance}' needs fit samples", change="give data, or take 'magnitude'")

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        import torch

        from ...compress.blueprint import shapes_of
        from ._groups import cut, tensors_of
        from ._importance import best
        from ._plan import allotted, counts, held_against_trace, plan_of
        from ._shapes import take_on

        fit = plan_of(self, model)
        numbers = held_against_trace(model, ctx, fit.targets, fit.streams)
        scores = self._scores(model, ctx, fit.targets, fit.streams)
        targets = fit.targets if fit.built is not None else allotted(self, fit.targets, scores.targets)
        numbers |= counts(targets, fit.streams)
        numbers["parameters_before"], names = sum(p.numel() for p in model.model.parameters()), shapes_of(model.model)
        cuts: Cuts = {}
        for target, some in zip(targets, scores.targets):
            if target.size < target.units:
                cuts |= tensors_of(target.keep(_stay(target, some)), names)
        channels: dict[str, list[int]] = {}
        for stream, some in zip(fit.streams, scores.streams):
            channels[stream.part] = best(some, stream.size)
            cuts |= stream.cuts(channels[stream.part])
        cuts |= {place: torch.arange(size) for place, size in fit.idle.items()}
        shifts = self._shifts(model, fit, targets, cuts, scores.means)
        cut(model.model, cuts)
        if fit.built is not None:
            factors = take_on(model.model, fit.built, fit.edits)
            numbers |= {"factors": factors} if factors else {}
        _shift(model, shifts)
        model.refresh()
        touched = [name.rpartition(".")[0] for name, _ in cuts]
        record: dict[str, Json] = {"shapes": dict(_weights(model, touched)), "config": fit.edits}
        if channels:  # their numbers in the original: what `distill.features` compares
            record["channels"] = _in_original(model, channels)
        if fit.built is None:
            before = {path: list(names[f"{path}.weight"]) for path in record["shapes"]}
            biases = [path for path in shifts if f"{path}.bias" not in names]
            record |= {"uneven": True, "before": before, "biases": biases}
            numbers["loads_with"] = "svlm.load alone: the blocks differ in shape, which no stock config says"
        numbers |= {"config": fit.edits, "parameters": sum(p.numel() for p in model.model.parameters())}
        numbers |= {"mlps_tied_to_hidden": fit.implied} if fit.implied else {}
        numbers |= {"idle_dimensions": len(fit.idle)} if fit.idle else {}
        if self.importance == "flap":
            numbers |= {"compensated": len(shifts), "not_compensated": len(fit.unshifted)}
        return Notes(numbers, record)

    def ensures(self, model: ModelView) -> None:
        from ...compress.blueprint import config_tree

        record = model.ledger.record_of(self)
        found = dict(_weights(model, record["shapes"]))
        if not found:
            raise PromiseBroken(f"none of the linears that {self.name} narrowed is there any more")
        if record.get("uneven"):  # blocks may have moved up since: together they are no larger
            now, then = (sum(rows * columns for rows, columns in some.values()) for some in (found, record["shapes"]))
            if now > then:
                raise PromiseBroken(f"{self.name} promised smaller linears", found=f"{now} weights, at most {then}")
            return
        for path, shape in found.items():
            wanted = record["shapes"][path]
            if _wider(shape, wanted):
                raise PromiseBroken(
                    f"{self.name} promised a narrower linear", where=path, found=f"{shape}, at most {wanted}"
                )
        parts = dict(config_tree(model.model.config))
        for entry, value in record["config"].items():
            place, dot, key = entry.rpartition(".")
            says = vars(parts[place + dot]).get(key, value)
            if says != value if value is True else says > value:
                raise PromiseBroken(
                    f"the config no longer says what {self.name} made of the model",
                    where=entry,
                    found=f"{says}, {'not' if value is True else 'at most'} {value}",
                )

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        """Empty linears of the recorded shapes; nothing where the model has them from its config or its checkpoint."""
        import copy

        from ...compress.blueprint import blueprint
        from ._groups import empty_linear
        from ._shapes import edit, take_on

        found = dict(_weights(model, record["shapes"]))
        if record.get("uneven"):
            if found == record["before"]:
                for path, shape in record["shapes"].items():
                    empty_linear(model.linear(path).module, shape, bias=path in record["biases"])
                model.refresh()
            return
        if any(_wider(shape, record["shapes"][path]) for path, shape in found.items()):
            built = blueprint(model.model, edit(copy.deepcopy(model.model.config), record["config"]))
            take_on(model.model, built, record["config"])
            model.refresh()

    def weaker(self) -> Self | None:
        """Half the ratio, down to 0.05."""
        return replace(self, ratio=self.ratio / 2) if self.ratio / 2 >= LEAST_RATIO else None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _scores(self, model: ModelView, ctx: Context, targets: list[Target], streams: list[Stream]) -> Scores:
        """Importance of every channel or query head of each target, and of every channel of each stream."""
        from ._measure import activation_scores, fluctuation_scores, gradient_scores, random_scores, weight_scores

        where = [self.where] if isinstance(self.where, str) else self.where
        if self.importance == "random":
            return random_scores(targets, streams, self.seed)
        if self.importance == "magnitude":
            return weight_scores(model.model, targets, streams)
        if self.importance == "taylor":
            return gradient_scores(model, ctx, targets, streams)
        if self.importance == "flap":
            return fluctuation_scores(model, ctx, where, targets, self.token_weights)
        return activation_scores(ctx, where, targets, streams, self.token_weights)

    def _shifts(
        self, model: ModelView, fit: Fit, targets: list[Target], cuts: Cuts, means: list[Tensor] | None
    ) -> dict[str, Tensor]:
        """FLAP's compensation: for each linear of `fit.shifted`, what the mean of its gone inputs gave its output."""
        import torch

        shifts = {}
        for target, mean in zip(targets, means or ()):
            stay = cuts.get((f"{target.reader}.weight", 1))
            if stay is None or target.reader not in fit.shifted:
                continue
            gone = torch.ones(len(mean), dtype=torch.bool)
            gone[stay] = False
            weight = model.weight(target.reader)
            shifts[target.reader] = weight.detach().double()[:, gone] @ mean[gone].to(weight.device)
        return shifts


def _shift(model: ModelView, shifts: Mapping[str, Tensor]) -> None:
    """Add to the biases; a linear without one gets one."""
    import torch
    from torch import nn

    for path, shift in shifts.items():
        linear = model.model.get_submodule(path)
        old = torch.zeros_like(shift) if linear.bias is None else linear.bias.detach()
        linear.bias = nn.Parameter((old + shift).to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)


def _stay(target: Target, scores: Tensor) -> list[int]:
    """The channels or query heads that stay."""
    from ._importance import best, best_heads

    if target.kind == "mlp":
        return best(scores, target.size)
    return best_heads(scores, target.attention.n_kv_heads, target.size, target.groups)


def _in_original(model: ModelView, channels: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Numbers of channels as they were before any pass took some."""
    before: dict[str, Sequence[int]] = {}
    for entry in model.ledger:
        before |= entry.record.get("channels", {})
    return {part: [before[part][i] if part in before else i for i in kept] for part, kept in channels.items()}


def _weights(model: ModelView, paths: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """(path, shape of the weight) of those paths that are linears; a later pass may have taken some out."""
    for path in paths:
        try:
            yield path, list(model.linear(path).module.weight.shape)
        except SelectorError:
            continue


def _wider(found: Sequence[int], wanted: Sequence[int]) -> bool:
    return found[0] > wanted[0] or found[1] > wanted[1]
