"""quantize.smooth and quantize.static: the formulas against naive ones, folding in every family, promises, kills."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from svlm.calib.stats import AbsMax, Extremes, Histogram, modality_weights
from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.anatomy import ModelView, TokenMasks
from svlm.compress.base import Context
from svlm.compress.errors import PromiseBroken, Unmet, WorkFailed
from svlm.compress.pipeline import apply_pass
from svlm.compress.runtime.activations import Activation, install, installed, remove
from svlm.passes import find
from svlm.passes.quantize._fold import fold, joined, pairs_of
from svlm.passes.quantize._range import SHRINKS, Spread, best_activation, squared_error, tensor_activation
from svlm.passes.quantize._smooth import joint_maxima, smoothing_scale
from svlm.passes.quantize._w8a8 import RoundingError
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.quantize.rtn import RTN
from svlm.passes.quantize.smooth import Smooth
from svlm.passes.quantize.static import Static
from tests import zoo
from tests.oracles import int8 as oracle
from tests.passes.quantize.helpers import BF16, batches, check_resumes, fresh, run


def logits(model: Any, data: list[Any]) -> torch.Tensor:
    """Of all tokens that are none of padding."""
    found = []
    for batch in data:
        with torch.no_grad():
            out = model(**batch).logits
        mask = batch.get("attention_mask")
        found.append(out[mask.bool()] if mask is not None and mask.shape == out.shape[:2] else out.flatten(0, 1))
    return torch.cat(found)


def spread(x: torch.Tensor, weights: torch.Tensor) -> Spread:
    order = x.argsort()
    return Spread(x[order].double(), weights[order].double(), float(x.min()), float(x.max()))


# ------------------------------------------------------------------------------------------------------------ the maths


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_scales_equal_the_formula(alpha: float) -> None:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(20, 8, generator=make) * torch.tensor([1, 40, 1, 1, 0, 1, 0.1, 1])
    weights = [torch.randn(5, 8, generator=make), torch.randn(3, 8, generator=make)]
    for w in weights:
        w[:, 6] = 0
    found = smoothing_scale(x.abs().amax(0), torch.cat(weights).abs().amax(0), alpha)
    torch.testing.assert_close(found, torch.tensor(oracle.smoothquant(x, weights, alpha)), rtol=1e-5, atol=1e-6)
    assert found[4] == 1 == found[6], "no input, no weights"


def test_maxima_of_two_modalities_hide_neither() -> None:
    make = torch.Generator().manual_seed(1)
    text = torch.randn(9, 6, generator=make)
    text[:, 2] *= 30
    vision = 50 * torch.randn(30, 6, generator=make)
    vision[:, 4] *= 10
    tops = vision.abs().amax(0), text.abs().amax(0)
    for weight in (1.0, 0.04):
        wanted = torch.tensor(oracle.profile(vision, text, weight))
        torch.testing.assert_close(joint_maxima(*tops, weight), wanted, rtol=1e-5, atol=1e-5)
    plain, joint = torch.maximum(*tops), joint_maxima(*tops, 1.0)
    assert joint[2] / joint.median() > 4 > plain[2] / plain.median(), "text's outlier channel is seen"
    assert joint[4] / joint.median() > 4
    assert torch.equal(joint_maxima(torch.zeros(0), tops[1], 1.0), tops[1])
    assert torch.equal(joint_maxima(tops[0], torch.zeros(6), 1.0), tops[0])


def test_the_range_with_the_least_error_is_found() -> None:
    make = torch.Generator().manual_seed(2)
    x = torch.randn(400, generator=make).exp() - 0.3
    x[0], x[1] = 40.0, -9.0
    weights = torch.rand(400, generator=make)
    weights[0] = 1e-3
    best = best_activation(spread(x, weights), torch.float32)
    found = squared_error(spread(x, weights), best)
    whole = squared_error(spread(x, weights), tensor_activation(float(x.min()), float(x.max()), torch.float32))
    assert found == pytest.approx(
        float((oracle.per_tensor(x, best.scale, best.zero) - x).double().square() @ weights.double()), rel=1e-4
    )
    assert found <= 1.05 * oracle.best_range(x, weights, list(SHRINKS[:33:4])) and found < 0.9 * whole
    assert best.limits[1] < 39


def test_plain_ranges_hold_zero_and_both_ends() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 3.0), (-4.0, -1.0), (0.0, 0.0)):
        activation = tensor_activation(low, high, BF16)
        bottom, top = activation.limits
        slack = 0.51 * activation.scale + 0.005 * (high - low)
        assert bottom <= min(low, 0) + slack and top >= max(high, 0) - slack and -128 <= activation.zero <= 127
        assert activation.scale == float(torch.tensor(activation.scale).to(BF16)), "as the checkpoint stores it"
        assert float(activation.round(torch.zeros(1))) == 0


def test_statistics_count_tokens_by_weight_and_leave_padding_out() -> None:
    make = torch.Generator().manual_seed(3)
    x, weights = torch.randn(40, 5, generator=make), torch.tensor([0.0, 1.0, 2.0, 1.0] * 10)
    x[0] = 1e6
    channels = torch.rand(5, generator=make)
    ends, bins = Extremes(), Histogram(-4.0, 4.0, channels, bins=64)
    error = RoundingError(Activation(), channels)
    for part in (slice(0, 9), slice(9, 40)):
        for stat in (ends, bins, error):
            stat.update(x[part], weights[part])
    real = x[weights > 0]
    assert torch.equal(ends.low, real.amin(0)) and torch.equal(ends.high, real.amax(0))
    assert torch.equal(ends.largest, real.abs().amax(0)) and ends.tokens == 30
    assert int(bins.values.sum()) == real.numel()
    assert float(bins.weight.sum()) == pytest.approx(float(weights.sum() * channels.sum()), rel=1e-5)
    second = (weights[weights > 0][:, None] * channels * real.square()).sum()
    assert float(bins.weight @ bins.centres.square()) == pytest.approx(float(second), rel=0.02)
    wanted = (weights[weights > 0][:, None] * channels * (oracle.per_token(real) - real).square()).sum()
    assert float(error.error.sum()) == pytest.approx(float(wanted), rel=0.02)
    assert float(error.whole.sum()) == pytest.approx(float(second), rel=1e-4)
    masks = TokenMasks(*(torch.tensor([row]).bool() for row in ([1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1])))
    assert modality_weights(masks, "vision").tolist() == [[1.0, 0.0, 0.0]]


# ------------------------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_without_rounding_the_logits_stay_in_every_family(family: str) -> None:
    view, data = fresh(family, torch.float32), [zoo.batch(family)]
    parts = tuple(p for p in ("vision", "connector", "language") if any(u.linears for u in view.parts.get(p, ())))
    before, state = logits(view.model, data), copy.deepcopy(view.model.state_dict())
    moved = 0
    for unit in Walk(view, data, parts):
        pairs = [pair for pair in pairs_of(view, unit.unit, unit.linears) if pair.obstacle is None]
        if not pairs:
            continue
        maxima = unit.observe(AbsMax, [pair.targets[0] for pair in pairs], "uniform")
        for pair in pairs:
            scale = smoothing_scale(maxima[pair.targets[0]].value, joined(pair.targets).abs().amax(0), 0.5)
            fold(view, pair, scale)
            moved += 1
    assert moved and any(not torch.equal(t, state[name]) for name, t in view.model.state_dict().items())
    torch.testing.assert_close(logits(view.model, data), before, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- the passes


def outliers(view: ModelView, by: float = 60.0) -> ModelView:
    """Give a norm's outputs channels that stand far out, as large models have, without changing the function."""
    for unit in view.units:
        if unit.part == "language" and unit.mlp:
            norm = unit.stages[0][0].norm
            assert norm is not None
            view.model.get_submodule(norm).weight.data[:2] *= by
            for ref in unit.stages[0]:
                ref.module.weight.data[:, :2] /= by
    return view


