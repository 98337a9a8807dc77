"""Bias by loops over single questions: directional amplification, the five-fold lean, total variation, tag gaps."""

from __future__ import annotations

from collections import Counter


def directional(attribute: list[str], truth: list[str], said: list[str], answers: list[str]) -> float:
    """Mean over attributes and answers of y D - (1 - y) D."""
    n, total, names = len(truth), 0.0, sorted(set(attribute))
    for a in names:
        of = [i for i in range(n) if attribute[i] == a]
        for t in answers:
            both = sum(truth[i] == t for i in of) / n
            y = both > len(of) / n * (sum(x == t for x in truth) / n)
            d = sum(said[i] == t for i in of) / len(of) - sum(truth[i] == t for i in of) / len(of)
            total += d if y else -d
    return total / (len(names) * len(answers))


def lean(images: list[str], kinds: list[str], truth: list[str], was: list[str], now: list[str]) -> list[float]:
    """Small less original, small, original: the direction of each fold from the pictures of the others."""
    order = sorted(set(images))
    fold = [order.index(image) % 5 for image in images]
    moved = [0.0, 0.0]
    for f in range(5):
        out: Counter[tuple[str, str]] = Counter()
        for i in range(len(truth)):
            if fold[i] != f:
                out[kinds[i], was[i]] += 1
                out[kinds[i], now[i]] += 1
                out[kinds[i], truth[i]] -= 2
        for i in range(len(truth)):
            if fold[i] == f:
                for k, said in ((0, now), (1, was)):
                    up, down = out[kinds[i], said[i]], out[kinds[i], truth[i]]
                    moved[k] += ((up > 0) - (up < 0) - (down > 0) + (down < 0)) / 2
    small, original = (m / len(truth) for m in moved)
    return [small - original, small, original]


def total_variation(one: list[str], other: list[str]) -> float:
    a, b = Counter(one), Counter(other)
    return sum(abs(a[x] - b[x]) for x in {*a, *b}) / (2 * len(one))


def gaps(images: list[str], labels: list[str], was: list[bool], now: list[bool]) -> list[float]:
    """Accuracy of the best less the worst label, original and small; which these are is read on the other folds."""
    order = sorted(set(images))
    fold = [order.index(image) % 5 for image in images]
    picked: dict[str, list[int]] = {"best": [], "worst": []}
    for f in range(5):
        score = {}
        for label in sorted(set(labels)):
            rest = [i for i in range(len(labels)) if labels[i] == label and fold[i] != f]
            if rest:
                score[label] = sum(was[i] + now[i] for i in rest) / len(rest)
        ends = {"best": max(score, key=lambda s: score[s]), "worst": min(score, key=lambda s: score[s])}
        for end, label in ends.items():
            picked[end] += [i for i in range(len(labels)) if labels[i] == label and fold[i] == f]
    found = []
    for right in (was, now):
        best, worst = (sum(right[i] for i in picked[end]) / len(picked[end]) for end in ("best", "worst"))
        found.append(best - worst)
    return found
