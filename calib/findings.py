"""What a measurement says besides right and wrong: the data's own score, yes and no, confidence, figures by answer."""

from __future__ import annotations

from collections.abc import Sequence

from ..compress.base import Json
from ..compress.evidence import interval
from ..compress.gate import WITHOUT_EVIDENCE
from .asking import Said
from .metrics.answers import normalise
from .metrics.calibration import calibration
from .metrics.paired import evidence
from .metrics.pairs import paired_bootstrap
from .metrics.scores import EXACT, rate
from .metrics.yes_no import asked, verdict, yes_no
from .sample import Sample

MOST_ANSWERS, LEAST_QUESTIONS = 12, 8  # figures by answer: for so many answers, each right for so many questions


def findings(
    samples: Sequence[Sample], score: str, before: Said, after: Said, was: Sequence[bool], now: Sequence[bool]
) -> tuple[dict[str, Json], list[dict[str, Json]]]:
    """More keys of report.json's `quality`, and of each item.

    Args:
        score: the data's own (`metrics.scores`). before: the original's answers; `was`: which of them are right.
        after: those of the measured model; `now` likewise.

    Returns:
        ``score`` (name, value, reference, delta, ci95; only where it is not exact match), ``yes_no`` (None where no
        question is answered by yes or no), ``calibration`` (ece and reference_ece, bins and reference_bins); and of the
        items confidence, reference_confidence and, where there is such a score, score and reference_score.
    """
    error, bins = calibration(after.confidence, now)
    reference_error, reference_bins = calibration(before.confidence, was)
    quality: dict[str, Json] = {
        "yes_no": _yes_no(samples, before, after),
        "calibration": {
            "ece": error, "reference_ece": reference_error, "bins": bins, "reference_bins": reference_bins,
        },
    }  # fmt: skip
    items: list[dict[str, Json]] = [
        {"confidence": sure, "reference_confidence": was_sure}
        for sure, was_sure in zip(after.confidence, before.confidence)
    ]
    if score != EXACT:
        answers = [s.answers for s in samples]
        old, new = (rate(score, said.texts, answers) for said in (before, after))
        value, reference = sum(new) / len(new), sum(old) / len(old)
        images = [s.image_id for s in samples]
        proof = None if score in WITHOUT_EVIDENCE else evidence(old, new, images)
        quality["score"] = {
            "name": score,
            "value": value,
            "reference": reference,
            "delta": value - reference,
            "evidence": proof,
            "ci95": list(interval(proof) if proof else paired_bootstrap(old, new, images)),
        }
        items = [{**item, "score": x, "reference_score": y} for item, x, y in zip(items, new, old)]
    return quality, items


def by_answer(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """The most frequent right answers and the places of their questions; of several answers the first is meant."""
    places: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        places.setdefault(normalise(sample.answers[0]), []).append(i)
    often = sorted(
        (name for name, rows in places.items() if len(rows) >= LEAST_QUESTIONS), key=lambda a: -len(places[a])
    )
    return {name: places[name] for name in often[:MOST_ANSWERS]}


def _yes_no(samples: Sequence[Sample], before: Said, after: Said) -> dict[str, Json] | None:
    right = {i: due for i, sample in enumerate(samples) if (due := asked(sample.answers)) is not None}
    if not right:
        return None
    old, new = (yes_no(list(right.values()), [verdict(said.texts[i]) for i in right]) for said in (before, after))
    return new | {"reference": old}
