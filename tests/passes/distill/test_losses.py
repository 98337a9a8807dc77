"""Losses against loops; LoRA against its merged weight."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from svlm.passes.distill._feed import epochs, held_out, split
from svlm.passes.distill._lora import adapted, merge
from svlm.passes.distill._losses import Divergence, answer_positions, divergence, nearest_pairs, state_distance
from svlm.passes.distill._train import rate
from tests.oracles.distill import distance, greedy_pairs, masked

KINDS: tuple[Divergence, ...] = ("forward", "reverse", "skewed", "skewed_reverse")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("temperature, skew", [(1.0, 0.1), (2.5, 0.6)])
def test_masked_divergences_equal_the_loop(kind: Divergence, shifted: bool, temperature: float, skew: float) -> None:
    student, teacher = torch.randn(3, 7, 11) * 3, torch.randn(3, 7, 11) * 3
    labels = torch.randint(0, 11, (3, 7))
    labels[0, :4] = -100
    labels[1, 2] = -100
    labels[2, 5:] = -100
    where = answer_positions(labels, shifted=shifted)
    found = divergence(student[where], teacher[where], kind, temperature, skew)
    wanted = masked(student, teacher, labels, temperature, shifted, kind, skew)
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert float(divergence(teacher[where], teacher[where], kind, temperature)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_divergence_is_its_slope(kind: Divergence) -> None:
    student, teacher = torch.randn(2, 3, 5).double()
    leaf = student.float().requires_grad_(True)
    divergence(leaf, teacher.float(), kind, 1.5).backward()
    assert leaf.grad is not None
    labels = torch.zeros(1, 3, dtype=torch.long)
    for place in ((0, 0), (1, 3), (2, 4)):
        step = torch.zeros_like(student)
        step[place] = 1e-5
        ends = [masked(s[None], teacher[None], labels, 1.5, False, kind, 0.1) for s in (student + step, student - step)]
        assert float(leaf.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_divergences_stay_finite_where_a_model_is_sure() -> None:
    sure = torch.tensor([[300.0, 0.0, -300.0]])
    other = torch.tensor([[-300.0, 0.0, 300.0]], requires_grad=True)
    for kind in KINDS:
        loss = divergence(other, sure, kind)
        (gradient,) = torch.autograd.grad(loss, other)
        assert bool(torch.isfinite(loss)) and bool(torch.isfinite(gradient).all())
    assert float(divergence(other.detach(), sure, "skewed")) == pytest.approx(math.log(10), rel=1e-4), (
        "bounded by -log a"
    )


def test_kl_is_computed_in_fp32_and_its_gradient_is_the_difference_of_probabilities() -> None:
    student = torch.randn(4, 9, dtype=torch.bfloat16).requires_grad_(True)
    teacher = torch.randn(4, 9, dtype=torch.bfloat16)
    loss = divergence(student, teacher)
    assert loss.dtype == torch.float32
    loss.backward()
    wanted = (student.float().softmax(-1) - teacher.float().softmax(-1)) / 4
    assert student.grad is not None
    torch.testing.assert_close(student.grad.float(), wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_distances_of_states_equal_the_loop(kind: Any) -> None:
    teacher = torch.randn(6, 9) * torch.tensor([1, 1, 100.0, 1, 0.01, 1])[:, None]
    student = teacher + torch.randn(6, 9) * teacher.std(-1, keepdim=True)
    found = float(state_distance(student, teacher, kind))
    assert found == pytest.approx(distance(student, teacher, kind), rel=1e-5)
    assert found == pytest.approx(float(state_distance(student * 7, teacher * 7, kind)), rel=1e-4), "free of scale"
    assert float(state_distance(teacher, teacher, kind)) == pytest.approx(0, abs=1e-6)
    assert bool(torch.isfinite(state_distance(student, torch.zeros_like(teacher), "cosine")))


def test_nearest_pairs_equal_the_loop_and_find_twins() -> None:
    student, teacher = torch.randn(5, 7), torch.randn(9, 7)
    found = nearest_pairs(student, teacher)
    assert found.tolist() == greedy_pairs(student, teacher) and len(set(found.tolist())) == 5
    order = torch.randperm(9)[:6]
    assert torch.equal(nearest_pairs(teacher[order] + 0.05 * torch.randn(6, 7), teacher), order)
    assert nearest_pairs(teacher[:0], teacher).tolist() == []


def test_lora_starts_as_nothing_and_merges_to_what_it_computed() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5, bias=False))
    linears = [m for m in model if isinstance(m, nn.Linear)]
    x = torch.randn(4, 6)
    plain, weights = model(x), [m.weight.clone() for m in linears]
    with adapted(linears, 2, torch.Generator().manual_seed(0)) as adapters:
        torch.testing.assert_close(model(x), plain)
        for adapter in adapters:
            nn.init.normal_(adapter.up)
        beside = model(x)
        assert not torch.allclose(beside, plain, atol=1e-2)
        assert all(torch.equal(m.weight, w) for m, w in zip(linears, weights))
        merge(adapters)
    assert not any("forward" in vars(m) for m in linears)
    torch.testing.assert_close(model(x), beside)
    for linear, before in zip(linears, weights):
        assert int(torch.linalg.matrix_rank(linear.weight - before, rtol=1e-4)) == 2


def test_rate_rises_then_falls_to_nothing() -> None:
    rates = [rate(step, 20, 0.2) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert all(a > b for a, b in pairwise(rates[4:])) and rates[-1] < 0.02
    assert rate(0, 10, 0.0) == 1.0


def test_held_out_batches_are_never_trained_on() -> None:
    batches = [{"labels": torch.tensor([[i]])} for i in range(23)]
    learn, check = held_out(batches)
    assert len(check) == 2 and len(learn) == 21
    assert not {id(b) for b in learn} & {id(b) for b in check}
    assert held_out(batches[:1]) == (batches[:1], batches[:1])
    seen = epochs(learn, seed=3)
    first, second = [next(seen) for _ in learn], [next(seen) for _ in learn]
    assert {id(b) for b in first} == {id(b) for b in second} == {id(b) for b in learn}
    assert [id(b) for b in first] != [id(b) for b in second]


def test_batches_are_split_by_sample_or_left_whole() -> None:
    batch = {"labels": torch.arange(5)[:, None], "pixel_values": torch.arange(5)[:, None] * 2}
    parts = split(batch, 2)
    assert [len(p["labels"]) for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p["pixel_values"] for p in parts]), batch["pixel_values"])
    patches = {"labels": torch.zeros(5, 3), "pixel_values": torch.zeros(80, 7)}
    assert split(patches, 2) == [patches]
