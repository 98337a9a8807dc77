"""Wanda and SparseGPT against naive ones, what they promise of any problem, and GPTQ that keeps zeros."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svlm.compress.runtime.grid import on_grid
from svlm.passes.prune._sparse import follows, least, sparsegpt, wanda
from svlm.passes.prune._sparsify import pattern_of
from svlm.passes.quantize._gptq import gptq, layer_error
from tests.oracles import gptq as slow_gptq
from tests.oracles import sparse as oracle

BF16 = torch.bfloat16


def problem(
    out: int = 12, columns: int = 48, tokens: int = 300, dead: tuple[int, ...] = (), seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight and inputs [tokens, columns] whose channels differ in size and depend on each other."""
    make = torch.Generator().manual_seed(seed)
    w = torch.randn(out, columns, generator=make)
    mix = torch.randn(columns, columns, generator=make) * torch.rand(columns, generator=make) ** 2
    x = torch.randn(tokens, columns, generator=make) @ mix
    x[:, list(dead)] = 0
    return w, x


def hessian(x: Tensor) -> Tensor:
    return 2 * x.T @ x / len(x)


def norm(x: Tensor) -> Tensor:
    return x.double().square().mean(0).sqrt()


@pytest.mark.parametrize(("text", "found"), [("unstructured", None), ("2:4", (2, 4)), ("1:8", (1, 8))])
def test_patterns(text: str, found: tuple[int, int] | None) -> None:
    assert pattern_of(text) == found


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "2", "2:", ":4", "a:b", "", "-1:4"])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match="pattern is"):
        pattern_of(text)


@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": (2, 4)}, {"pattern": (1, 8)}])
@pytest.mark.parametrize("dead", [(), (3, 20, 21)])
def test_wanda_equals_the_naive_one(kind: dict[str, object], dead: tuple[int, ...]) -> None:
    w, x = problem(dead=dead)
    given: dict[str, object] = {"sparsity": 0.5, "pattern": None} | kind
    zeros = wanda(w, norm(x), **given)  # type: ignore[arg-type]
    assert torch.equal(w.masked_fill(zeros, 0.0).double(), oracle.wanda(w, x, **kind))


def test_every_row_loses_its_share_and_without_inputs_the_smallest_go() -> None:
    w, x = problem(columns=45)
    assert (wanda(w, norm(x), 0.3, None).sum(1) == round(0.3 * 45)).all()
    blind = wanda(w, torch.zeros(45), 0.3, None)
    assert torch.equal(blind, least(w.abs(), 0.3, None))


@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": (2, 4)}, {"pattern": (1, 8)}])
@pytest.mark.parametrize("dead", [(), (3, 20, 21)])
@pytest.mark.parametrize("blocksize", [16, 32, 128])
def test_sparsegpt_equals_the_naive_one(kind: dict[str, object], dead: tuple[int, ...], blocksize: int) -> None:
    w, x = problem(dead=dead)
    given: dict[str, object] = {"sparsity": 0.5, "pattern": None} | kind
    exact = sparsegpt(w, hessian(x).double(), blocksize=blocksize, **given)  # type: ignore[arg-type]
    wanted = oracle.sparsegpt(w, hessian(x), blocksize=blocksize, **kind)
    torch.testing.assert_close(exact.weight.double(), wanted, rtol=1e-5, atol=1e-6)
    single = sparsegpt(w, hessian(x), blocksize=blocksize, **given)  # type: ignore[arg-type]
    assert (single.zeros == exact.zeros).double().mean() > 0.99
    assert single.error == pytest.approx(exact.error, rel=0.02)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_sparsegpt_errs_less_than_wanda_under_the_same_hessian(seed: int, pattern: tuple[int, int] | None) -> None:
    w, x = problem(out=48, columns=128, tokens=600, seed=seed)
    h = hessian(x)
    solved = sparsegpt(w, h, sparsity=0.5, pattern=pattern)
    chosen = wanda(w, norm(x), 0.5, pattern)
    assert solved.zeros.sum() == chosen.sum() == w.numel() // 2
    assert torch.equal(solved.weight == 0, solved.zeros)
    assert solved.error < 0.9 * layer_error(w, w.masked_fill(chosen, 0.0), h)[1]
    assert solved.error == pytest.approx(layer_error(w, solved.weight, h)[1], rel=1e-5)


