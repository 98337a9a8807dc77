"""Questions that are answered by yes or no: how often a model says yes, and how often it should.

A model that hallucinates says yes too often: its recall stays high while precision falls. Source: Li et al.,
"Evaluating Object Hallucination in Large Vision-Language Models" (POPE, arXiv 2305.10355), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compress.base import Json
from .answers import normalise

_NO = frozenset(("no", "not"))


def verdict(answer: str) -> bool | None:
    """Whether an answer says yes; None where its first sentence says neither yes nor no.

    A sentence with `no` or `not` says no. POPE's script takes every other sentence for a yes; here it has to say so.
    """
    words = normalise(answer.split(".")[0]).split()
    if _NO.intersection(words):
        return False
    return True if "yes" in words else None


def asked(references: Sequence[str]) -> bool | None:
    """What the accepted answers of a question say: True or False where all are a bare yes or no, None elsewhere.

    Where people disagree, what most of them say.
    """
    said = [normalise(reference) for reference in references]
    if not said or not set(said) <= {"yes", "no"}:
        return None
    yes, no = said.count("yes"), said.count("no")
    return said[0] == "yes" if yes == no else yes > no


def yes_no(right: Sequence[bool], said: Sequence[bool | None]) -> dict[str, Json]:
    """Rates in [0, 1] over questions with the answers `right`; `said` is what a model said, None for neither.

    Returns:
        n; neither: answers that are neither, counted wrong; yes_rate; accuracy; precision, recall and f1 of yes (0
        where there is nothing to divide by; None where yes is never right).
    """
    n, pairs = len(right), list(zip(right, said))
    hits, yes, due = pairs.count((True, True)), list(said).count(True), list(right).count(True)
    precision, recall = _ratio(hits, yes), _ratio(hits, due)
    return {
        "n": n,
        "neither": list(said).count(None),
        "yes_rate": _ratio(yes, n),
        "accuracy": _ratio(sum(a == b for a, b in pairs), n),
        "precision": precision if due else None,
        "recall": recall if due else None,
        "f1": _ratio(2 * hits, yes + due) if due else None,
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
