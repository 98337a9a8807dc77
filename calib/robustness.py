"""Robustness: what a small model loses when pictures get worse or prompts get longer, beside what its original loses.

Both answer the same changed questions greedily. What is lost is counted from each model's own answers to the unchanged
questions; the question is whether the small model lost more than its original did (`difference`, paired, with a 95 %
interval over pictures).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compress.anatomy import ModelView
from ..compress.base import Json, Progress, Silent
from ..compress.errors import DataError
from .corruptions import CORRUPTIONS, STRENGTHS, corrupted
from .metrics.resample import Pictures, Resampled, Weights, bootstrap, ratio
from .metrics.scores import rate
from .sample import Sample
from .workbench import Workbench

QUESTIONS = 128
PREAMBLE = (
    "Please look at the picture.", "Take your time.", "Look at every part of it before you answer.",
    "The picture may be small.", "Here is the question.", "It is about the picture alone.",
    "There is one right answer.", "Answer in a few words.", "Nothing else is needed.", "Thank you.",
)  # fmt: skip
SENTENCES = (1, 2, 4, 6, 10)  # of it, by strength
TURNS = (1, 2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Change:
    """One way in which questions are changed: the samples, and for each the unchanged question it stems from.

    `stems` None: other questions altogether.
    """

    name: str
    strength: int | None
    samples: list[Sample]
    stems: list[int] | None


Answered = tuple[Change, NDArray[np.float64], NDArray[np.float64]]  # scores [2, questions] of the stems, of the changed


def robustness(
    bench: Workbench,
    view: ModelView,
    progress: Progress | None = None,
    *,
    questions: int = QUESTIONS,
    shifted: Sequence[Sample] = (),
) -> dict[str, Json]:
    """What `view` and the original lose under every change of the first `questions` check questions.

    Args:
        shifted: questions of another distribution that the data brings (``demo:shifted``), asked as they are.

    Returns:
        score: the data's own, by which answers are rated. clean: that score without any change. rows: change, strength,
        n, value and reference (of the score), loss and reference_loss, difference of the losses with ci95. by_change:
        difference over all strengths of a change, ci95, and `clear`, whether the interval that holds for all changes at
        once lies above zero. pictures: the same over all corruptions. left_out: changes that a model cannot be asked,
        with the reason. says: sentences.
    """
    told = progress or Silent()
    samples = bench.judge.samples[:questions]
    every, left_out = changes(samples, bench.judge.samples, shifted)
    told.start("robustness", 1 + len(every))
    said, score = _said(bench, view, samples), bench.judge.score
    clean = _rated(score, said, samples)
    told.step(note="unchanged")
    answered: list[Answered] = []
    for change in every:
        stems = change.stems
        try:
            found = _rated(score, _said(bench, view, change.samples), change.samples)
        except DataError as error:  # longer than the model can read
            left_out[_title(change)] = str(error).splitlines()[0]
        else:  # some scores depend on the other questions that are rated: the same ones before and after
            before = clean
            if stems is not None:
                before = _rated(score, [[row[i] for i in stems] for row in said], [samples[i] for i in stems])
            answered.append((change, before, found))
        told.step(note=_title(change))
    told.done()
    return compared(samples, clean, answered) | {"score": score, "left_out": left_out}


def changes(
    samples: Sequence[Sample], known: Sequence[Sample], shifted: Sequence[Sample] = ()
) -> tuple[list[Change], dict[str, str]]:
    """Every change of `samples`, and what cannot be made, with the reason.

    Args:
        known: questions with answers to make earlier turns of.
    """
    whole, left_out = list(range(len(samples))), {}
    every = [
        Change(name, strength, [corrupted(s, name, strength) for s in samples], whole)
        for name in CORRUPTIONS
        for strength in STRENGTHS
    ]
    for strength, count in zip(STRENGTHS, SENTENCES):
        every.append(Change("longer_prompt", strength, [_longer(s, count) for s in samples], whole))
    others = {i: _others(s, known) for i, s in enumerate(samples)}
    for strength, count in zip(STRENGTHS, TURNS):
        stems = [i for i in whole if len(others[i]) >= count]
        if stems:
            made = [_after(samples[i], others[i][:count]) for i in stems]
            every.append(Change("more_turns", strength, made, stems))
        else:
            left_out[f"more_turns {strength}"] = f"no picture has {count + 1} questions, each asked alone"
    if shifted:
        every.append(Change("shifted_data", None, list(shifted), None))
    return every, left_out


def compared(samples: Sequence[Sample], clean: NDArray[np.float64], answered: Sequence[Answered]) -> dict[str, Json]:
    """What follows from the scores: `clean` and each change's, arrays [2, questions], original and small model."""
    names = [s.image_id for s in samples] + [s.image_id for change, *_ in answered for s in change.samples]
    pictures = Pictures.of(names)
    # one table: a row a picture; of each change (the unchanged first) the questions, and the sums of their scores
    first = Pictures(pictures.index[: len(samples)], pictures.count)
    rows: list[dict[str, Any]] = []
    start, tables = len(samples), []
    for change, before, right in answered:
        n = len(change.samples)
        here = Pictures(pictures.index[start : start + n], pictures.count)
        start += n
        there = first if change.stems is None else here
        tables.append((_gap(there, before), _gap(here, right)))
        was, now = before.mean(1), right.mean(1)
        lost = was - now
        rows.append({"change": change.name, "strength": change.strength, "n": n,
                     "value": float(now[1]), "reference": float(now[0]),
                     "loss": float(lost[1]), "reference_loss": float(lost[0])})  # fmt: skip
    changed = dict.fromkeys(change.name for change, *_ in answered)
    groups = {name: [i for i, row in enumerate(rows) if row["change"] == name] for name in changed}
    corruptions = [i for name, places in groups.items() if name in CORRUPTIONS for i in places]

    def statistic(weights: Weights) -> Weights:
        each = [_mean(weights, before) - _mean(weights, after) for before, after in tables]
        means = [np.mean([each[i] for i in places], axis=0) for places in (*groups.values(), corruptions) if places]
        return np.stack([*each, *means], axis=1)

    found = bootstrap(pictures.count, statistic) if rows else None
    return _told(samples, clean, rows, groups, bool(corruptions), found)


