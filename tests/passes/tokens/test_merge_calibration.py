"""tokens.merge: what walks, training and the meter see of a tower that merges tokens."""

from __future__ import annotations

import copy

import pytest
import torch

from svlm.calib.cost import cost
from svlm.calib.walk import Walk
from svlm.calib.walk_unit import WalkUnit
from svlm.compress.anatomy import view_of
from svlm.compress.errors import ModelError, Unmet
from svlm.compress.pipeline import apply_pass
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.quantize.round import Round
from tests import zoo

from .helpers import logits
from .test_calibration import Weights
from .test_merge import CONSTANT, MERGED, context, with_merging


@pytest.mark.parametrize("family", ["llava", "smolvlm", "internvl"])
def test_calibration_sees_what_inference_sees(family):
    view = with_merging(family)
    batch = zoo.batch(family, 3)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        ref.module.register_forward_hook(
            lambda module, args, out, path=ref.path: seen.__setitem__(path, args[0].flatten(0, -2))
        )
        for ref in view.linears(("vision", "connector", "language"))
    ]
    wanted = logits(view.model, batch)
    for handle in handles:
        handle.remove()
    walk = Walk(view, [batch], ("vision", "connector", "language"))
    for block in walk:
        for ref, stat in block.observe(Weights, token_weights="uniform").items():
            torch.testing.assert_close(stat.rows[0], seen[ref.path], rtol=1e-5, atol=1e-5)
            assert len(stat.weights[0]) == len(stat.rows[0])
            if block.part == "vision":
                assert bool((stat.weights[0] == 1).all())
    torch.testing.assert_close(walk.replay(0).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MERGED)
def test_a_merging_tower_is_rounded_as_if_nothing_were_remembered(family, monkeypatch):
    """Merging reads the keys inside attention, which has to run for that."""
    rounded = []
    for settling in (True, False):
        if not settling:
            monkeypatch.setattr(WalkUnit, "settle", lambda *_: None)
        view = with_merging(family)
        apply_pass(GPTQ(group=-1, where="vision"), view, context(view, zoo.batch(family, 2)))
        rounded.append({ref.path: ref.module.weight.detach().clone() for ref in view.linears("vision")})
    assert rounded[0] and all(torch.equal(weight, rounded[1][path]) for path, weight in rounded[0].items())


def test_later_blocks_are_walked_alone():
    """The blocks before the first selected one are remembered, cut into samples, and keep their groups."""
    view = with_merging("llava")
    batch = zoo.batch("llava", 4)
    apply_pass(
        Round(bits=4, group=-1, where=("vision.blocks[2]",), steps=2, batch_size=2, token_weights="balanced"),
        view,
        context(view, batch),
    )
    step = GPTQ(bits=4, group=-1, where=("vision.blocks[1:]", "language.blocks[0]"), token_weights="gradient")
    view = with_merging("llava")
    apply_pass(step, view, context(view, batch))
    parts = []

    class Noting(Weights):
        def update(self, x, weights):
            parts.append(len(x))

    block = next(iter(Walk(view, [batch], "vision.blocks[1]")))
    block.observe(Noting)
    assert parts and set(parts) <= {4 * 14, 4 * 12}
    with pytest.raises(ModelError, match="groups of merged tokens are lost"):
        args, kwargs = next(block.inputs())
        block.unit.module(args[0].clone(), *args[1:], **kwargs)


def test_asymmetric_rounding_is_refused():
    view = with_merging("llava")
    step = GPTQ(bits=4, group=-1, where=("vision",), asymmetric=0.5)
    with pytest.raises(Unmet, match="merges tokens"):
        step.requires(view, context(view, zoo.batch("llava")))


def test_gradients_reach_the_whole_tower():
    """By autograd as by differences, in a direction that changes no matching."""
    model, batch = zoo.model("llava").double(), zoo.batch("llava")
    batch["pixel_values"] = batch["pixel_values"].double()
    view = with_merging("llava", CONSTANT, model, batch)
    mix = torch.randn(17, 24, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (view.tower(batch["pixel_values"]).last_hidden_state * mix).sum()

    loss().backward()
    weights = [p for name, p in model.named_parameters() if "vision_tower.encoder.layers.0" in name]
    assert all(p.grad is not None and bool(p.grad.any()) for p in weights if p.numel() > 24)
    weight = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    direction = torch.randn_like(weight)
    slope, step = float((weight.grad * direction).sum()), 1e-6
    with torch.no_grad():
        weight.add_(step * direction)
        up = float(loss())
        weight.sub_(2 * step * direction)
        down = float(loss())
    assert (up - down) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_the_cost_tells_the_truth():
    """FLOPs of the tower by hand: rows of every linear, and attention over what is left."""
    model, batch = zoo.build("llava")
    batch = {k: v[:1] for k, v in batch.items()}
    before = cost(view_of(copy.deepcopy(model)), batch, latency=False)
    after = cost(with_merging("llava", CONSTANT, model, batch), batch, latency=False)
    assert after["parameters"] == before["parameters"] and after["visual_tokens"] == before["visual_tokens"] == 16
    assert after["flops"]["prefill"] == before["flops"]["prefill"]
    attention = [17, 14, 12]
    saved = sum(
        2 * ((17 - n) * 4 * 24 * 24 + (17 - m) * 2 * 24 * 40) + 4 * 24 * (17 * 17 - n * n)
        for n, m in zip(attention, [14, 12, 9])
    )
    matching = sum(2 * ((n - 1 + 1) // 2) * ((n - 1) // 2) * 12 for n in attention)
    assert before["flops"]["vision"] - after["flops"]["vision"] == saved - matching
