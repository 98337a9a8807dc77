"""How much of a loss a part brings back, question by question, and its interval, drawing pictures one by one."""

from __future__ import annotations

import random


def share(whole: list[float], part: list[float]) -> float:
    total = 0.0
    for loss in whole:
        total += loss
    back = 0.0
    for loss in part:
        back += loss
    return back / total


def interval(whole: list[float], part: list[float], pictures: list[str], resamples: int) -> tuple[float, float]:
    """95 %, by drawing as many pictures as there are, with replacement, and asking all of their questions."""
    rng = random.Random(7)
    names = sorted(set(pictures))
    shares = []
    for _ in range(resamples):
        questions = []
        for _ in names:
            name = rng.choice(names)
            questions += [i for i, picture in enumerate(pictures) if picture == name]
        shares.append(share([whole[i] for i in questions], [part[i] for i in questions]))
    shares.sort()
    return shares[round(0.025 * (resamples - 1))], shares[round(0.975 * (resamples - 1))]
