"""The scores that a data set may have of its own, by name; each rates every answer, so that answers can be paired."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...compress.errors import DataError, did_you_mean
from ...compress.gate import SCORES
from .answers import exact_match
from .captions import bleu, cider, require
from .near import anls, relaxed
from .vqa import PEOPLE, vqa_accuracy

Answers = Sequence[str]
References = Sequence[Sequence[str]]  # of every question, the accepted answers
Score = Callable[[Answers, References], list[float]]

EXACT = "exact_match"


def _each(score: Callable[[str, Sequence[str]], float]) -> Score:
    """A score that looks at one question at a time."""
    return lambda answers, references: [float(score(*pair)) for pair in zip(answers, references)]


_RATE: dict[str, Score] = {
    EXACT: _each(exact_match),
    "vqa": _each(vqa_accuracy),
    "anls": _each(anls),
    "relaxed": _each(relaxed),
    "cider": cider,
    "bleu": bleu,
}
NEEDS_CAPTIONS = ("cider", "bleu")


def rate(name: str, answers: Answers, references: References) -> list[float]:
    """The score `name` of every answer; see docs/metrics.md for their ranges."""
    return _RATE[name](answers, references)


def chosen(name: str | None, references: References) -> str:
    """The score called `name`; of None, what the references show for certain: ten a question are VQA's.

    Raises:
        DataError: no such score. UsageError: it needs a package that is not installed.
    """
    if name is None:
        return "vqa" if references and all(len(answers) == PEOPLE for answers in references) else EXACT
    if name not in _RATE:
        raise DataError(f"no score '{name}'", change=did_you_mean(name, (EXACT, *SCORES)))
    if name in NEEDS_CAPTIONS:
        require()
    return name
