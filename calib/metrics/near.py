"""Answers that are nearly right: by their letters (ANLS), by their number (relaxed accuracy)."""

from __future__ import annotations

from collections.abc import Iterable

TOO_FAR = 0.5  # of ANLS: a similarity below it counts as none
TOLERANCE = 0.05  # of relaxed accuracy: how far a number may be off, as a share of the right one


def anls(answer: str, references: Iterable[str]) -> float:
    """Average normalised Levenshtein similarity of one answer, in [0, 1]: the best over the references of

        ``1 - d / max(len(answer), len(reference))``, or 0 where that is below 0.5,

    d the edit distance, letters in lower case, spaces single. The mean over questions is the score.

    Source: Biten et al., "Scene Text Visual Question Answering" (arXiv 1905.13648), equation 1. At a similarity of just
    0.5 the paper gives nothing and the challenge's evaluation gives 0.5; this does as the evaluation.
    """
    said = _plain(answer)
    return max((_similarity(said, _plain(reference)) for reference in references), default=0.0)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    if not longest:
        return 1.0
    if 2 * min(len(a), len(b)) < longest:  # the distance is at least the difference in length
        return 0.0
    similarity = 1 - _distance(a, b) / longest
    return similarity if similarity >= TOO_FAR else 0.0


def _distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that make `a` of `b`."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        now = [i]
        for j, y in enumerate(b, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (x != y)))
        before = now
    return before[-1]


def relaxed(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer is within 5 % of a reference that is a number (not 0), else equal to it but for case.

    ``12%`` is the number 0.12. Source: Methani et al., "PlotQA" (arXiv 1909.00997); Masry et al., "ChartQA" (arXiv
    2203.10244), section 5.1.
    """
    return any(_relaxed(answer.strip(), reference.strip()) for reference in references)


def _relaxed(said: str, right: str) -> bool:
    number, target = _number(said), _number(right)
    if number is None or not target:
        return said.lower() == right.lower()
    return abs(number - target) / abs(target) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
