"""What a check split proves: score intervals against a search over likelihoods, and against what they claim."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from benchmarks import gates
from svlm.compress import evidence
from tests.oracles import evidence as oracle

# scipy.stats.t.ppf (1.17); tests/oracles/evidence.py prints it
T = {(1, 0.975): 12.706204736, (2, 0.95): 2.919985580, (5, 0.975): 2.570581836, (24, 0.99): 2.492159473}


def flips(b: int, c: int, n: int, images: int = 10**9, effect: float = 1.0) -> dict[str, float]:
    return {"lost": b / n, "gained": c / n, "n": n, "questions": n, "images": images, "design_effect": effect}


@pytest.mark.parametrize(
    ("b", "c", "n"), [(0, 0, 60), (3, 0, 200), (0, 4, 100), (12, 6, 512), (9, 31, 90), (50, 0, 60)]
)
def test_intervals_are_those_of_the_likelihood(b: int, c: int, n: int) -> None:
    z = NormalDist().inv_cdf(0.975)
    low, high = evidence.interval(flips(b, c, n))
    least, most = oracle.interval(b, c, n, z)
    assert (-high, -low) == pytest.approx((least, most), abs=2e-5)
    assert evidence.interval(flips(c, b, n)) == pytest.approx((-high, -low), abs=1e-9), "sides may be swapped"
    assert evidence.bound(flips(b, c, n), 0.975) == pytest.approx(-low, abs=1e-9)
    assert evidence.bound(flips(b, c, n), 0.975, least=True) == pytest.approx(-high, abs=1e-9)


def test_losses_alone_are_a_proportion() -> None:
    """Wilson's upper bound, which agreement needs: 7 of 300 tokens are another one."""
    z, n, p = NormalDist().inv_cdf(0.95), 300, 7 / 300
    centre, spread = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert evidence.bound(flips(7, 0, 300), 0.95) == pytest.approx((centre + spread) / (1 + z * z / n), rel=1e-6)


def test_clustered_questions_count_for_fewer() -> None:
    assert evidence.interval(flips(20, 10, 1000, effect=2.0)) == pytest.approx(evidence.interval(flips(10, 5, 500)))
    wide, narrow = (evidence.interval(flips(20, 10, 1000, images=k)) for k in (5, 250))
    assert wide[0] < narrow[0] and wide[1] > narrow[1], "the spread between few pictures is known badly"


@pytest.mark.parametrize(("df", "p"), T)
def test_students_quantiles(df: int, p: float) -> None:
    assert evidence.student(p, df) == pytest.approx(T[df, p], abs=1e-8)


def test_students_quantile_of_many() -> None:
    assert evidence.student(0.975, 127) == pytest.approx(1.978819535, abs=1e-6)
    assert evidence.student(0.95, 31) == pytest.approx(evidence.student(0.95, 30), abs=2e-3)
    assert evidence.student(0.05, 7) == pytest.approx(-evidence.student(0.95, 7)) and evidence.student(0.9, 0) > 3


def test_what_is_needed_suffices_in_four_runs_of_five() -> None:
    pilot = flips(10, 8, 1024, effect=1.6)
    n = evidence.needed(pilot, 0.01, 0.95)
    assert n is not None and 3000 < n < 8000
    alike = {"lost": pilot["lost"], "gained": pilot["gained"]}
    z = NormalDist().inv_cdf
    sigma = math.sqrt((sum(alike.values()) - (10 - 8) ** 2 / 1024**2) * 1.6)
    textbook = ((z(0.95) + z(0.8)) * sigma / (0.01 - 2 / 1024)) ** 2  # of a difference of means; variance as it is seen
    assert textbook < n < 1.35 * textbook, "the score's variance is that of the bound, which is a little more"
    assert evidence.needed(flips(10, 8, 1024), 2 / 1024, 0.95) is None, "the loss is what is allowed"
    assert evidence.needed(flips(0, 0, 64), 0.01, 0.95) < 1000
    mean = {"value": 0.02, "error": 0.01, "skew": 2.0, "questions": 100, "images": 25}
    assert evidence.needed(mean, 0.03, 0.95) == pytest.approx(100 * (z(0.95) + z(0.8)) ** 2, rel=0.02)
    assert evidence.needed(mean, 0.02, 0.95) is None


def test_before_anything_is_measured() -> None:
    n = evidence.least(0.01, 0.95)
    assert n == 268 and evidence.bound(flips(0, 0, n), 0.95) <= 0.01 < evidence.bound(flips(0, 0, n - 1), 0.95)
    assert evidence.likely(0.01, 0.95) > evidence.likely(0.02, 0.95) > evidence.least(0.02, 0.95)
    assert [evidence.rounded(x) for x in (7, 99, 100, 1834, 1900, 26001)] == [7, 99, 100, 1900, 1900, 27000]


def test_bounds_of_skewed_means() -> None:
    even = {"value": 0.2, "error": 0.02, "skew": 0.0, "questions": 100, "images": 100}
    plain = 0.2 + evidence.student(0.95, 99) * 0.02
    assert evidence.bound(even, 0.95) == pytest.approx(plain)
    assert evidence.bound(even | {"skew": 1e-4}, 0.95) == pytest.approx(plain, rel=1e-3)
    assert evidence.bound(even | {"skew": 3.0}, 0.95) > plain, "a long tail may hide more"
    assert evidence.bound(even | {"skew": 3.0}, 0.95, least=True) > evidence.bound(even, 0.95, least=True)
    assert evidence.bound(even, 0.95, least=True) < 0.2
    assert gates.mean_coverage(1.0, 128, 400) > 0.89


def test_intervals_hold_the_truth_where_the_bootstrap_does_not() -> None:
    """benchmarks/gates.py in small: 3 points lost, few gained, 128 questions about 32 pictures."""
    made = gates.coverage(128, "4 a picture", "3 points lost, few gained", 250)
    bootstrap = gates.coverage(128, "4 a picture", "3 points lost, few gained", 120, bootstrap=True)
    assert made["covers"] >= 0.93 and bootstrap["covers"] <= 0.93
    made = gates.coverage(1024, "4 a picture", "many flips, nothing lost", 250)
    assert 0.91 <= made["covers"] <= 0.99 and 0 < made["width"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("change", [c for c in gates.CHANGES if c != "no flips"])
def test_coverage_at_1024(change: str) -> None:
    assert 0.93 <= gates.coverage(1024, "4 a picture", change, 1500)["covers"] <= 0.975