def _told(
    samples: Sequence[Sample],
    clean: NDArray[np.float64],
    rows: list[dict[str, Any]],
    groups: Mapping[str, Sequence[int]],
    overall: bool,
    found: Resampled | None,
) -> dict[str, Json]:
    report: dict[str, Any] = {
        "n": len(samples),
        "n_images": len({s.image_id for s in samples}),
        "clean": {"value": float(clean[1].mean()), "reference": float(clean[0].mean())},
        "rows": rows,
        "by_change": {},
        "pictures": None,
    }
    if found is None:
        return report | {"says": []}
    for i, row in enumerate(rows):
        row |= {"difference": float(found.estimate[i]), "ci95": found.percentile(i)}
    places = dict(zip(groups, range(len(rows), len(rows) + len(groups))))
    several = dataclasses.replace(
        found, estimate=found.estimate[list(places.values())], replicates=found.replicates[:, list(places.values())]
    )
    report["by_change"] = {
        name: {"difference": float(found.estimate[i]), "ci95": found.percentile(i), "clear": bool(low > 0)}
        for (name, i), (low, _) in zip(places.items(), several.together())
    }
    if overall:
        report["pictures"] = {"difference": float(found.estimate[-1]), "ci95": found.percentile(-1)}
    return report | {"says": says(report)}


