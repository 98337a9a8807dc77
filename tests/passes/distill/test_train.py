"""The training loop alone, on losses simple enough to follow by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svlm.compress.base import Silent
from svlm.passes.distill._feed import Feed
from svlm.passes.distill._train import Course, Plan, train


def run(parameters: list[nn.Parameter], plan: Plan, lost: Any) -> Course:
    feed = Feed(lambda start: iter(range(start, 1000)))
    return train(parameters, lambda step: (lost(), 1), lambda batch: lost(), feed, [0], plan, Silent())


def test_the_running_mean_is_what_is_validated_and_kept() -> None:
    x = nn.Parameter(torch.tensor([4.0]))
    path: list[Tensor] = []

    def lost() -> Tensor:
        if torch.is_grad_enabled():
            path.append(x.detach().clone())
        return ((x - 1) ** 2).sum()

    steps, average = 20, 0.9
    course = run([x], Plan(steps, 0.5, 0.0, 0.0, average=average), lost)
    mean, means = 4.0, {0: 4.0}
    for step, weights in enumerate(path[1:]):  # after each step but the last
        keep = min(average, (step + 1) / (step + 10))
        mean = keep * mean + (1 - keep) * float(weights)
        means[step + 1] = mean
    assert len(path) == steps and abs(float(path[-1]) - means[steps - 1]) > 0.02
    for step, wanted in means.items():
        if step in course.checks:
            assert course.checks[step] == pytest.approx((wanted - 1) ** 2, abs=1e-5)
    assert course.best[0] > 0 and (float(x.detach()) - 1) ** 2 == pytest.approx(course.best[1], abs=1e-6)


def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    matrix, vector = nn.Parameter(torch.eye(4)), nn.Parameter(torch.ones(4))
    course = run([matrix, vector], Plan(3, 0.1, 0.0, 0.0, "muon"), lambda: (matrix @ vector).square().sum())
    assert course.best[1] < course.checks[0]
    moved = torch.linalg.svdvals(matrix.detach() - torch.eye(4))
    assert 0.05 < float(moved[0]) < 0.4  # three steps of at most 0.1, whatever the gradient's size
    assert 0 < float((vector.detach() - 1).abs().max()) < 0.05
    assert [type(o).__name__ for o in Plan(1, 1, 0, 0, "muon").optimizers([matrix, vector])] == ["Muon", "AdamW"]
    assert [type(o).__name__ for o in Plan(1, 1, 0, 0, "muon").optimizers([vector])] == ["AdamW"]


def test_a_lowest_loss_that_is_luck_does_not_beat_longer_training() -> None:
    noisy = Course(checks={0: 1.0, 10: 0.3, 20: 0.32, 30: 0.5}, parts={
        0: [1.0, 1.0, 1.0], 10: [0.1, 0.3, 0.5], 20: [0.3, 0.2, 0.46], 30: [0.3, 0.5, 0.7],
    })  # fmt: skip
    assert noisy.best == (20, 0.32)  # 30 is worse in every batch by as much
    worse = Course(checks={0: 0.31, 10: 0.3, 20: 0.32}, parts={0: [0.3, 0.32], 10: [0.1, 0.5], 20: [0.3, 0.34]})
    assert worse.best == (10, 0.3)  # no worse than the lowest, but than the untrained
    single = Course(checks={0: 1.0, 10: 0.3, 20: 0.3001}, parts={0: [1.0], 10: [0.3], 20: [0.3001]})
    assert single.best == (10, 0.3)
    untrained = Course(checks={0: 0.2, 10: 0.3}, parts={0: [0.1, 0.3], 10: [0.5, 0.1]})
    assert untrained.best == (0, 0.2)
