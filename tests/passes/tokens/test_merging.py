"""Pooling, DivPrune, VisionZip and ApET: fast maths against naive loops."""

from __future__ import annotations

import pytest
import torch

from svlm.passes.tokens._merge import apet, cells, farthest, residual, visionzip
from svlm.passes.tokens._select import bands, divprune
from tests.oracles import tokens as naive

SIZES = [(9, 16, 4), (12, 12, 11), (16, 32, 1), (20, 24, 7)]


def values(images, tokens, width, seed):
    return torch.randn(images, tokens, width, generator=torch.Generator().manual_seed(seed))


def stays(positions, weights, features, image):
    """Place -> feature, as the model will have it."""
    mixed = weights[image].double() @ features[image].double()
    return dict(zip(positions[image].tolist(), mixed, strict=True))


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for place, value in wanted.items():
        torch.testing.assert_close(found[place], value.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens,width,k", SIZES)
def test_divprune_is_max_min(tokens, width, k):
    features = values(3, tokens, width, tokens + k)
    found = divprune(features, k)
    for i in range(3):
        assert found[i].tolist() == naive.max_min(features[i], k)
        assert torch.equal(divprune(features[i : i + 1], k)[0], found[i]), "no other image matters"


def test_divprune_takes_one_of_each_before_a_second():
    base = torch.eye(5)
    features = torch.cat([base, base * 3.0, base * 0.5])[None]
    assert sorted(i % 5 for i in divprune(features, 5)[0].tolist()) == [0, 1, 2, 3, 4]
    assert len(set(divprune(features, 12)[0].tolist())) == 12, "none twice"


@pytest.mark.parametrize(
    "shape,k", [((8, 8), 16), ((8, 8), 13), ((7, 7), 40), ((3, 10), 7), ((1, 52), 13), ((24, 24), 64)]
)
def test_cells_are_means_of_a_partition(shape, k):
    height, width = shape
    features = values(1, height * width, 5, k)[0]
    positions, weights = cells(shape, k)
    lines = bands(shape, k)
    counts = [(i + 1) * k // lines - i * k // lines for i in range(lines)]
    wanted, means = naive.pooled(features, shape, counts)
    assert positions.tolist() == wanted == sorted(set(wanted)) and len(wanted) == k
    torch.testing.assert_close(weights @ features, means)
    assert torch.equal((weights > 0).sum(0), torch.ones(height * width, dtype=torch.long)), "each token in one cell"
    assert all(weights[j, p] > 0 for j, p in enumerate(wanted)), "the middle token is in its cell"


def test_cells_are_square_in_a_square():
    positions, weights = cells((4, 4), 4)
    assert positions.tolist() == [0, 2, 8, 10]
    assert (weights[0] > 0).nonzero().squeeze(1).tolist() == [0, 1, 4, 5] and float(weights[0].max()) == 0.25
    positions, weights = cells((6, 6), 4)
    assert positions.tolist() == [7, 10, 25, 28]


def test_all_cells_are_the_picture_itself():
    positions, weights = cells((3, 5), 15)
    assert positions.tolist() == list(range(15)) and torch.equal(weights, torch.eye(15))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("tokens,width,k", [(16, 8, 8), (20, 24, 7), (9, 16, 1), (36, 4, 20)])
def test_visionzip(tokens, width, k, add):
    features, keys = values(3, tokens, width, k), values(3, tokens, 6, k + 1)
    attention = values(3, tokens, 1, k + 2)[..., 0].softmax(-1)
    positions, weights = visionzip(attention, keys, k, 0.7, add)
    assert positions.shape == (3, k) and bool((positions.diff() > 0).all())
    leading = int(0.7 * k + 0.5)
    for i in range(3):
        if leading < k:
            wanted = naive.visionzip(features[i], attention[i], keys[i], leading, k - leading, add)
            same(stays(positions, weights, features, i), wanted)
        else:
            assert positions[i].tolist() == [int(attention[i].argmax())]
    if not add:
        torch.testing.assert_close(weights.sum(2), torch.ones(3, k, dtype=weights.dtype))


def test_visionzip_leaves_the_dominant_as_they_are():
    features = values(1, 12, 4, 0)
    attention = torch.arange(12.0)[None]
    positions, weights = visionzip(attention, features, 6, 0.5)
    mixed = weights.float() @ features
    for j, place in enumerate(positions[0].tolist()):
        if place >= 9:
            assert torch.equal(mixed[0, j], features[0, place])


@pytest.mark.parametrize("tokens,width,k,basis", [(16, 8, 4, 3), (20, 24, 7, 10), (9, 16, 1, 4), (14, 6, 12, 10)])
def test_apet(tokens, width, k, basis):
    features = values(3, tokens, width, tokens + k)
    positions, weights = apet(features, k, basis)
    for i in range(3):
        same(stays(positions, weights, features, i), naive.apet(features[i], k, basis))
        assert torch.equal(apet(features[i : i + 1], k, basis)[0][0], positions[i]), "no other image matters"


def test_residual_is_zero_inside_the_span_even_of_twins():
    base = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.cat([base, base[:1], torch.tensor([[0.3, -2.0, 0.5]], dtype=torch.float64) @ base, torch.eye(8)[:2]])[
        None
    ]
    error = residual(x, torch.tensor([[0, 1, 2, 3]]))[0]
    assert float(error[:5].max()) < 1e-12 and float(error[5:].min()) > 1e-3
    assert sorted(farthest(x, 5)[0].tolist()) != [0, 1, 2, 3, 4], "a twin is at distance zero"
