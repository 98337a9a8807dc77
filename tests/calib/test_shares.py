"""Shares of a loss and their intervals, against drawing pictures one by one and against scipy's bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from svlm.calib.metrics.shares import interval, resampled_shares
from tests.oracles import shares as oracle


def losses(seed: int = 0) -> tuple[list[float], list[float], list[str]]:
    """Of 90 questions about 30 pictures: what was lost, and what is lost with a part put back."""
    draw = np.random.default_rng(seed)
    pictures = [f"p{i // 3}" for i in range(90)]
    hard = np.repeat(draw.gamma(0.5, size=30), 3)
    whole = hard * draw.gamma(2.0, size=90)
    return whole.tolist(), (whole * draw.uniform(0.1, 0.5, size=90)).tolist(), pictures


def test_the_interval_equals_drawing_pictures_one_by_one() -> None:
    whole, part, pictures = losses()
    low, high = interval(resampled_shares(whole, [part], pictures)[:, 0])
    assert low < oracle.share(whole, part) < high
    assert (low, high) == pytest.approx(oracle.interval(whole, part, pictures, 4000), abs=0.01)


def scipys(seed: int) -> list[float]:
    """What scipy's own bootstrap says of `losses(seed)`: ``python -m tests.calib.test_shares`` prints it."""
    from scipy.stats import bootstrap

    whole, part, pictures = losses(seed)
    sums = [np.bincount([int(p[1:]) for p in pictures], weights=rows) for rows in (part, whole)]
    made = bootstrap(
        sums, lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True, method="percentile", rng=3
    ).confidence_interval
    return [float(made.low), float(made.high)]


SCIPYS = [0.22673881164882836, 0.29360619466854554]  # of scipy 1.17.1


def test_the_interval_equals_scipys() -> None:
    whole, part, pictures = losses(1)
    found = interval(resampled_shares(whole, [part], pictures)[:, 0])
    assert found == pytest.approx(SCIPYS, abs=0.002)


def test_questions_about_few_pictures_say_less() -> None:
    whole, part, pictures = losses(2)

    spread = [w * (2.0 if i // 3 % 2 else 0.5) for i, w in enumerate(part)]  # alike within a picture
    by_question = interval(resampled_shares(whole, [spread], [str(i) for i in range(90)])[:, 0])
    by_picture = interval(resampled_shares(whole, [spread], pictures)[:, 0])
    assert by_picture[1] - by_picture[0] > 1.2 * (by_question[1] - by_question[0])


def test_a_share_that_is_the_same_in_every_question_is_certain() -> None:
    whole, _, pictures = losses()
    draws = resampled_shares(whole, [[0.25 * w for w in whole], [0.0] * 90], pictures)
    assert interval(draws[:, 0]) == pytest.approx([0.25, 0.25]) and interval(draws[:, 1]) == [0.0, 0.0]


def test_all_parts_are_drawn_together() -> None:
    whole, part, pictures = losses()
    rest = [w - p for w, p in zip(whole, part)]
    draws = resampled_shares(whole, [part, rest], pictures, resamples=200)
    assert draws.sum(1) == pytest.approx(np.ones(200))
    again = resampled_shares(whole, [part, rest], pictures, resamples=200)
    assert (draws == again).all()


def test_nothing_lost_is_no_share() -> None:
    assert (resampled_shares([0.0, 0.0], [[0.0, 0.0]], ["a", "b"], resamples=5) == 0).all()


if __name__ == "__main__":
    print(scipys(1))
