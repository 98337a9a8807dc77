"""quantize.awq: the search against naive loops; folding keeps the function in every family; promises, kills, edges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from svlm.calib.stats import Hessian, MeanAbs
from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.anatomy import view_of
from svlm.compress.base import Notes
from svlm.compress.errors import PromiseBroken, Unmet
from svlm.compress.runtime.grid import dequantize, on_grid, quantize
from svlm.passes import find
from svlm.passes.quantize._awq import candidates, clipped_grid, output_loss, weight_means
from svlm.passes.quantize._fold import fold, gain_offset, pairs_of
from svlm.passes.quantize.awq import AWQ, UNCLIPPED
from svlm.passes.quantize.rtn import RTN
from tests import zoo
from tests.oracles import awq as oracle
from tests.passes.quantize.helpers import BF16, batches, check_resumes, fresh, run


def logits(model: Any, data: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten() for batch in data])


# ------------------------------------------------------------------------------------------------------------ the maths


@pytest.mark.parametrize("duo", [False, True])
def test_scales_equal_the_naive_ones(duo: bool) -> None:
    make = torch.Generator().manual_seed(0)
    x, w = torch.rand(16, generator=make) ** 3, torch.randn(6, 16, generator=make)
    x[5] = 0
    means = weight_means(w, 8)
    torch.testing.assert_close(means.double(), oracle.relative_weights(w, 8), rtol=1e-5, atol=1e-6)
    found = candidates(x, means, 10, "duo" if duo else "activation")
    assert torch.equal(found[0], torch.ones(16)) and all(float(s[5]) == 1 for s in found)
    ratios = range(0 if duo else 1, 10)
    assert len(found) == 1 + len(ratios)
    for ratio, scale in zip(ratios, found[1:], strict=True):
        torch.testing.assert_close(scale.double(), oracle.scales(x, means, ratio / 10, duo), rtol=1e-4, atol=1e-5)
    assert len(candidates(x, means, 10, "both")) == 1 + 9 + 10
    for nothing in (torch.zeros(16), torch.full((16,), float("nan"))):
        assert len(candidates(nothing, means, 10, "both")) == 1


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(3, 8, True), (3, 8, False), (4, 16, True), (2, 8, False)])
def test_the_clip_search_equals_the_naive_one(bits: int, group: int, symmetric: bool) -> None:
    make = torch.Generator().manual_seed(bits)
    w = torch.randn(5, 16, generator=make) * torch.rand(16, generator=make).add(0.2)
    w[2] *= torch.tensor([6.0, *[1.0] * 15])
    x, weights = torch.randn(40, 16, generator=make), torch.rand(40, generator=make)
    stat = Hessian()
    stat.update(x, weights)
    grid, share = clipped_grid(w, stat.matrix, bits, group, symmetric, BF16)
    wanted, least = oracle.clip(w, x, weights, bits, group, symmetric)
    difference = (dequantize(quantize(w, grid), grid) - w).reshape(5, -1, group)
    per_group = torch.einsum("tgc,ogc->tog", x.reshape(40, -1, group), difference).square()
    found = (weights[:, None, None] * per_group).sum(0)
    torch.testing.assert_close(found.double(), least.double(), rtol=2e-3, atol=1e-6)
    assert share == pytest.approx(float((wanted < 1).float().mean()), abs=0.11) and 0 < share <= 1
    plain, none = clipped_grid(w, None, bits, group, symmetric, BF16)
    assert none == 0 and not torch.equal(plain.scale, grid.scale)
    for useless in (torch.zeros(16, 16), torch.full((16, 16), float("nan"))):
        assert torch.equal(clipped_grid(w, useless, bits, group, symmetric, BF16)[0].scale, plain.scale)


def test_mean_absolute_inputs_and_the_loss_weigh_tokens_and_ignore_padding() -> None:
    make = torch.Generator().manual_seed(0)
    x, weights = torch.randn(12, 4, generator=make), torch.tensor([0.0, 1.0, 2.0] * 4)
    stat = MeanAbs()
    for part in (slice(0, 5), slice(5, 12)):
        stat.update(x[part], weights[part])
    torch.testing.assert_close(stat.mean, (x.abs() * weights[:, None]).sum(0).double() / 12, rtol=1e-6, atol=1e-7)
    wanted = x.reshape(2, 6, 4)
    found = wanted.clone()
    found[0, 0] = float("nan")  # padding
    found[1, 1, 2] += 3.0
    loss, whole = output_loss(found, wanted, weights.reshape(2, 6))
    assert loss == pytest.approx(9 * float(weights[7]), rel=1e-5) and whole == 12.0


# ------------------------------------------------------------------------------------------------------------- folding


def test_what_a_norm_adds_to_its_weight_is_found_by_running_it() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight.square()

    assert gain_offset(nn.LayerNorm(8)) == 0 == gain_offset(LlamaRMSNorm(8)) and gain_offset(Gemma3RMSNorm(8)) == 1
    assert gain_offset(Odd()) is None and gain_offset(nn.LayerNorm(8, elementwise_affine=False)) is None


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_without_rounding_the_logits_stay_in_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view, data = view_of(zoo.model(family)), [zoo.batch(family)]
    view.storage_dtype = torch.float32
    before, norms = logits(view.model, data), copy.deepcopy(view.model.state_dict())
    parts = tuple(p for p in ("vision", "connector", "language") if any(u.linears for u in view.parts.get(p, ())))
    step = AWQ(bits=3, group=-1, where=parts, steps=4)
    walk = Walk(view, data, parts)
    rows = []
    for unit in walk:
        rows += step._scale(view, unit)  # all of the pass but the rounding
    assert {row["skipped"] for row in rows} <= {None} and sum(row["after"] < row["before"] for row in rows) >= 3
    changed = [k for k, v in view.model.state_dict().items() if not torch.equal(v, norms[k])]
    assert len(changed) >= 6
    after = logits(view.model, data)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


def test_saving_the_norms_in_few_bits_does_not_change_the_function() -> None:
    """In float32 containers, rounded to bfloat16: the linears are scaled by what the norm became."""
    for family in ("llava", "gemma3"):
        view, data = fresh(family), [zoo.batch(family)]
        before = logits(view.model, data)
        for unit in view.units:
            for pair in pairs_of(view, unit, unit.linears):
                writer = view.model.get_submodule(pair.source)
                if not isinstance(writer, nn.Linear) and getattr(writer, "bias", None) is None:
                    width = pair.targets[0].module.in_features
                    fold(view, pair, torch.rand(width, generator=torch.Generator().manual_seed(width)) * 3 + 0.2)
                    assert torch.equal(writer.weight, writer.weight.to(BF16).float())
        torch.testing.assert_close(logits(view.model, data), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def test_pairs_that_cannot_be_scaled_are_skipped_and_counted() -> None:
    view, notes = run(AWQ(bits=4, group=8, where=("language.blocks[0].attn.q",)))
    assert notes.numbers["pairs_skipped"] == {"a linear with the same input is not selected": 1}
    assert notes.numbers["linears"] == 1 and notes.numbers["pairs_scaled"] == notes.numbers["linears_in_a_pair"] == 0
    original = fresh().model.state_dict()
    changed = [k for k, v in view.model.state_dict().items() if not torch.equal(v, original[k])]
    assert changed == ["model.language_model.layers.0.self_attn.q_proj.weight"], "no norm, no neighbour"
    view, _ = run(RTN(bits=4, group=8, where=("language.blocks[0].mlp.up",)))
    _, notes = run(AWQ(bits=4, group=8, where=("language.blocks[0].mlp.down",)), view)
    assert notes.numbers["pairs_skipped"] == {"the linear before is quantized already": 1}
    storage.round_to_storage(view)
    assert all(on_grid(view.linear(path).module.weight, grid) for path, grid in view.grids.items())


# ------------------------------------------------------------------------------------------------------------- the pass


def distance(step: Any) -> tuple[float, Notes]:
    view, notes = run(step)
    storage.round_to_storage(view)
    real = torch.cat([b["attention_mask"].bool().flatten() for b in batches()])
    found, wanted = (logits(m, batches()).reshape(len(real), -1)[real] for m in (view.model, fresh().model))
    return float((found - wanted).square().mean()), notes


@pytest.mark.slow
def test_scaling_clipping_and_the_solver_each_lower_the_error() -> None:
    kind: dict[str, Any] = {"bits": 3, "group": 8}
    nearest, _ = distance(RTN(**kind, search="none"))
    scaled, notes = distance(AWQ(**kind, clip=False))
    clipped, more = distance(AWQ(**kind))
    solved, _ = distance(AWQ(**kind, solver="gptq"))
    assert scaled < nearest and clipped < 0.9 * nearest and solved < 0.8 * clipped
    assert notes.numbers["mean_clipped_groups"] == 0 < more.numbers["mean_clipped_groups"] < 1
    assert 0 < notes.numbers["mean_loss_after_scaling"] < 1 and notes.numbers["pairs_scaled"] > 6
    assert notes.numbers["without_statistics"] == 0


def test_q_and_k_are_not_clipped() -> None:
    view, _ = run(AWQ(bits=3, group=8, where=("language.blocks[0]",), scaling="activation"))
    plain, _ = run(AWQ(bits=3, group=8, where=("language.blocks[0]",), scaling="activation", clip=False))
    for ref in view.linears("language.blocks[0]"):
        same = torch.equal(view.grids[ref.path].scale, plain.grids[ref.path].scale)
        assert same == (ref.role in UNCLIPPED), ref.path


def test_token_weights_reach_the_scales() -> None:
    where = ("language.blocks[0].attn",)
    found = {m: run(AWQ(bits=3, group=8, where=where, token_weights=m))[0] for m in ("balanced", "uniform", "text")}
    norm = "model.language_model.layers.0.input_layernorm.weight"
    kept = [view.model.state_dict()[norm] for view in found.values()]
    grids = [view.grids["model.language_model.layers.0.self_attn.o_proj"].scale for view in found.values()]
    assert not torch.equal(grids[0], grids[2]) and not torch.equal(grids[1], grids[2])
    assert not all(torch.equal(a, kept[0]) for a in kept[1:])


def test_a_linear_that_no_token_reaches_and_channels_without_input() -> None:
    view = fresh()
    block = next(unit for unit in view.units if unit.name == "language.blocks[1]").module
    block.post_attention_layernorm.weight.data.zero_()
    block.input_layernorm.weight.data[:3] = 0
    _, notes = run(AWQ(bits=4, group=8, where=("language",)), view)
    assert notes.numbers["without_statistics"] == 3, "gate, up, down"
    assert notes.numbers["pairs_skipped"] == {"no token with finite values reaches it": 2}
    assert all(t.isfinite().all() for t in view.model.state_dict().values())


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_promise_and_saving(solver: Any, tmp_path: Path) -> None:
    step = AWQ(bits=3, group=8, solver=solver, steps=4)
    view, _ = run(step)
    storage.round_to_storage(view)
    step.ensures(view)
    storage.save(view, tmp_path / "m")
    again = storage.load_model(tmp_path / "m", find=find)
    assert torch.equal(logits(again.model, batches()), logits(view.model, batches()))
    step.ensures(again)
    ref = view.linears("vision.blocks[1].mlp")[0]
    ref.module.weight.data[0, :4] *= 1.07
    with pytest.raises(PromiseBroken, match="3-bit grid") as caught:
        step.ensures(view)
    assert caught.value.where == ref.path


def test_settings_and_refusals() -> None:
    for bad in ({"bits": 5}, {"steps": 0}, {"group": 0}):
        with pytest.raises(ValueError, match=r"bits|steps|group"):
            AWQ(**bad)
    with pytest.raises(Unmet, match="needs calibration data"):
        run(AWQ(group=8), data=[])
    with pytest.raises(Unmet, match="does not divide"):
        run(AWQ(group=16))
    assert [AWQ(bits=2).weaker(), AWQ(bits=8).weaker()] == [AWQ(bits=3), None]


def test_a_killed_pass_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    step = AWQ(bits=3, group=8, steps=4)
    check_resumes(step, 5, tmp_path)
