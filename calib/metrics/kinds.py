"""What a question asks for, and which of its options an answer names: read off the data, or not at all."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from .answers import exact_match, normalise

LEAST = 8  # questions of a group that is looked at by itself
WORDS = 2  # first words of a question that say its kind, where no tag does (as VQA's question types)
OTHER = "(other)"
_OPTION = re.compile(r"(?:^|(?<=[\s,;]))(?:\(([A-Za-z])\)|([A-Z])[.):])\s+(?=\S)")
_LETTER = re.compile(r"\(?([A-Za-z])\)?(?:[.):](?:\s.*)?)?", re.S)


def settled(answer: str, accepted: Sequence[str]) -> str:
    """What an answer counts as: the first accepted one where it is right (a sofa is a couch), else its own words."""
    return normalise(accepted[0] if exact_match(answer, accepted) else answer)


def lumped(values: Sequence[str], least: int = LEAST) -> list[str]:
    """The values, those that fewer than `least` questions have as one."""
    counts = Counter(values)
    return [value if counts[value] >= least else OTHER for value in values]


def information(groups: Sequence[str], answers: Sequence[str]) -> float:
    """Mutual information in nats of group and answer, less what chance alone gives (Miller and Madow 1955)."""
    n = len(answers)
    by_group, by_answer, by_both = Counter(groups), Counter(answers), Counter(zip(groups, answers))
    told = sum(c / n * math.log(c * n / by_group[g] / by_answer[a]) for (g, a), c in by_both.items())
    return told - (len(by_group) - 1) * (len(by_answer) - 1) / (2 * n)


def kinds(tags: Sequence[Mapping[str, str]], questions: Sequence[str], truth: Sequence[str]) -> tuple[str, list[str]]:
    """How questions fall into kinds, and the kind of each.

    The tag that tells most about the right answer; without tags the first words of the question; else one kind.
    """
    best: tuple[float, str, list[str]] = (0.0, "", [])
    for tag in sorted({tag for row in tags for tag in row}):
        groups = lumped([row.get(tag, OTHER) for row in tags])
        best = max(best, (information(groups, truth), f"tag {tag}", groups), key=lambda b: b[0])
    if best[0] <= 0:
        groups = lumped([" ".join(normalise(q).split()[:WORDS]) for q in questions])
        best = max(best, (information(groups, truth), "first words", groups), key=lambda b: b[0])
    return (best[1], best[2]) if best[0] > 0 else ("all questions", ["all"] * len(truth))


def options(question: str) -> list[str] | None:
    """The options that a question lists as ``A. cat``, ``B) dog`` or ``(a) cat``, in order; None without certainty.

    Certain are two or more marks that run from A on without a gap, each with a text of its own.
    """
    marks = list(_OPTION.finditer(question))
    letters = "".join(mark[1] or mark[2] for mark in marks)
    if len(marks) < 2 or letters not in (
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(marks)],
        "abcdefghijklmnopqrstuvwxyz"[: len(marks)],
    ):
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    texts = [question[mark.end() : end].strip(" ,;\n\t").splitlines()[0].strip() for mark, end in zip(marks, ends)]
    return texts if len(set(map(normalise, texts))) == len(texts) else None


def chosen(answer: str, listed: Sequence[str]) -> int | None:
    """Which option an answer names, by its letter or by its text, from 0; None where it names none."""
    texts = [normalise(text) for text in listed]
    if normalise(answer) in texts:
        return texts.index(normalise(answer))
    letter = _LETTER.fullmatch(answer.strip())
    place = ord(letter[1].upper()) - ord("A") if letter else len(listed)
    return place if place < len(listed) else None
