"""A pass beside its controls: trivial passes of the same strength, measured in its place on the same questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from .base import Json, Pass, Progress
from .errors import SvlmError
from .report.words import percent, points

if TYPE_CHECKING:
    from .anatomy import ModelView
    from .pipeline import Bench

Items = Sequence[Mapping[str, Json]]


def beside(
    trial: Pass,
    items: Items,
    instead: Callable[[str, Mapping[str, Json]], ModelView],
    bench: Bench,
    progress: Progress,
) -> list[dict[str, Json]]:
    """What each of the controls that `trial` names makes of the check split.

    Args:
        items: the trial's own answers.
        instead: the model with the pass of this name and settings in the trial's place.

    Returns:
        For each: pass, settings, visual_tokens (a question), quality (exact_match, kl, agreement), and `ahead`, the
        trial's exact match less the control's (delta, ci95, mcnemar_p). Or `skipped`: why it could not be measured.
    """
    rows: list[dict[str, Json]] = []
    for name, settings in trial.controls():
        row: dict[str, Json] = {"pass": name, "settings": dict(settings)}
        try:
            view = instead(name, settings)
        except SvlmError as error:
            rows.append(row | {"skipped": f"{error.what}: {error.found}" if error.found else error.what})
            continue
        quality, answers = bench.measure(view, progress)
        given = bench.probe(view)
        tokens = view.visual_tokens(given)
        row |= {"visual_tokens": sum(tokens) / len(tokens), "ahead": bench.compare(answers, items)}
        rows.append(row | {"quality": {key: quality[key] for key in ("exact_match", "kl", "agreement")}})
    return rows


def remarks(name: str, value: float, rows: Sequence[Mapping[str, Json]]) -> list[str]:
    """Plain sentences: where the pass `name`, of this exact match, is no better than a control, or was not compared."""
    told = []
    for row in rows:
        if "skipped" in row:
            told.append(f"{name} was not compared with {row['pass']}: {row['skipped']}")
            continue
        delta, (low, high) = row["ahead"]["delta"], row["ahead"]["ci95"]
        if delta > 0 and low > 0:
            continue
        verdict = "is no better than" if delta <= 0 else "is not shown to be better than"
        told.append(
            f"{name} {verdict} {row['pass']} ({row['visual_tokens']:g} visual tokens): exact match {percent(value)} "
            f"and {percent(row['quality']['exact_match']['value'])}, paired difference {points(delta)} points "
            f"(95 % interval {points(low)} to {points(high)})"
        )
    return told