@pytest.mark.parametrize("place", [0, 1, 5])
def test_removing_one_weight_is_optimal_brain_surgery(place: int) -> None:
    """Of the columns that are still free: those from `place` on."""
    w, x = problem(out=1, columns=8)
    w[0] += w[0].sign()  # none near 0
    w[0, place] = 1e-3
    h = hessian(x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).double()
    solved = sparsegpt(w, h, sparsity=1 / 8, damp=1e-9)
    assert solved.zeros.nonzero().tolist() == [[0, place]]
    damped = h + 1e-9 * h.diagonal().mean() * torch.eye(8)
    best = w[0].double().clone()
    best[place:] = oracle.obs(w[0, place:], damped[place:, place:], 0)
    assert abs(float(best[place])) < 1e-12
    torch.testing.assert_close(solved.weight[0].double(), best, rtol=1e-6, atol=1e-7)


def test_zeros_that_have_to_stay_count_as_chosen() -> None:
    w, x = problem(out=24)
    gone = wanda(w, norm(x), 0.25, None)
    again = sparsegpt(w.masked_fill(gone, 0.0), hessian(x), sparsity=0.5, gone=gone, blocksize=16)
    assert bool((again.zeros | ~gone).all()), "all of them are among the zeros"
    assert int(again.zeros.sum()) == w.numel() // 2 and not bool(again.weight[gone].any())
    more = wanda(w, norm(x), 0.6, None)
    pattern = sparsegpt(w.masked_fill(more, 0.0), hessian(x), sparsity=0.5, pattern=(2, 4), gone=more, blocksize=16)
    assert follows(pattern.weight, (2, 4)) and not bool(pattern.weight[more].any())
    assert not follows(w, (2, 4)) and not follows(torch.zeros(2, 6), (2, 4)), "6 inputs are no fours"


def test_singular_indefinite_and_absent_hessians() -> None:
    w, x = problem(tokens=5)
    assert sparsegpt(w, hessian(x), sparsity=0.5).retries == 0, "1 % is enough for rank 5"
    indefinite = hessian(x) - 0.05 * hessian(x).diagonal().mean() * torch.eye(48)
    raised = sparsegpt(w, indefinite, sparsity=0.5)
    assert raised.retries == 1 and not raised.fallback and int(raised.zeros.sum()) == w.numel() // 2
    blind = sparsegpt(w, torch.zeros(48, 48), sparsity=0.5)
    assert blind.fallback and torch.equal(blind.weight, w.masked_fill(least(w.abs(), 0.5, None), 0.0))


def test_dead_columns_go_first_and_what_is_left_of_them_stays() -> None:
    dead = tuple(range(0, 48, 4))
    w, x = problem(dead=dead)
    solved = sparsegpt(w, hessian(x), sparsity=0.125, blocksize=48)  # half of the dead weights
    here = solved.weight[:, list(dead)]
    assert int((here == 0).sum()) == w.numel() // 8
    assert torch.equal(here[here != 0], w[:, list(dead)][here != 0])


# ------------------------------------------------------------------------------------------------- GPTQ with a mask


@pytest.mark.parametrize("act_order", ["static", "none"])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, 16, True), (4, 16, False), (3, -1, False)])
def test_gptq_with_a_mask_equals_the_naive_one(act_order: str, bits: int, group: int, symmetric: bool) -> None:
    w, x = problem(dead=(7,))
    mask = wanda(w, norm(x), 0.5, None)
    w, h = w.masked_fill(mask, 0.0), hessian(x)
    kind: dict[str, object] = {"bits": bits, "group": group, "symmetric": symmetric, "dtype": BF16}
    solved = gptq(w, h.double(), act_order=act_order, blocksize=20, mask=mask, **kind)  # type: ignore[arg-type]
    wanted, error = slow_gptq.gptq(w, h, bits, group, symmetric, act_order=act_order == "static", mask=mask)
    assert solved.error == pytest.approx(error, rel=1e-4)
    assert (solved.weight.double() == wanted).double().mean() > 0.999
    assert not bool(solved.weight[mask].any())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_mask_errs_less_than_masking_afterwards(symmetric: bool, refine: int, seed: int) -> None:
    w, x = problem(out=48, columns=128, tokens=600, seed=seed)
    mask = wanda(w, norm(x), 0.5, None)
    w, h = w.masked_fill(mask, 0.0), hessian(x)
    kind: dict[str, object] = {"bits": 4, "group": 32, "symmetric": symmetric, "dtype": BF16, "scale_search": True}
    kept = gptq(w, h, refine=refine, mask=mask, **kind)  # type: ignore[arg-type]
    lost = gptq(w, h, refine=refine, **kind).weight  # type: ignore[arg-type]
    assert not bool(kept.weight[mask].any()) and bool(lost[mask].any())
    assert on_grid(kept.weight, kept.grid)
    assert kept.error < layer_error(w, lost.masked_fill(mask, 0.0), h)[0]
