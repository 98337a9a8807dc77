"""What a model costs: counted by hand on the demo model, and measurable for every family."""

from __future__ import annotations

import json

import pytest
import torch

from svlm import passes
from svlm.calib import cost as costing
from svlm.calib.cost import cost
from svlm.calib.dataset import CalibrationSet
from svlm.calib.encode import Encoder
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Context, Silent
from svlm.compress.inspect import part_sizes
from svlm.compress.pipeline import apply_pass
from svlm.compress.storage import load_model
from tests import zoo


@pytest.fixture(scope="module")
def demo() -> ModelView:
    return load_model("demo")


@pytest.fixture(scope="module")
def batch(demo: ModelView) -> dict[str, torch.Tensor]:
    return Encoder(demo.processor).encode(CalibrationSet.load("demo", fit=1, check=1).fit)


def products(view: ModelView, part: str) -> int:
    """Multiply-adds a token in the linears of a part."""
    return sum(ref.module.weight.numel() for ref in view.linears(part))


def test_flops_of_the_demo_model_by_hand(demo: ModelView, batch: dict[str, torch.Tensor]) -> None:
    found = cost(demo, batch, latency=False)["flops"]
    text, vision = demo.model.config.text_config, demo.model.config.vision_config
    tokens, visual = batch["input_ids"].shape[1], 64
    head = text.vocab_size * text.hidden_size
    span = text.num_hidden_layers * text.num_attention_heads * text.head_dim  # two products of this width by key
    first = products(demo, "language") * tokens + head + 2 * span * tokens**2
    assert found["prefill"] == pytest.approx(2 * first, rel=1e-3)
    assert found["connector"] == 2 * products(demo, "connector") * visual
    token = products(demo, "language") + head + 2 * span * (tokens + 1)
    assert found["decode"] == pytest.approx(2 * token, rel=1e-3)
    patches = visual + 1
    width = vision.num_hidden_layers * vision.hidden_size
    tower = products(demo, "vision") * patches + 2 * width * patches**2 + 3 * vision.patch_size**2 * 192 * visual
    assert found["vision"] == pytest.approx(2 * tower, rel=1e-3)


def test_sizes_and_times(demo: ModelView, batch: dict[str, torch.Tensor]) -> None:
    before = {k: v.clone() for k, v in demo.model.state_dict().items()}
    found = cost(demo, batch, bytes_on_disk=123)
    assert found["parameters"] == sum(p.numel() for p in demo.model.parameters()) == demo.model.num_parameters()
    assert found["bytes"] == 123 and found["visual_tokens"] == 64
    assert found["bytes_by_part"] == {part: stored for part, (_, stored) in part_sizes(demo).items()}
    assert sum(found["parameters_by_part"].values()) == found["parameters"]
    assert cost(demo, batch, latency=False)["bytes"] == sum(found["bytes_by_part"].values())
    times = found["latency_ms"]
    assert set(times) == {"vision", "connector", "prefill", "first_token", "decode_per_token"}
    assert times["first_token"] == pytest.approx(times["vision"] + times["connector"] + times["prefill"], rel=0.3)
    text = demo.model.config.text_config
    held = 2 * 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # float32 here
    assert found["kv_bytes"] == held * batch["input_ids"].shape[1]
    assert all(value >= 0 for value in found["latency_ms"].values()) and found["latency_ms"]["vision"] > 0.1
    assert found["peak_rss_bytes"] > 10**8
    json.dumps(found, allow_nan=False)
    assert all(torch.equal(before[k], v) for k, v in demo.model.state_dict().items())
    assert all(p.requires_grad for p in demo.model.parameters()), "as it was"


def test_half_the_visual_tokens_cost_less(demo: ModelView, batch: dict[str, torch.Tensor]) -> None:
    small = load_model("demo")
    nothing = Context((), lambda *a, **k: None, lambda: None, progress=Silent())
    apply_pass(passes.find("tokens.random").from_settings({"keep": 0.5}), small, nothing)
    full, half = (cost(view, batch, latency=False) for view in (demo, small))
    assert half["visual_tokens"] == 32 and half["parameters"] == full["parameters"]
    assert half["flops"]["prefill"] < 0.65 * full["flops"]["prefill"]
    assert half["flops"]["decode"] < full["flops"]["decode"], "a shorter cache"
    assert half["flops"]["vision"] == full["flops"]["vision"]
    length = batch["input_ids"].shape[1]
    assert half["kv_bytes"] == full["kv_bytes"] * (length - 32) // length


def test_a_choice_counts_as_vision_and_a_connector_inside_the_tower_as_itself() -> None:
    view, one = view_of(zoo.model("qwen2-vl")), zoo.batch("qwen2-vl", samples=1)
    plain = cost(view, one, latency=False)["flops"]
    assert plain["connector"] == 2 * products(view, "connector") * 4, "four groups of four patches"
    apply_pass(passes.find("tokens.dpp").from_settings({"keep": 0.5}), view, Context((one,), None, None))
    chosen = cost(view, one, latency=False)["flops"]
    assert chosen["connector"] == plain["connector"] and chosen["prefill"] < plain["prefill"]
    kernel = 2 * 4 * 4 * 32  # of four tokens of width 32
    assert kernel <= chosen["vision"] - plain["vision"] <= 4 * kernel
    assert view.model.model.language_model.visual_token_reduction.choose.__name__ == "choose", "as it was"


def test_packed_keys_and_values_take_fewer_bytes(demo: ModelView, batch: dict[str, torch.Tensor]) -> None:
    small = load_model("demo")
    step = passes.find("quantize.kv_cache").from_settings({"group": 16, "residual": 16})
    nothing = Context((batch,), lambda *a, **k: None, lambda: None, progress=Silent())
    apply_pass(step, small, nothing)
    assert cost(small, batch, latency=False)["kv_bytes"] < 0.6 * cost(demo, batch, latency=False)["kv_bytes"]


def test_slow_models_are_timed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    for patience, times in ((10.0, costing.RUNS + costing.WARM_UPS), (0.0, costing.FEWEST)):
        monkeypatch.setattr(costing, "PATIENCE", patience)
        ran.clear()
        milliseconds = costing._milliseconds(lambda: lambda: ran.append(1), torch.device("cpu"))
        assert milliseconds is not None and len(ran) == times


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_can_be_measured(family: str) -> None:
    view, one = view_of(zoo.model(family)), zoo.batch(family, samples=1)
    found = cost(view, one, latency=False)
    assert set(found["latency_ms"].values()) == {None}
    flops = found["flops"]
    assert flops.pop("connector") is None or flops["vision"] or "connector" not in view.parts
    assert all(value > 0 for value in flops.values())
    assert (found["kv_bytes"] or 0) > 0 or family == "trocr", "whose decoder has no cache"
    assert flops["decode"] < flops["prefill"] + flops["vision"]
    assert found["visual_tokens"] == view.visual_tokens(one)[0]
    assert found["parameters"] == view.model.num_parameters()
    two = cost(view, zoo.batch(family), latency=False)
    assert two["visual_tokens"] == found["visual_tokens"], "by image, whatever the batch"
