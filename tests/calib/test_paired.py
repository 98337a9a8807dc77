"""What pairs prove, clustered by picture, against counting; tables by group."""

from __future__ import annotations

import numpy as np
import pytest

from svlm.calib.metrics.paired import by_group, by_tag, compared, evidence, holm, mean_evidence, sign_flip
from svlm.calib.metrics.pairs import detectable, mcnemar
from svlm.compress.evidence import interval
from tests.oracles import evidence as oracle


def answers(sums: list[int], same: int = 2) -> tuple[list[bool], list[bool], list[str]]:
    """A picture for each sum, with so many flips and some answers that stay."""
    before: list[bool] = []
    after: list[bool] = []
    names: list[str] = []
    for i, total in enumerate(sums):
        before += [total < 0] * abs(total) + [True] * same
        after += [total > 0] * abs(total) + [True] * same
        names += [f"p{i}"] * (abs(total) + same)
    return before, after, names


# p values of scipy.stats.permutation_test (1.17, permutation_type="samples"); tests/oracles/evidence.py prints them
@pytest.mark.parametrize(
    ("sums", "p"), [([3, -1, 2, 2, 1, -1, 4], 0.140625), ([-4, -1, -1, -2, 1, -3, -1, -1], 0.046875), ([0, 0], 1.0)]
)
def test_the_test_over_pictures_counts_all_signs(sums: list[int], p: float) -> None:
    assert sign_flip(*answers(sums)) == pytest.approx(p, rel=1e-12)
    assert oracle.sign_flip([s for s in sums if s]) == pytest.approx(p)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 0), (2, 9), (30, 41)])
def test_with_one_flip_a_picture_it_is_mcnemars(b: int, c: int) -> None:
    assert sign_flip(*answers([-1] * b + [1] * c)) == pytest.approx(mcnemar(b, c), rel=1e-9)


def test_flips_that_come_together_prove_less_than_mcnemar_says() -> None:
    before, after, names = answers([-4, -4, -4, -4])
    assert mcnemar(16, 0) < 1e-4 and sign_flip(before, after, names) == 0.125


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.2], [0.9, 0.001, 0.02, 0.02, 0.5], [0.3], []])
def test_holm_is_closed_testing(p: list[float]) -> None:
    assert holm(p) == pytest.approx(oracle.holm(p))


def test_the_design_effect_is_one_for_pictures_alone_and_all_of_them_for_copies() -> None:
    draw = np.random.default_rng(0)
    change = draw.choice([-1, 0, 1], p=[0.1, 0.8, 0.1], size=3000)
    before, after = change <= 0, change >= 0
    assert evidence(before, after, np.arange(3000))["design_effect"] == pytest.approx(1.0, abs=1e-3)
    copies = evidence(np.repeat(before, 5), np.repeat(after, 5), np.repeat(np.arange(3000), 5))
    assert copies["design_effect"] == pytest.approx(5.0, rel=1e-3) and copies["images"] == 3000
    assert interval(copies) == pytest.approx(interval(evidence(before, after, np.arange(3000))), rel=1e-3)
    single = evidence([True] * 8, [True] * 7 + [False], ["one"] * 8)
    assert single["design_effect"] == 8 and interval(single)[0] == pytest.approx(-1, abs=0.01)
    assert evidence([True] * 8, [True] * 8, list("abcdefgh"))["design_effect"] == 1.0


def test_graded_scores_vary_less_than_flips() -> None:
    draw = np.random.default_rng(1)
    change = draw.choice([-1, 0, 1], p=[0.1, 0.8, 0.1], size=4000) * draw.random(4000)
    made = evidence(change.clip(max=0) * -1, change.clip(min=0), np.arange(4000))
    low, high = interval(made)
    error = change.std() / np.sqrt(4000)
    assert made["design_effect"] == pytest.approx(2 / 3, abs=0.05)  # E u^2 / E u of a uniform u
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.02)


def test_a_mean_over_pictures() -> None:
    values = np.array([1.0, 3.0, 2.0, 2.0, 8.0, 0.0])
    made = mean_evidence(values, list("aabbcc"), 3)
    assert made["value"] == pytest.approx(16 / 6) and made["images"] == 3 and made["questions"] == 3
    assert made["error"] == pytest.approx(np.std([2.0, 2.0, 4.0], ddof=1) / np.sqrt(3)) and made["skew"] > 0.5
    assert mean_evidence([1.0, 1.0], ["a", "b"], 2)["skew"] == 0.0
    assert mean_evidence([1.0, 2.0], ["a", "a"], 2)["error"] == float("inf")


def test_clusters_make_what_is_detectable_larger() -> None:
    assert detectable(40, 1000, 2.0) == pytest.approx(detectable(20, 500)) and detectable(0, 100, 3.0) > detectable(
        0, 100
    )


def test_one_hurt_group_among_many() -> None:
    groups = {"kind": {f"k{i}": list(range(40 * i, 40 * i + 40)) for i in range(5)}, "half": {"a": list(range(100))}}
    was, now, images = [True] * 200, [True] * 200, [f"p{i // 2}" for i in range(200)]
    now[:20:2] = [False] * 10
    table = by_group(groups, was, now, images)
    hurt, fine = table["kind"]["k0"], table["kind"]["k1"]
    assert hurt["delta"] == -0.25 and hurt["ci95"][1] < 0 and hurt["p"] == 2**-9
    assert hurt["p_holm"] == pytest.approx(6 * 2**-9) and fine["p"] == fine["p_holm"] == 1.0
    tags = [{"kind": f"k{i // 40}"} | ({"half": "a"} if i < 100 else {}) for i in range(200)]
    assert by_tag(tags, was, now, images) == table


def test_models_beside_each_other() -> None:
    was, now, images = answers([-2, 1, -1])
    rows = [[{"correct": c, "image_id": i} for c, i in zip(column, images)] for column in (was, now)]
    made = compared(*rows)
    assert made["delta"] == pytest.approx(-2 / 10) and made["mcnemar_p"] == mcnemar(3, 1)
    assert made["ci95"] == list(interval(evidence(was, now, images)))