def distance(step: Any, family: str = "llava") -> float:
    view = outliers(fresh(family))
    wanted = logits(view.model, batches(family))
    run(step, view, batches(family))
    return float((logits(view.model, batches(family)) - wanted).square().mean())


def test_smoothing_pays_where_channels_stand_out() -> None:
    where = ("language.blocks[:2]",)
    rough, smoothed, searched = (
        distance(Static(where=where, alpha=alpha, token_weights="uniform")) for alpha in ("none", 0.5, "search")
    )
    assert smoothed < 0.5 * rough and searched < 0.5 * rough
    assert distance(Smooth(where=where, alpha=0.5, token_weights="uniform")) < smoothed


def test_what_is_reported_and_recorded() -> None:
    view, notes = run(Smooth(where=("connector", "language.blocks[:1]")), data=batches()[:1])
    numbers = notes.numbers
    assert set(view.activations) == set(view.grids) == set(notes.record["activations"])
    assert numbers["linears"] == len(view.grids) == 9 and numbers["linears_no_token_reaches"] == 0
    assert sum(numbers["pairs_by_alpha"].values()) == 3 and numbers["pairs_skipped"] == {}
    assert numbers["mean_loss_after_smoothing"] <= 1 and numbers["worst_linear"] in view.grids
    assert 0 < numbers["mean_relative_error"] <= numbers["worst_relative_error"] < 0.01
    assert all((g.bits, g.group, g.symmetric) == (8, -1, True) for g in view.grids.values())
    assert set(view.activations.values()) == {Activation()}
    fixed, plain = run(Static(range="max", alpha="none")), run(Static(alpha="none"))
    assert fixed[1].numbers["most_clipped_share"] == 0 and fixed[1].numbers["mean_range_kept"] > 0.99
    assert plain[1].numbers["mean_relative_error"] <= fixed[1].numbers["mean_relative_error"]
    assert {path.split(".")[1] for path in plain[0].activations} == {"vision_tower", "multi_modal_projector"}
    for unit in plain[0].parts["vision"]:
        for stage in unit.stages:
            assert len({installed(ref.module) for ref in stage}) == 1, "linears with the same input share its range"


