"""The choice of tokens: fast maths against naive loops."""

from __future__ import annotations

import pytest
import torch

from svlm.compress.runtime.images import kept_count, square
from svlm.passes.tokens._select import dpp, grid_positions, random_positions, scaled
from tests.oracles.dpp import greedy, kernel


@pytest.mark.parametrize("relevant", [False, True])
@pytest.mark.parametrize("tokens,width,k", [(9, 16, 4), (12, 12, 12), (16, 32, 1), (20, 24, 7)])
def test_dpp_is_greedy_over_determinants(tokens, width, k, relevant):
    g = torch.Generator().manual_seed(tokens + k)
    features = torch.randn(3, tokens, width, generator=g)
    relevance = torch.randn(3, tokens, generator=g) if relevant else None
    found = dpp(features, k, relevance)
    for i in range(3):
        naive = greedy(kernel(features[i], relevance[i] if relevant else None), k)
        assert found[i].tolist() == naive


def test_dpp_leaves_out_what_is_there_already():
    base = torch.eye(6)[:4]
    features = torch.cat([base, base * 3.0, base * 0.5])[None]  # three copies of each direction, by length
    assert dpp(features, 4)[0].tolist() == [0, 1, 2, 3], "one of each, the first of equals"
    assert sorted(set(dpp(features, 7)[0].tolist())) == dpp(features, 7)[0].tolist(), "more than the rank: no repeats"


def test_dpp_prefers_the_relevant():
    features = torch.eye(8)[None]
    relevance = torch.tensor([[0.0, 5.0, 1.0, 7.0, 2.0, 6.0, 3.0, 4.0]])
    assert dpp(features, 3, relevance)[0].tolist() == [1, 3, 5]
    assert dpp(features, 3, relevance * 100 - 17).tolist() == [[1, 3, 5]], "scale and offset do not matter"
    one = scaled(torch.tensor([[2.0, 2.0]]))
    assert torch.equal(one, torch.ones(1, 2)), "equally relevant: plain diversity"


def test_dpp_does_not_look_at_other_images():
    features = torch.randn(5, 16, 24, generator=torch.Generator().manual_seed(0))
    together = dpp(features, 6)
    for i in range(5):
        assert torch.equal(dpp(features[i : i + 1], 6)[0], together[i])


@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 16, 49, 52, 64, 100, 144])
@pytest.mark.parametrize(
    "choose",
    [lambda t, k: grid_positions(square(t), k), lambda t, k: random_positions(t, k, 3)],
    ids=["grid", "random"],
)
def test_positions_are_k_distinct_in_order(tokens, choose):
    for k in range(1, tokens + 1):
        places = choose(tokens, k).tolist()
        assert len(places) == k and places == sorted(set(places)) and places[0] >= 0 and places[-1] < tokens
    assert choose(tokens, tokens).tolist() == list(range(tokens))


def test_grid_is_even_in_two_dimensions():
    places = grid_positions((8, 8), 16)
    assert places.tolist() == [8 * y + x for y in (1, 3, 5, 7) for x in (1, 3, 5, 7)]
    rows = grid_positions((8, 8), 24) // 8
    counts = torch.bincount(rows, minlength=8)
    assert counts[counts > 0].max() - counts[counts > 0].min() <= 1
    assert grid_positions((1, 12), 4).tolist() == [1, 4, 7, 10], "no picture: even steps along the sequence"
    assert grid_positions((2, 8), 4).tolist() == [9, 11, 13, 15], "low and wide: one row"
    assert grid_positions((4, 16), 16).tolist() == [16 * y + x for y in (1, 3) for x in range(1, 16, 2)]


def test_random_is_a_fixed_draw():
    assert torch.equal(random_positions(64, 16, 0), random_positions(64, 16, 0))
    assert not torch.equal(random_positions(64, 16, 0), random_positions(64, 16, 1))
    few, many = set(random_positions(64, 8, 0).tolist()), set(random_positions(64, 16, 0).tolist())
    assert few < many, "a larger draw holds the smaller one"


@pytest.mark.parametrize("tokens,keep,count", [(576, 1 / 9, 64), (64, 0.5, 32), (5, 0.5, 3), (3, 0.1, 1), (7, 1.0, 7)])
def test_kept_count(tokens, keep, count):
    assert kept_count(tokens, keep) == count
