"""Which blocks to treat differently: by the KL divergence of the answers from the original's, tried block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from ...calib.balance import answer_logits
from ...calib.metrics.divergence import kl, log_probabilities
from ...calib.replay import patched, recording, replaying, samples
from ...compress.base import Context, evaluating
from ...compress.disk import read_json, write_json
from ...compress.errors import WorkFailed

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView

FILE = "chosen.json"  # in the pass's scratch: the rounds that are done
Criterion = Literal["greedy", "kl", "random"]
Put = Callable[[Iterable[str]], None]


def choose(
    model: ModelView,
    ctx: Context,
    names: Sequence[str],
    count: int,
    put: Put,
    criterion: Criterion,
    asked: int,
    seed: int,
) -> tuple[list[str], list[dict[str, Any]]]:
    """`count` of the blocks `names`, and for the notes one row a round: {chosen: name, scores: {name: KL}}.

    ``greedy``: in each round the block with which the answers diverge least from the original's joins those chosen
    before, and all others are scored anew. ``kl``: every block is scored alone, once. ``random``: no scores.

    Args:
        put: puts the model in the state where these blocks are chosen. asked: questions of the fit split, at most.
    """
    if criterion == "random":
        draw = torch.randperm(len(names), generator=torch.Generator().manual_seed(ctx.seed + seed)).tolist()
        return sorted((names[i] for i in draw[:count]), key=names.index), []
    kept = ctx.scratch / FILE if ctx.scratch else None
    rounds: list[dict[str, Any]] = read_json(kept) if kept and kept.is_file() else []
    while len(rounds) < count:
        chosen = [row["chosen"] for row in rounds]
        rest = [name for name in names if name not in chosen]
        if criterion == "greedy" or not rounds:
            costs = divergences(model, ctx, [[*chosen, name] for name in rest], put, asked)
            scores = dict(zip(rest, costs))
        else:
            scores = {name: rounds[0]["scores"][name] for name in rest}
        rounds.append({"chosen": min(rest, key=lambda name: scores[name]), "scores": scores})
        if kept:
            write_json(kept, rounds)
    if criterion == "kl":
        del rounds[1:]
        scores = rounds[0]["scores"] if rounds else {}
        return sorted(sorted(scores, key=lambda name: scores[name])[:count], key=names.index), rounds
    return sorted((row["chosen"] for row in rounds), key=names.index), rounds


def divergences(model: ModelView, ctx: Context, variants: Sequence[Sequence[str]], put: Put, asked: int) -> list[float]:
    """Mean KL of an answer token from the original's, for each set of chosen blocks."""

    def answers(view: ModelView, batch: Any) -> torch.Tensor:
        logits, labels = answer_logits(view, batch)
        return log_probabilities(logits[labels != -100])

    totals, tokens, seen = [0.0] * len(variants), 0, 0
    tower = model.tower
    batches = []
    for batch in ctx.fit:
        if seen < asked:
            batches.append(batch)
            seen += samples(batch)
    ctx.progress.start("blocks", len(batches) * len(variants))
    with ctx.teacher() as original, evaluating(model.model):
        for batch in batches:
            wanted = answers(original, batch)
            tokens += len(wanted)
            pictures: list[Any] = []
            with patched({tower: recording(tower, pictures, True)}):
                answers(model, batch)
            for number, chosen in enumerate(variants):
                put(chosen)
                with patched({tower: replaying(model.tower_path, pictures, True)}):
                    totals[number] += float(kl(wanted, answers(model, batch)).double().sum())
                ctx.progress.step(note=chosen[-1] if chosen else "")
    ctx.progress.done()
    if not tokens:
        raise WorkFailed("the fit split has no answer token", change="give answers, or name the blocks")
    return [total / tokens for total in totals]
