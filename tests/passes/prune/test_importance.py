"""Importance scores against loops."""

from __future__ import annotations

import pytest
import torch

from svlm.passes.prune._importance import AbsMean, HeadNorm, best, best_heads, fewer_heads, magnitude, narrower, taylor


def test_running_means_equal_the_loop() -> None:
    x = [torch.randn(n, 6) for n in (3, 5, 1)]
    w = [torch.rand(len(t)) for t in x]
    w[1][2] = 0
    stat, heads = AbsMean(), HeadNorm(3)
    for rows, weights in zip(x, w):
        stat.update(rows, weights)
        heads.update(rows, weights)
    stat.update(torch.full((2, 6), 9.0), torch.zeros(2))
    total = float(sum(t.sum() for t in w))
    for channel in range(6):
        loop = sum(float(w[b][t]) * abs(float(x[b][t, channel])) for b in range(3) for t in range(len(x[b]))) / total
        assert float(stat.mean[channel]) == pytest.approx(loop, rel=1e-6)
    for head in range(2):
        norms = [
            float(w[b][t]) * float(x[b][t, head * 3 : head * 3 + 3].norm()) for b in range(3) for t in range(len(x[b]))
        ]
        assert float(heads.mean[head]) == pytest.approx(sum(norms) / total, rel=1e-6)


def test_magnitude_is_the_norm_of_all_that_belongs_to_a_group() -> None:
    up, down = torch.randn(6, 5), torch.randn(4, 6)
    scores = magnitude([(up, 0), (down, 1)], 3)
    for group in range(3):
        mine = torch.cat([up[2 * group : 2 * group + 2].flatten(), down[:, 2 * group : 2 * group + 2].flatten()])
        assert float(scores[group]) == pytest.approx(float(mine.norm()), rel=1e-6)


def test_taylor_is_the_derivative_along_the_channels_output() -> None:
    weight, x = torch.randn(4, 6, requires_grad=True), torch.randn(7, 6)
    gate = torch.ones(6, requires_grad=True)
    loss = ((x * gate) @ weight.T).tanh().sum()
    g_weight, g_gate = torch.autograd.grad(loss, [weight, gate])
    torch.testing.assert_close(taylor([(weight, g_weight)], 6).float(), g_gate.abs())


@pytest.mark.parametrize(
    "size, ratio, multiple, wanted",
    [(768, 0.33, 64, 512), (768, 0.3, 64, 512), (768, 0.3, 1, 538), (48, 0.5, 4, 24), (48, 0.3, 64, 64),
     (3, 0.33, 1, 2), (2, 0.25, 1, 1), (1, 0.9, 1, 1), (100, 0.99, 64, 64), (10, 0.05, 1, 9)],
)  # fmt: skip
def test_widths_round_to_the_nearest_multiple(size: int, ratio: float, multiple: int, wanted: int) -> None:
    assert narrower(size, ratio, multiple) == wanted


def test_choices_are_ascending_and_stable() -> None:
    assert best(torch.tensor([1.0, 3.0, 3.0, 0.0, 2.0]), 3) == [1, 2, 4]
    assert best(torch.zeros(5), 2) == [0, 1]


def test_groups_go_whole_or_lose_equally() -> None:
    scores = torch.tensor([5.0, 0.0, 1.0, 2.0, 9.0, 0.0])  # three groups of two query heads
    assert best_heads(scores, 3, 4, 2) == [0, 1, 4, 5]
    assert best_heads(scores, 3, 3, 3) == [0, 3, 4]


def test_head_counts_are_near_the_ratio_or_not_at_all() -> None:
    assert fewer_heads(6, 3, 1 / 3)[0] == (4, 2)
    assert fewer_heads(8, 2, 0.25)[0] == (6, 2), "one query head of each group"
    assert fewer_heads(4, 2, 0.25) == [(2, 1), (2, 2)]
    assert fewer_heads(4, 1, 0.25) == [(3, 1), (2, 1)]
    assert fewer_heads(4, 2, 0.05) == [] and fewer_heads(1, 1, 0.9) == []
