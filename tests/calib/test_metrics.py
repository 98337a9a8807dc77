"""Metrics against loops, and statistics against what they claim: coverage and power by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from svlm.calib.metrics import divergence
from svlm.calib.metrics.answers import exact_match, normalise
from svlm.calib.metrics.pairs import detectable, mcnemar, paired_bootstrap
from tests.oracles import metrics as oracle

# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("said", "reference"),
    [
        ("A Violin.", "violin"),
        ("  top   LEFT ", "top left"),
        ('"the cat\'s bowl"', "cat's bowl"),
        ("two", "2"),
        ("1,250", "1250"),
        ("red, white and blue", "red white and blue"),
        ("ﬁsh", "fish"),
        ("Straße", "STRASSE"),
        ("'bear'", "bear"),
        ("B.", "(b)"),
    ],
)
def test_spelling_does_not_matter(said: str, reference: str) -> None:
    assert exact_match(said, [reference]) and exact_match(reference, ["something else", said])


@pytest.mark.parametrize(
    ("said", "reference"),
    [
        ("3.5", "35"),
        (".5", "5"),
        ("cats", "cat"),
        ("A", ""),
        ("", "the"),
        ("A", "the"),
        ("no", "not"),
        ("x-ray", "xray"),
    ],
)
def test_what_is_said_does(said: str, reference: str) -> None:
    assert not exact_match(said, [reference])


def test_any_accepted_answer_counts_and_none_is_never_right() -> None:
    assert exact_match("sofa", ["couch", "sofa"]) and not exact_match("sofa", ["couch"]) and not exact_match("sofa", [])
    assert normalise(normalise("The U.S. Army, 2,000 men")) == normalise("The U.S. Army, 2,000 men")


# --------------------------------------------------------------------------------------------------------- divergences

TEACHER, STUDENT = (torch.randn(9, 50, generator=torch.Generator().manual_seed(s)) * 3 for s in (1, 2))


def test_kl_equals_the_loop() -> None:
    p, q = divergence.log_probabilities(TEACHER), divergence.log_probabilities(STUDENT)
    expected = [oracle.kl(t, s) for t, s in zip(TEACHER.tolist(), STUDENT.tolist())]
    assert divergence.kl(p, q).tolist() == pytest.approx(expected, rel=1e-5)
    assert divergence.kl(p, p).abs().max() == 0
    assert divergence.log_probabilities(TEACHER.bfloat16()).dtype == torch.float32


def test_a_shortened_teacher_gives_less_kl_and_the_whole_one_all_of_it() -> None:
    p, q = divergence.log_probabilities(TEACHER), divergence.log_probabilities(STUDENT)
    full, before = divergence.kl(p, q), torch.zeros(9)
    for top in (1, 5, 20, 50):
        values, indices, rest = divergence.shorten(p, top)
        short = divergence.kl_shortened(values, indices, rest, q)
        assert (short <= full + 1e-5).all() and (short >= before - 1e-5).all(), "more tokens tell more"
        before = short
        lumps = torch.cat([values.exp(), rest.exp()[:, None]], 1).sum(1)
        torch.testing.assert_close(lumps, torch.ones(9))
        assert divergence.kl_shortened(values, indices, rest, p).abs().max() < 1e-6
    torch.testing.assert_close(before, full, rtol=1e-4, atol=1e-5)


def test_perplexity() -> None:
    assert divergence.perplexity(torch.tensor([0.5, 0.25, 0.125]).log()) == pytest.approx(4.0)
    assert math.isfinite(divergence.perplexity(torch.tensor([-1e30])))


# --------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 3), (7, 2), (2, 9), (4, 8)])
def test_mcnemar_equals_counting(b: int, c: int) -> None:
    assert mcnemar(b, c) == pytest.approx(oracle.mcnemar(b, c), rel=1e-14)


def test_mcnemar_stays_exact_for_many_pairs() -> None:
    assert mcnemar(5000, 5000) == 1.0
    assert mcnemar(0, 1000) == 2.0**-999
    assert mcnemar(480, 520) == pytest.approx(0.217, abs=2e-3)  # the normal approximation with continuity correction


def clustered(draw: np.random.Generator, pictures: int) -> tuple[list[bool], list[bool], list[str]]:
    """Four questions a picture; now and then a picture as a whole gets worse or better, by -0.06 * 0.9 on average."""
    before, after, names = [], [], []
    for picture in range(pictures):
        worse = draw.choice([1, 0, -1], p=[0.15, 0.76, 0.09])
        for _ in range(4):
            hit = bool(draw.random() < 0.9) and worse != 0
            before.append(not hit or worse > 0)
            after.append(not hit or worse < 0)
            names.append(f"p{picture}")
    return before, after, names


def test_the_bootstrap_equals_drawing_pictures_one_by_one() -> None:
    before, after, names = clustered(np.random.default_rng(5), 40)
    before, after, names = before[:-3], after[:-3], names[:-3]  # pictures of different weight
    low, high = paired_bootstrap(before, after, names)
    means = oracle.bootstrap(before, after, names, 4000, seed=1)
    assert low == pytest.approx(means[100], abs=0.012) and high == pytest.approx(means[3900], abs=0.012)
    assert paired_bootstrap(before, after, names) == (low, high), "the same arguments, the same interval"
    assert paired_bootstrap(after, before, names) == pytest.approx((-high, -low), abs=0.01)


def test_the_interval_covers_the_truth_where_one_over_questions_does_not() -> None:
    draw, truth = np.random.default_rng(0), -0.06 * 0.9
    hits = {"pictures": 0, "questions": 0}
    for _ in range(200):
        before, after, names = clustered(draw, 80)
        alone = [str(i) for i in range(len(names))]
        for kind, clusters in (("pictures", names), ("questions", alone)):
            low, high = paired_bootstrap(before, after, clusters, resamples=300)
            hits[kind] += low <= truth <= high
    assert hits["pictures"] / 200 >= 0.9
    assert hits["questions"] / 200 <= 0.8


def test_an_interval_without_any_change_is_a_point() -> None:
    answers, names = [True, False, True, True], ["a", "a", "b", "c"]
    assert paired_bootstrap(answers, answers, names) == (0.0, 0.0)
    assert paired_bootstrap([True] * 3, [False] * 3, ["one"] * 3) == (-1.0, -1.0)


@pytest.mark.parametrize(("n", "share"), [(512, 0.05), (2000, 0.2)])
def test_a_detectable_difference_is_detected_four_times_in_five(n: int, share: float) -> None:
    d = detectable(round(share * n), n)
    draw = np.random.default_rng(1)
    counts = draw.multinomial(n, [(share + d) / 2, (share - d) / 2, 1 - share], size=1500)
    power = np.mean([mcnemar(int(b), int(c)) < 0.05 for b, c, _ in counts])
    assert 0.7 < power < 0.9  # the exact test is a little conservative
    half = draw.multinomial(n, [(share + d / 2) / 2, (share - d / 2) / 2, 1 - share], size=500)
    assert np.mean([mcnemar(int(b), int(c)) < 0.05 for b, c, _ in half]) < 0.5


def test_what_is_detectable_without_discordant_pairs() -> None:
    d = detectable(0, 512)  # eight answers, all one way
    assert d == pytest.approx(7.85 / 512, rel=1e-3) and mcnemar(round(d * 512), 0) < 0.05
    assert detectable(0, 3) == 1.0 and detectable(0, 0) == 1.0
    assert detectable(196, 3920) == pytest.approx(0.01, rel=0.01)  # the textbook example: 5 % discordant, one point
