"""What pairs of answers prove, questions clustered by picture: evidence for `compress.evidence`, tests, tables.

Everything takes arrays and gives numbers. `before` and `after` are scores in [0, 1] of the same questions, of the
original and of the small model; for right and wrong answers, booleans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ...compress.base import Json
from ...compress.evidence import interval
from .pairs import mcnemar

Scores = Sequence[bool] | Sequence[float] | np.ndarray
FINEST = 0.1  # least design effect: graded scores that change by little vary less than flips, but no less than this


def evidence(
    before: Scores, after: Scores, images: Sequence[str] | np.ndarray, questions: int | None = None
) -> dict[str, Json]:
    """Evidence of a loss, for `compress.evidence`.

    The design effect is the variance of the mean change between pictures (linearized, for pictures have different
    numbers of questions), at least that between questions, over the variance of as many independent flips. Graded
    scores fit in, for a change of 0.3 is 0.3 of a flip and varies less. No change at all: 1; a single picture: n.

    Args:
        before, after, images: [n], one each of whatever the mean is over. questions: where that is not questions.
    """
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    n, lost, gained = len(change), float(-change.clip(max=0).mean()), float(change.clip(min=0).mean())
    sums, sizes = _by_image(change, images)
    flips = (lost + gained - (gained - lost) ** 2) / n
    effect = 1.0
    if len(sums) == 1:
        effect = float(n)
    elif flips > 0:
        alone = float((change**2).mean() - change.mean() ** 2) / n
        effect = max(_variance(sums, sizes), alone, FINEST * flips) / flips
    return {
        "lost": lost,
        "gained": gained,
        "n": n,
        "questions": questions or n,
        "images": len(sums),
        "design_effect": effect,
    }


def mean_evidence(values: Sequence[float] | np.ndarray, images: Sequence[str] | np.ndarray, questions: int) -> Json:
    """Evidence of a mean of `values` [n] without an upper end, such as the KL: `error` and `skew` are over pictures."""
    array = np.asarray(values, dtype=np.float64)
    sums, sizes = _by_image(array, images)
    share = (sums - array.mean() * sizes) * len(sums) / len(array)  # what each picture adds to the error of the mean
    spread = float(np.sqrt((share**2).mean()))
    return {
        "value": float(array.mean()),
        "error": float(np.sqrt(_variance(sums, sizes))) if len(sums) > 1 else float("inf"),
        "skew": float((share**3).mean() / spread**3) if spread > 0 else 0.0,
        "questions": questions,
        "images": len(sums),
    }


def sign_flip(before: Scores, after: Scores, images: Sequence[str]) -> float:
    """Two-sided p of the exact test over pictures, of right and wrong answers.

    If nothing was lost, each picture's change might as well have had the other sign: p is the share of all assignments
    of signs whose sum is at least as large as the one seen. Where no picture has two flips this is McNemar's exact
    test; where several answers of one picture flip together, McNemar's counts them as independent and its p is too
    small.
    """
    change = np.asarray(after, dtype=np.int64) - np.asarray(before, dtype=np.int64)
    sums = np.rint(_by_image(change, images)[0]).astype(np.int64)
    steps = np.abs(sums[sums != 0])
    middle = int(steps.sum())
    chance = np.zeros(2 * middle + 1)
    chance[middle] = 1.0
    for step in steps:
        up, down = np.zeros_like(chance), np.zeros_like(chance)
        up[step:], down[:-step] = chance[:-step], chance[step:]
        chance = (up + down) / 2
    seen = abs(int(sums.sum()))
    return min(1.0, float(chance[: middle - seen + 1].sum() + chance[middle + seen :].sum()))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (1979): the k-th smallest times the number not smaller, never falling, at most 1."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def by_group(
    groups: Mapping[str, Mapping[str, Sequence[int]]], was: Sequence[bool], now: Sequence[bool], images: Sequence[str]
) -> dict[str, Json]:
    """Exact match of groups of questions, such as those of a tag's values.

    Args:
        groups: tag -> value -> indices of its questions.

    Returns:
        tag -> value -> n, value, reference, delta, ci95 (paired, over pictures), p (`sign_flip`) and p_holm: p by Holm
        over all values of all tags, so that one group among many does not look hurt by chance.
    """
    table: dict[str, Json] = {tag: {} for tag in groups}
    rows: list[dict[str, Json]] = []
    for tag, values in groups.items():
        for value, indices in sorted(values.items()):
            before, after, where = [was[i] for i in indices], [now[i] for i in indices], [images[i] for i in indices]
            n = len(indices)
            row: dict[str, Json] = {
                "n": n,
                "value": sum(after) / n,
                "reference": sum(before) / n,
                "delta": (sum(after) - sum(before)) / n,
                "ci95": list(interval(evidence(before, after, where))),
                "p": sign_flip(before, after, where),
            }
            table[tag][value] = row
            rows.append(row)
    for row, p in zip(rows, holm([row["p"] for row in rows])):
        row["p_holm"] = p
    return table


def by_tag(tags: Iterable[Mapping[str, str]], was: Sequence[bool], now: Sequence[bool], images: Sequence[str]) -> Json:
    """`by_group` of the tags of each question."""
    groups: dict[str, dict[str, list[int]]] = {}
    for i, own in enumerate(tags):
        for tag, value in own.items():
            groups.setdefault(tag, {}).setdefault(value, []).append(i)
    return by_group(groups, was, now, images)


def compared(before: Sequence[Mapping[str, Json]], after: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    """Exact match of two models' answers to the same questions (`Measurement.items`): `after` less `before`."""
    was, now = ([item["correct"] for item in items] for items in (before, after))
    images = [item["image_id"] for item in before]
    worse, better = (sum(x and not y for x, y in zip(*pair)) for pair in ((was, now), (now, was)))
    return {
        "delta": (sum(now) - sum(was)) / len(was),
        "ci95": list(interval(evidence(was, now, images))),
        "mcnemar_p": mcnemar(worse, better),
    }


def _by_image(values: np.ndarray, images: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each picture."""
    names, index = np.unique(np.asarray(images), return_inverse=True)
    return (
        np.bincount(index, weights=values, minlength=len(names)),
        np.bincount(index, minlength=len(names)).astype(np.float64),
    )


def _variance(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Of the ratio of the sums to the sizes, over pictures."""
    rest = sums - sums.sum() / sizes.sum() * sizes
    return float((rest**2).sum() / sizes.sum() ** 2 * len(sums) / (len(sums) - 1))
