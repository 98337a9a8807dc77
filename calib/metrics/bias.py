"""Bias of a small model beside its original's: what it says too often, and whether it does so more than the original.

Follows from the answers to the check questions alone. Every figure is small model less original, on the same
questions, with a 95 % interval over pictures.

Amplification is that of Wang and Russakovsky (arXiv 2102.12594, eq. 3), from an attribute a of the question to the
answer t: ``mean over (a, t) of y' D``, ``D = P(says t | a) - P(t is right | a)``, ``y' = 1`` or ``-1``. `directional`
is this formula as it stands, with y' = 1 where a and t go together in the right answers. Answers of different kinds of
question hardly overlap; then y' is 1 for all answers of a kind and their D cancel, however fond of one a model is. So
`lean` takes as direction what the two models together say too often (``y' = sign(D of one + D of the other)``), read
on other pictures than those that are measured, five-fold. Without that a model that is merely wrong more often would
look biased: noise, too, is larger on one side. `lean` counts each kind as often as it is asked and sums halves, so that
it is a share of answers: those that moved from what is said too seldom to what is said too often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .answers import normalise
from .kinds import OTHER, chosen, kinds, lumped, options, settled
from .resample import Pictures, Resampled, Weights, bootstrap, ratio

if TYPE_CHECKING:
    from ..sample import Sample

MOST = 32  # answers of a kind that are told apart; the rarer ones count as one
FOLDS = 5
FLIPS = 2_000  # random exchanges of the two models
GAINED = 5  # answers that are listed
MOVED = 5  # pictures on which an answer has to change before it is listed: fewer show nothing
LEAST_OPTIONS = 8  # questions with options, from which on positions are looked at

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """Questions as cells: a kind and an answer. `truth`, `before`, `after` [questions] are places in `names`."""

    names: list[tuple[str, str]]
    truth: Codes
    before: Codes
    after: Codes

    @classmethod
    def of(cls, groups: Sequence[str], *answers: Sequence[str]) -> Cells:
        counts: dict[str, Counter[str]] = {group: Counter() for group in sorted(set(groups))}
        for said in answers:
            for group, answer in zip(groups, said):
                counts[group][answer] += 1
        kept = {g: sorted(c, key=lambda a: (-c[a], a))[:MOST] for g, c in counts.items()}
        names = [(g, a) for g, every in kept.items() for a in (*every, OTHER)]
        places = {name: i for i, name in enumerate(names)}
        return cls(names, *(_codes([places.get((g, a), places[g, OTHER]) for g, a in zip(groups, s)]) for s in answers))

    @property
    def groups(self) -> Codes:
        """Which kind each cell is of."""
        names = list(dict.fromkeys(group for group, _ in self.names))
        return _codes([names.index(group) for group, _ in self.names])


def bias(samples: Sequence[Sample], before: Sequence[str], after: Sequence[str]) -> dict[str, Any]:
    """report.json's `bias` of check questions with answers, what the original said and what the small model says.

    Returns:
        amplification, answer_prior, yes_rate, position: `value` (small less original), `ci95`, `n` and more; the last
        two None where no question asks for yes or no, or lists options. tag_gap: the same by tag. grouped_by: what made
        kinds of the questions. says: a sentence for each interval above zero.
    """
    truth = [normalise(s.answers[0]) for s in samples]
    was, now = ([settled(a, s.answers) for a, s in zip(said, samples)] for said in (before, after))
    pictures = Pictures.of([s.image_id for s in samples])
    tags = [s.tags for s in samples]
    name, groups = kinds(tags, [s.question or "" for s in samples], truth)
    cells = Cells.of(groups, truth, was, now)
    right = [np.array([a == t for a, t in zip(said, truth)], dtype=float) for said in (was, now)]
    found: dict[str, Any] = {
        "amplification": amplification(pictures, cells) | {"by_tag": _associations(pictures, tags, truth, was, now)},
        "answer_prior": answer_prior(pictures, cells),
        "yes_rate": yes_rate(pictures, truth, was, now),
        "position": _position(pictures, samples, before, after),
        "tag_gap": {tag: gap for tag, labels in _tags(tags).items() if (gap := tag_gap(pictures, labels, *right))},
        "grouped_by": name,
    }
    return found | {"says": says(found)}


# ------------------------------------------------------------------------------------------------------- amplification


def directional(attribute: Codes, truth: Codes, said: Codes) -> float:
    """Directional bias amplification from attribute to task, arXiv 2102.12594, eq. 3.

    Args:
        attribute, truth, said: of each sample, numbered from 0; every attribute occurs.
    """
    wide = int(max(truth.max(), said.max())) + 1
    joint, made = (_joint(attribute, answers, wide) for answers in (truth, said))
    return float((_together(joint) * (made - joint) / joint.sum(1, keepdims=True)).mean())


def _joint(attribute: Codes, answers: Codes, wide: int) -> Weights:
    deep = int(attribute.max()) + 1
    return np.bincount(attribute * wide + answers, minlength=deep * wide).reshape(deep, wide).astype(np.float64)


def _together(joint: Weights) -> Weights:
    """1 where ``P(a, t) > P(a) P(t)``, else -1, of counts [attributes, answers]; without rounding."""
    return np.where(joint * joint.sum() > joint.sum(1, keepdims=True) * joint.sum(0), 1.0, -1.0)


def lean(pictures: Pictures, cells: Cells) -> Resampled:
    """How far answers lean to what is said too often: figures are small less original, small, original (shares)."""
    truth, was, now = (pictures.table(c, len(cells.names)) for c in (cells.truth, cells.before, cells.after))
    wrong = ((was != truth) | (now != truth)).any(0)
    was, now = (was - truth)[:, wrong], (now - truth)[:, wrong]
    size = pictures.sums(np.ones(len(pictures.index)))
    fold = np.arange(pictures.count) % FOLDS

    def statistic(weights: Weights) -> Weights:
        total = weights @ (was + now)
        moved = np.zeros((2, len(weights)))
        for f in range(FOLDS):
            w, here = weights[:, fold == f], fold == f
            old, new = w @ was[here], w @ now[here]
            direction = np.sign(total - old - new)
            moved += np.stack([(direction * new).sum(1), (direction * old).sum(1)]) / 2
        small, original = moved / (weights @ size)[:, 0]
        return np.stack([small - original, small, original], axis=1)

    return bootstrap(pictures.count, statistic)


def amplification(pictures: Pictures, cells: Cells) -> dict[str, Any]:
    """`lean` as report.json has it."""
    found = lean(pictures, cells)
    value, small, original = map(float, found.estimate)
    return {
        "value": value,
        "ci95": found.normal(0),
        "student": {"value": small, "ci95": found.normal(1)},
        "reference": {"value": original, "ci95": found.normal(2)},
        "n": len(pictures.index),
    }


def _associations(
    pictures: Pictures, tags: Sequence[Mapping[str, str]], truth: list[str], was: list[str], now: list[str]
) -> dict[str, Any]:
    """`directional` of each tag, small less original: whether answers follow the tag more than they should."""
    kept = {answer for answer, _ in Counter(truth).most_common(MOST)}
    every = sorted(kept | {OTHER})
    codes = [_codes([every.index(a if a in kept else OTHER) for a in said]) for said in (truth, was, now)]
    return {tag: _association(pictures, labels, codes, len(every)) for tag, labels in _tags(tags).items()}


def _association(pictures: Pictures, labels: list[str], codes: Sequence[Codes], wide: int) -> dict[str, Any]:
    truth, was, now = codes
    names = sorted(set(labels))
    tag = _codes([names.index(label) for label in labels])
    sign = _together(_joint(tag, truth, wide))
    cells = len(names) * wide
    change = pictures.table(tag * wide + now, cells) - pictures.table(tag * wide + was, cells)
    size = pictures.table(tag, len(names))

    def statistic(weights: Weights) -> Weights:
        moved = ((weights @ change).reshape(-1, len(names), wide) * sign).sum(2) / wide
        return np.nanmean(ratio(moved, weights @ size), axis=1)

    found = bootstrap(pictures.count, statistic)
    return {"value": float(found.estimate[0]), "ci95": found.percentile(), "n": len(labels)}


# -------------------------------------------------------------------------------------------------------- answer prior


def answer_prior(pictures: Pictures, cells: Cells) -> dict[str, Any]:
    """How the answers to each kind of question are distributed, beside the original's and the right ones.

    Returns:
        value: change of the share of frequent answers, those that are right more often than an even share of the
        answers to their kind (arXiv 1707.09457 calls these biased). distance: total variation between the
        distributions, averaged over questions; `chance` is what exchanging the models at random gives on average and p
        how often it gives as much. The distances to the right answers have no interval: one that is merely wrong more
        often is farther away by noise. by_kind: the same distances. gained: answers that rose most, as shares of their
        kind, with intervals that hold for all answers at once.
    """
    truth, was, now = (pictures.table(c, len(cells.names)) for c in (cells.truth, cells.before, cells.after))
    groups = cells.groups
    sizes = np.zeros((pictures.count, groups.max() + 1))
    np.add.at(sizes.T, groups, truth.T)
    counts = truth.sum(0)
    answers = np.bincount(groups, counts > 0)
    frequent = counts * answers[groups] > sizes.sum(0)[groups]
    n, change = len(pictures.index), now - was
    all_of = pictures.sums(np.ones(n))
    found = bootstrap(
        pictures.count, lambda weights: (weights @ change[:, frequent].sum(1, keepdims=True) / (weights @ all_of))[:, 0]
    )
    flips = np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, pictures.count))
    by_chance = np.abs(flips @ change).sum(1) / (2 * n)
    between = np.abs(change.sum(0)).sum() / (2 * n)

    def apart(one: Weights, other: Weights, where: Any = slice(None)) -> float:
        return float(np.abs((one - other).sum(0))[where].sum() / (2 * counts[where].sum()))

    distances = {"value": (now, truth), "reference": (was, truth), "between": (now, was)}
    names = list(dict.fromkeys(group for group, _ in cells.names))
    return {
        "value": float(found.estimate[0]),
        "ci95": found.percentile(),
        "distance": {key: apart(*pair) for key, pair in distances.items()}
        | {"chance": float(by_chance.mean()), "p": float((1 + (by_chance >= between - 1e-12).sum()) / (1 + FLIPS))},
        "by_kind": {
            name: {"n": int(sizes[:, g].sum())} | {key: apart(*pair, groups == g) for key, pair in distances.items()}
            for g, name in enumerate(names)
        },
        "gained": _gained(pictures, cells, change, sizes, truth.sum(0), was.sum(0), now.sum(0)),
        "n": n,
    }


def _gained(
    pictures: Pictures, cells: Cells, change: Weights, sizes: Weights, *counts: NDArray[np.float64]
) -> list[dict[str, Any]]:
    moved = np.flatnonzero((change != 0).sum(0) >= MOVED)
    if not len(moved):
        return []
    of = cells.groups[moved]
    found = bootstrap(pictures.count, lambda weights: ratio(weights @ change[:, moved], (weights @ sizes)[:, of]))
    bounds = found.together()
    order = [i for i in np.argsort(-found.estimate, kind="stable")[:GAINED] if found.estimate[i] > 0]
    rows = []
    for i in order:
        kind, answer = cells.names[moved[i]]
        right, was, now = (float(c[moved[i]] / sizes[:, of[i]].sum()) for c in counts)
        rows.append({"kind": kind, "answer": answer, "right": right, "reference": was, "value": now,
                     "delta": float(found.estimate[i]), "ci95": [float(end) for end in bounds[i]]})  # fmt: skip
    return rows


# --------------------------------------------------------------------------------------------- yes, position, gap


def yes_rate(pictures: Pictures, truth: Sequence[str], was: Sequence[str], now: Sequence[str]) -> dict[str, Any] | None:
    """How much more often questions that yes or no answers get a yes; None where there are none."""
    asked = np.array([t in ("yes", "no") for t in truth])
    if not asked.any():
        return None
    yes = [asked * np.array([a == "yes" for a in said], dtype=float) for said in (truth, was, now)]
    found = _difference(pictures, yes[2], yes[1], asked.astype(float))
    right, original, small = (float(y.sum() / asked.sum()) for y in yes)
    return found | {"student": small, "reference": original, "right": right, "n": int(asked.sum())}


def _position(
    pictures: Pictures, samples: Sequence[Sample], before: Sequence[str], after: Sequence[str]
) -> dict[str, Any] | None:
    """How much more answers lean to a place among the options (`lean`, questions by their number of options).

    Counts are questions whose right answer and both answers name an option with certainty; `unread` the others of those
    that list options. None where fewer than `LEAST_OPTIONS` remain.
    """
    found = [options(s.question or "") for s in samples]
    listed = [i for i, texts in enumerate(found) if texts]
    places = {i: [chosen(a, found[i] or []) for a in (samples[i].answers[0], before[i], after[i])] for i in listed}
    sure = [i for i in listed if None not in places[i]]
    if len(sure) < LEAST_OPTIONS:
        return None
    several = Pictures.of([samples[i].image_id for i in sure])
    groups = [f"{len(found[i] or []):02} options" for i in sure]
    letters = [[chr(ord("A") + (places[i][k] or 0)) for i in sure] for k in range(3)]
    leaning = amplification(several, Cells.of(groups, *letters))
    by_option = {}
    for letter in sorted(set().union(*letters)):
        said = [np.array([x == letter for x in row], dtype=float) for row in letters]
        right, original, small = (float(s.mean()) for s in said)
        one = _difference(several, said[2], said[1], np.ones(len(sure)))
        by_option[letter] = one | {"student": small, "reference": original, "right": right}
    return leaning | {"by_option": by_option, "n": len(sure), "unread": len(listed) - len(sure)}


def tag_gap(
    pictures: Pictures, labels: Sequence[str], was: NDArray[np.float64], now: NDArray[np.float64]
) -> dict[str, Any] | None:
    """How much farther apart a tag's best and worst value are in accuracy; None with one value, or too few pictures.

    Best and worst are those of both models together on other pictures, five-fold: the extremes of a noisier model are
    farther apart by themselves. `ratio` is the small model's gap over the original's, None where that is not clearly
    above zero.
    """
    names = sorted(set(labels))
    if len(names) < 2 or pictures.count < FOLDS:
        return None
    tag = _codes([names.index(label) for label in labels])
    size, old, new = (pictures.table(tag, len(names), values) for values in (np.ones(len(tag)), was, now))
    fold = np.arange(pictures.count) % FOLDS

    def statistic(weights: Weights) -> Weights:
        every = [weights @ table for table in (size, old, new)]
        sums = np.zeros((2, 3, len(weights)))  # best and worst: questions, right answers of the original, of the small
        for f in range(FOLDS):
            part = [weights[:, fold == f] @ table[fold == f] for table in (size, old, new)]
            n, a, b = (total - own for total, own in zip(every, part))
            score = ratio(a + b, n)
            ends = np.where(np.isnan(score), -1, score).argmax(1), np.where(np.isnan(score), 3, score).argmin(1)
            for k, end in enumerate(ends):
                sums[k] += [np.take_along_axis(table, end[:, None], 1)[:, 0] for table in part]
        original, small = (ratio(sums[0, k], sums[0, 0]) - ratio(sums[1, k], sums[1, 0]) for k in (1, 2))
        return np.stack([small - original, small, original, ratio(small, original)], axis=1)

    found = bootstrap(pictures.count, statistic)
    value, small, original, times = map(float, found.estimate)
    if not np.isfinite(value):  # a value that the pictures of a fold do not have
        return None
    base = found.percentile(2)
    readable = base is not None and base[0] > 0
    return {
        "value": value, "ci95": found.normal(0), "student": small, "reference": original,
        "ratio": times if readable else None, "ratio_ci95": found.percentile(3) if readable else None, "n": len(tag),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ sentences


def says(found: Mapping[str, Any]) -> list[str]:
    """A plain sentence for each figure whose interval lies above zero (of yes: off zero)."""
    told = []
    amplified, prior, yes, place = (found[key] for key in ("amplification", "answer_prior", "yes_rate", "position"))
    if _above(amplified):
        told.append(
            f"It leans further than the original to answers that are given too often: {_points(amplified)} of all "
            f"answers, questions grouped by {found['grouped_by']}."
        )
    if _above(prior):
        told.append(f"Answers that are frequent in the data are given more often: {_points(prior)} of all answers.")
    told += [
        f"'{row['answer']}' is given more often to '{row['kind']}': {_points(row, 'delta')} of its answers; right in "
        f"{100 * row['right']:.1f} %, given by the original in {100 * row['reference']:.1f} %, now in "
        f"{100 * row['value']:.1f} %."
        for row in prior["gained"]
        if row["ci95"][0] > 0
    ]
    if yes and yes["ci95"] and (yes["ci95"][0] > 0 or yes["ci95"][1] < 0):
        told.append(f"It says yes {'more' if yes['value'] > 0 else 'less'} often: {_points(yes)} of yes/no questions.")
    if place and _above(place):
        told.append(f"It leans further to a place among the options: {_points(place)} of their questions.")
    told += [
        f"Accuracy is farther apart between the values of tag {tag}: {_points(gap)}."
        for tag, gap in found["tag_gap"].items()
        if _above(gap)
    ]
    return told


def _above(figure: Mapping[str, Any]) -> bool:
    return bool(figure["ci95"]) and figure["ci95"][0] > 0


def _points(figure: Mapping[str, Any], key: str = "value") -> str:
    low, high = figure["ci95"]
    return f"{100 * figure[key]:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})".replace("-", "−")


def _difference(
    pictures: Pictures, new: NDArray[np.float64], old: NDArray[np.float64], asked: NDArray[np.float64]
) -> dict[str, Any]:
    change, size = pictures.sums(new - old), pictures.sums(asked)
    found = bootstrap(pictures.count, lambda weights: ratio(weights @ change, weights @ size))
    return {"value": float(found.estimate[0]), "ci95": found.percentile()}


def _tags(tags: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The tags with at least two values that enough questions have, and every question's value."""
    every = {tag: lumped([row.get(tag, OTHER) for row in tags]) for tag in sorted({t for row in tags for t in row})}
    return {tag: labels for tag, labels in every.items() if len(set(labels)) > 1}


def _codes(values: Sequence[int]) -> Codes:
    return np.asarray(values, dtype=np.int64)