def says(report: Mapping[str, Any]) -> list[str]:
    """Under what the small model lost more than the original, in sentences."""
    told, overall = [], report["pictures"]
    if overall and overall["ci95"] is not None:
        low, high = overall["ci95"]
        if low > 0:
            told.append(f"Over all corruptions of the picture it lost {_points(overall)} more than the original.")
        elif high < 0:
            told.append(f"Over all corruptions of the picture it lost less than the original: {_points(overall)}.")
        else:
            told.append(f"Over all corruptions of the picture no difference in loss is shown: {_points(overall)}.")
    names = [name for name, entry in report["by_change"].items() if entry["clear"]]
    told += [f"Under {n.replace('_', ' ')} it lost {_points(report['by_change'][n])} more." for n in names]
    return told


def _points(entry: Mapping[str, Any]) -> str:
    text = f"{100 * entry['difference']:.1f} points"
    if entry["ci95"] is not None:
        low, high = (100 * end for end in entry["ci95"])
        text += f" (95 % interval {low:+.1f} to {high:+.1f})"
    return text.replace("-", "−")


# --------------------------------------------------------------------------------------------------------------- asking


def _said(bench: Workbench, view: ModelView, samples: Sequence[Sample]) -> list[list[str]]:
    """The answers of the original and of `view` [2][questions]."""
    pairs = ((bench.judge, bench.original), (bench.speaking(view).judge, view))
    return [judge.answers(model, samples) for judge, model in pairs]


def _rated(score: str, said: Sequence[Sequence[str]], samples: Sequence[Sample]) -> NDArray[np.float64]:
    """How these answers score [2, questions]."""
    accepted = [s.answers for s in samples]
    return np.array([rate(score, row, accepted) for row in said], dtype=np.float64)


def _gap(pictures: Pictures, right: NDArray[np.float64]) -> Weights:
    """By picture: questions, and how much more the original scored [pictures, 2]."""
    return np.concatenate([pictures.sums(np.ones(len(pictures.index))), pictures.sums(right[1] - right[0])], axis=1)


def _mean(weights: Weights, table: Weights) -> Weights:
    sums = weights @ table
    return ratio(sums[:, 1], sums[:, 0])


def _title(change: Change) -> str:
    return change.name if change.strength is None else f"{change.name} {change.strength}"


# ------------------------------------------------------------------------------------------------------ longer prompts


def _longer(sample: Sample, sentences: int) -> Sample:
    """The question after some harmless sentences."""
    words = " ".join(PREAMBLE[:sentences])
    question = f"{words} {sample.question or ''}".strip()
    if sample.messages is None:
        return dataclasses.replace(sample, question=question)
    *earlier, last = sample.messages
    parts = last["content"]
    if isinstance(parts, str):
        content: Any = f"{words} {parts}"
    else:
        at = next((i for i, part in enumerate(parts) if part["type"] == "text"), len(parts))
        content = [*parts[:at], {"type": "text", "text": words}, *parts[at:]]
    return dataclasses.replace(sample, question=question, messages=[*earlier, {**last, "content": content}])


def _others(sample: Sample, known: Sequence[Sample]) -> list[Sample]:
    """Other questions about the same pictures, all asked alone."""
    if sample.messages is not None:
        return []
    shown = [image.content for image in sample.images]
    return [
        other
        for other in known
        if other.image_id == sample.image_id
        and (other.question, other.messages) != (sample.question, None)
        and other.messages is None
        and [image.content for image in other.images] == shown
    ]


def _after(sample: Sample, earlier: Sequence[Sample]) -> Sample:
    """The question as the last turn of a conversation in which others were asked and answered rightly."""
    turns: list[dict[str, Any]] = []
    for i, turn in enumerate((*earlier, sample)):
        images = [{"type": "image"} for _ in sample.images] if i == 0 else []
        turns.append({"role": "user", "content": [*images, {"type": "text", "text": turn.question or ""}]})
        if turn is not sample:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": turn.answers[0]}]})
    return dataclasses.replace(sample, messages=turns)
