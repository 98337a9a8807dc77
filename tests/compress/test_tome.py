"""Token merging: the fast maths against naive loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from svlm.compress.runtime.merge import counts
from svlm.compress.runtime.tome import matching, merged, shares, spread
from tests.oracles import tome as oracle


def lists(groups: torch.Tensor) -> list[list[int]]:
    """Group numbers of tokens [n] as the lists of tokens in each group."""
    return [(groups == number).nonzero().flatten().tolist() for number in range(int(groups.max()) + 1)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n,r", [(2, 1), (9, 0), (9, 4), (16, 8), (25, 7)])
def test_matching(n, r, padded):
    g = torch.Generator().manual_seed(n + r)
    keys = torch.randn(3, n, 6, generator=g)
    real = torch.rand(3, n, generator=g) > 0.4 if padded else None
    if real is not None:
        real[:, :2] = True
    found = matching(keys, r, real)
    for i in range(3):
        naive = oracle.match(keys[i], r, None if real is None else real[i])
        assert [sorted(group) for group in naive] == lists(found[i])
        assert len(naive) == n - r
    assert torch.equal(found[1:2], matching(keys[1:2], r, None if real is None else real[1:2])), "rows do not matter"


def test_ties_go_to_the_first():
    keys = torch.ones(1, 8, 4)
    assert lists(matching(keys, 2)[0]) == [[0, 1, 2], [3], [4], [5], [6], [7]]
    assert oracle.match(keys[0], 2) == [[1, 0, 2], [3], [4], [5], [6], [7]]


def test_padding_is_merged_first_and_with_padding():
    g = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 4, 5, generator=g).repeat_interleave(4, dim=1)  # real ones are as alike as can be
    real = torch.arange(16)[None] < 8
    for r in (1, 3, 4, 6, 8):
        for group in lists(matching(keys, r, real)[0]):
            assert len({bool(real[0, token]) for token in group}) == 1
        merged_away = [len(group) - 1 for group in lists(matching(keys, r, real)[0]) if group[0] >= 8]
        assert sum(merged_away) == min(r, 4), "half of the padding goes before anything else"


def test_averages_and_back():
    g = torch.Generator().manual_seed(2)
    states, sizes = torch.randn(2, 12, 5, generator=g), torch.randint(1, 5, (2, 12), generator=g).float()
    sizes[1, [3, 4, 7]] = 0
    groups = torch.stack([matching(torch.randn(1, 12, 4, generator=g), 5)[0] for _ in range(2)])
    groups[1] = torch.tensor([0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 6, 6])  # of padding alone, mixed, of real ones alone
    found, total = merged(states, sizes, groups, 7)
    for i in range(2):
        rows, wanted = oracle.average(states[i], sizes[i].tolist(), lists(groups[i]))
        torch.testing.assert_close(found[i].double(), rows, rtol=1e-5, atol=1e-6)
        assert total[i].tolist() == wanted
    wide = spread(found, groups)
    for i in range(2):
        for token in range(12):
            assert torch.equal(wide[i, token], found[i, groups[i, token]])
    single = torch.arange(12).expand(2, 12)
    assert torch.equal(merged(states, sizes.clamp_min(1), single, 12)[0], states), "nothing merged, nothing changed"


def test_merging_a_mean_keeps_the_mean():
    """The sum of states times sizes is what it was, however often tokens are merged."""
    g = torch.Generator().manual_seed(3)
    states, sizes = torch.randn(1, 33, 4, generator=g).double(), torch.ones(1, 33).double()
    whole = states.sum(1)
    for r in (16, 8, 2):
        n = states.shape[1]
        groups = matching(torch.randn(1, n, 4, generator=g), r)
        states, sizes = merged(states, sizes, groups, n - r)
    assert states.shape[1] == 7 and float(sizes.sum()) == 33
    torch.testing.assert_close((states * sizes[..., None]).sum(1), whole)


@pytest.mark.parametrize("keep", [1.0, 0.75, 0.5, 0.3])
def test_schedules(keep):
    gone = {}
    for name in ("early", "constant", "decreasing"):
        left = [1.0, *shares(12, keep, name)]
        assert left[-1] == keep and left == sorted(left, reverse=True)
        gone[name] = [before - after for before, after in pairwise(left)]
    assert gone["constant"] == pytest.approx([(1 - keep) / 12] * 12)
    assert gone["early"] == pytest.approx([(1 - keep) / 6] * 6 + [0.0] * 6)
    steps = gone["decreasing"]
    assert [a - b for a, b in pairwise(steps)] == pytest.approx([2 * (1 - keep) / 144] * 11), "a line"
    assert steps[-1] == pytest.approx((1 - keep) / 144)
    assert shares(1, keep, "early") == [keep]
    assert shares(4, 0.25, "early") == pytest.approx([0.75, 0.5, 0.25, 0.25]), "a merge halves at most"
    with pytest.raises(ValueError, match="late"):
        shares(3, keep, "late")


def test_counts():
    assert counts(576, shares(24, 0.5, "early"))[-1] == 288
    assert counts(64, [0.75, 0.5]) == [48, 32]
    assert counts(10, [0.1]) == [5], "a matching halves at most"
    assert counts(2, [0.5, 0.25]) == [1, 1]