def test_token_weights_reach_the_scales() -> None:
    norm = "model.language_model.layers.0.input_layernorm.weight"
    step = {m: Smooth(where=("language.blocks[0].attn",), alpha=0.5, token_weights=m) for m in ("uniform", "text")}
    step["balanced"] = Smooth(where=("language.blocks[0].attn",), alpha=0.5, token_weights="balanced")
    found = [run(s)[0].model.state_dict()[norm] for s in step.values()]
    assert all(not torch.equal(found[i], found[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_later_passes_see_rounded_inputs() -> None:
    """Statistics are of the rounded input; a unit that is a linear itself hands on what it makes of a rounded one."""
    view, data = fresh("blip-2"), [zoo.batch("blip-2")]
    projection = view.linears("connector.language_projection")[0]
    coarse = Activation("tensor", 0.5, 0)
    found: list[torch.Tensor] = []

    class Seen:
        def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
            found.append(x)

    for unit in Walk(view, data, ("connector", "language")):
        if unit.unit.module is projection.module:
            install(projection.module, coarse)
        if unit.name == "language.blocks[0]":
            unit.observe(Seen, unit.stages[0][:1], "uniform")
    walked, found = found, []
    for unit in Walk(view, data, ("language.blocks[0]",)):
        unit.observe(Seen, unit.stages[0][:1], "uniform")
    torch.testing.assert_close(torch.cat(walked), torch.cat(found), rtol=1e-4, atol=1e-5)
    found = []
    for unit in Walk(view, data, ("connector.language_projection",)):
        unit.observe(Seen, [projection], "uniform")
    assert all(torch.equal(x, coarse.round(x)) for x in found)


def test_other_passes_go_on_beside_it(tmp_path: Path) -> None:
    view, data = run(Static(where=("vision",), alpha="none"))[0], batches()
    vision = dict(view.activations)
    apply_pass(
        GPTQ(bits=4, group=16, where=("language",)),
        view,
        Context(data, lambda where=None, **o: Walk(view, data, where, **o), nullcontext),
    )
    assert view.activations == vision and len(view.grids) > len(vision)
    wanted = logits(view.model, data)
    storage.save(view, tmp_path / "m")
    again = storage.load_model(tmp_path / "m", find=find)
    assert again.activations == vision and torch.equal(logits(again.model, data), wanted)
    ledger = tmp_path / "m" / "svlm.json"
    scale = next(iter(vision.values())).scale
    ledger.write_text(ledger.read_text().replace(f'"scale": {scale},', f'"scale": {2 * scale},', 1))
    other = storage.load_model(tmp_path / "m", find=find)
    assert other.activations != vision and storage.fingerprint(other) != storage.fingerprint(again)
    with pytest.raises(Unmet, match="quantized already"):
        Smooth().requires(view, Context(data, lambda: None, nullcontext))


@pytest.mark.parametrize("step", [Smooth(alpha=0.5), Static(alpha=0.5)])
def test_promise_and_saving(step: Any, tmp_path: Path) -> None:
    view, _ = run(step)
    step.ensures(view)
    wanted = logits(view.model, batches())
    storage.save(view, tmp_path / "m")
    again = storage.load_model(tmp_path / "m", find=find)
    assert again.activations == view.activations and torch.equal(logits(again.model, batches()), wanted)
    step.ensures(again)
    path = next(iter(view.activations))
    remove(view.model.get_submodule(path))
    with pytest.raises(PromiseBroken, match="inputs of 8 bits") as caught:
        step.ensures(view)
    assert caught.value.where == path
    again.linear(path).module.weight.data[0, :3] *= 1.07
    with pytest.raises(PromiseBroken, match="8-bit grid"):
        step.ensures(again)


def test_edges() -> None:
    view = fresh()
    block = next(unit for unit in view.units if unit.name == "vision.blocks[1]").module
    block.layer_norm2.weight.data.zero_()
    block.layer_norm2.bias.data.zero_()
    view, notes = run(Static(where=("vision",), alpha=0.5), view)
    assert notes.numbers["pairs_skipped"] == {"no token with finite values reaches it": 1}
    assert view.activations["model.vision_tower.encoder.layers.1.mlp.fc1"].scale == 1.0
    assert all(t.isfinite().all() for t in view.model.state_dict().values())
    partial = run(Smooth(where=("vision.blocks[0].attn.q",), alpha=0.5))[1]
    assert partial.numbers["pairs_skipped"] == {"a linear with the same input is not selected": 1}
    for step in (Smooth(where=("language",), alpha=0.5), Static(where=("language",), alpha="none")):
        view = fresh()
        layer = next(unit for unit in view.units if unit.name == "language.blocks[1]").module
        nn.init.constant_(layer.mlp.up_proj.weight, 3e38)
        with pytest.raises(WorkFailed, match="not finite"):
            run(step, view)


def test_settings_and_refusals() -> None:
    for kind in (Smooth, Static):
        with pytest.raises(ValueError, match="between 0 and 1"):
            kind(alpha=1.5)
        with pytest.raises(Unmet, match="needs calibration data"):
            run(kind(), data=[])
    assert Smooth(activations="tensor").weaker() == Smooth() and Smooth().weaker() is None
    view, _ = run(RTN(bits=4, group=-1, where=("vision",), search="none"))
    with pytest.raises(Unmet, match="quantized already"):
        run(Static(), view)


def test_a_killed_pass_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    step = Static(where=("vision",), alpha=0.5)
    check_resumes(step, 2, tmp_path)
