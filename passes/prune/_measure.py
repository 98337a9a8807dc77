"""Importances of the channels, heads and stream channels that a pass may take: from weights, gradients or a walk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._groups import Target, mlp_of
from ._hidden import Stream
from ._importance import AbsMean, HeadNorm, fluctuation, magnitude, taylor

if TYPE_CHECKING:
    from ...calib.stats import TokenWeights
    from ...compress.anatomy import LinearRef, ModelView
    from ...compress.base import Context


@dataclass(frozen=True)
class Scores:
    """Importances, float64.

    Attributes:
        targets: of each target's channels or query heads. streams: of each stream's channels.
        means: the mean of each input channel of each target's reader, where the walk measured that.
    """

    targets: list[Tensor]
    streams: list[Tensor]
    means: list[Tensor] | None = None


def random_scores(targets: Sequence[Target], streams: Sequence[Stream], seed: int) -> Scores:
    """The control."""
    generator = torch.Generator().manual_seed(seed)

    def rolled(units: int) -> Tensor:
        return torch.rand(units, generator=generator, dtype=torch.float64)

    return Scores([rolled(t.units) for t in targets], [rolled(s.width) for s in streams])


def weight_scores(model: nn.Module, targets: Sequence[Target], streams: Sequence[Stream]) -> Scores:
    """Magnitude of all weights that belong to a channel, a head or a stream channel."""
    tensors = model.state_dict(keep_vars=True)
    of_streams = []
    for stream in streams:
        energy = torch.zeros(stream.width, dtype=torch.float64)
        seen = set()
        for (name, dim), copies in stream.slices.items():
            weight = tensors[name]
            if (id(weight), dim) not in seen:  # a tied head and its embedding count once
                seen.add((id(weight), dim))
                every = weight.detach().double().square().movedim(dim, 0).flatten(1).sum(1) if weight.ndim > 1 else None
                each = weight.detach().double().square() if every is None else every
                energy += each.cpu().reshape(copies, stream.width).sum(0)
        of_streams.append(energy.sqrt())
    return Scores([_magnitude(model, target) for target in targets], of_streams)


def _magnitude(model: nn.Module, target: Target) -> Tensor:
    """Of every channel, or of every query head (with its share of the key-value head that it reads)."""

    def weight(path: str | None) -> list[Tensor]:
        return [] if path is None else [model.get_submodule(path).get_parameter("weight")]

    if target.kind == "mlp":
        mlp = mlp_of(target.unit)
        width = mlp.width
        if mlp.fused:
            rows = list(weight(mlp.up)[0].split(width))
        else:
            rows = [*weight(mlp.gate), *weight(mlp.up)]
        return magnitude([*((w, 0) for w in rows), *((w, 1) for w in weight(mlp.down))], width)
    a = target.attention
    if a.qkv is not None:
        q, k, v = weight(a.qkv)[0].split([n * a.head_dim for n in (a.n_heads, a.n_kv_heads, a.n_kv_heads)])
    else:
        q, k, v = *weight(a.q), *weight(a.k), *weight(a.v)
    own = magnitude([(q, 0), *((w, 1) for w in weight(a.o))], a.n_heads)
    shared = magnitude([(k, 0), (v, 0)], a.n_kv_heads)
    share = a.n_heads // a.n_kv_heads
    return (own.square() + shared.square().repeat_interleave(share) / share).sqrt()


def gradient_scores(view: ModelView, ctx: Context, targets: Sequence[Target], streams: Sequence[Stream]) -> Scores:
    """Taylor importance over the fit split. A stream's channel acts through all linears of its blocks that read it."""
    readers = [[target.reader] for target in targets] + [list(stream.readers) for stream in streams]
    paths = list(dict.fromkeys(path for some in readers for path in some))
    weights = {path: view.linear(path).module.weight for path in paths}
    units = [t.units for t in targets] + [s.width for s in streams]
    scores = [torch.zeros(n, dtype=torch.float64) for n in units]
    flags = {parameter: parameter.requires_grad for parameter in view.model.parameters()}
    ctx.progress.start("importance", len(ctx.fit))
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in ctx.fit:
            with torch.enable_grad():
                loss = view.model(**batch, use_cache=False).loss
                found = dict(zip(paths, torch.autograd.grad(loss, list(weights.values()))))
            for score, some in zip(scores, readers):
                score += taylor([(weights[path], found[path]) for path in some], len(score)) / len(ctx.fit)
            ctx.progress.step()
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        ctx.progress.done()
    return Scores(scores[: len(targets)], scores[len(targets) :])


def activation_scores(
    ctx: Context,
    where: Iterable[str],
    targets: Sequence[Target],
    streams: Sequence[Stream],
    token_weights: TokenWeights,
) -> Scores:
    """Minitron's: mean absolute activation of a channel, mean norm of a head's output, and of a stream's channel the
    mean absolute value where a block reads it (behind its norms), summed over the blocks."""
    everywhere = dict.fromkeys([*where, *(target.unit.name for target in targets)])
    walk = ctx.walk(list(everywhere), name="importance")
    for block in walk:
        for target in targets:
            if target.unit.name == block.name:
                reader = next(ref for ref in block.linears if ref.path == target.reader)
                (stat,) = block.observe(_stat(target), [reader], token_weights=token_weights).values()
                block.notes[target.key] = stat.mean.tolist()  # survives a kill; the weights stay until all is measured
        for stream in streams:
            refs: list[LinearRef] = [ref for ref in block.linears if ref.path in stream.readers]
            if refs:
                stats = block.observe(AbsMean, refs, token_weights=token_weights)
                by_stage = {ref.stage: stat for ref, stat in stats.items()}
                block.notes["hidden"] = sum(stat.mean for stat in by_stage.values()).tolist()
    notes = walk.notes
    of_targets = [torch.tensor(notes[t.unit.name][t.key], dtype=torch.float64) for t in targets]
    of_streams = []
    for stream in streams:
        inside = [n["hidden"] for name, n in notes.items() if name.startswith(f"{stream.part}.") and "hidden" in n]
        of_streams.append(torch.tensor(inside, dtype=torch.float64).sum(0))
    return Scores(of_targets, of_streams)


def fluctuation_scores(
    view: ModelView, ctx: Context, where: Iterable[str], targets: Sequence[Target], token_weights: TokenWeights
) -> Scores:
    """FLAP's, and the means that go with the channels which it takes."""
    from ...calib.stats import Spread

    walk = ctx.walk(list(where), name="importance")
    for block in walk:
        for target in targets:
            if target.unit.name == block.name:
                reader = next(ref for ref in block.linears if ref.path == target.reader)
                (stat,) = block.observe(Spread, [reader], token_weights=token_weights).values()
                block.notes[target.key] = {"mean": stat.mean.tolist(), "variance": stat.variance.tolist()}
    scores, means = [], []
    for target in targets:
        note = walk.notes[target.unit.name][target.key]
        mean, variance = (torch.tensor(note[key], dtype=torch.float64) for key in ("mean", "variance"))
        scores.append(fluctuation(variance, view.weight(target.reader), target.units))
        means.append(mean)
    return Scores(scores, [], means)


def _stat(target: Target) -> type[AbsMean] | _Heads:
    return AbsMean if target.kind == "mlp" else _Heads(target.attention.head_dim)


class _Heads:
    """Makes a `HeadNorm` for heads of `width` channels."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self) -> HeadNorm:
        return HeadNorm(self.width)
