"""Traced steps in the torch runtime: the tokens of transformers' own loop, and everything else left to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import svlm
from svlm.calib.ask import example_prompt
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.runtime.greedy import Wish, answer, plain_wish
from svlm.compress.runtime.kernels import use
from svlm.compress.runtime.kernels.step import Step, Steps, goes_on, obstacle
from svlm.compress.runtime.kernels.use import use_kernels
from svlm.compress.runtime.kv_cache import CacheForm
from svlm.compress.runtime.kv_cache import install as install_cache
from tests import zoo

STEPPING = {
    "llava", "llava-next", "llava-onevision", "idefics3", "smolvlm", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "paligemma",
    "internvl", "blip-2",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """All linears with weights in float16: the form that is an object and no tensor."""
    us = {count: {"float16w": 1.0, "float32": 9.0} for count in ("1", "8", "64", "512")}
    monkeypatch.setattr(use, "measure", lambda *a, **k: {"us": us, "dropped": {}})


def stepping(family: str) -> tuple[ModelView, dict[str, Any], Any]:
    """A model in the torch runtime, a prompt without padding, and what stands in for its `generate`."""
    view, batch = view_of(zoo.model(family)), zoo.batch(family, samples=1)
    batch.pop("labels")
    use_kernels(view)
    return view, batch, vars(view.model).get("generate")


def own(model: Any, **asked: Any) -> torch.Tensor:
    return type(model).generate(model, **asked)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_families_give_the_tokens_of_transformers(family: str) -> None:
    view, batch, steps = stepping(family)
    asked: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    wanted = own(view.model, **batch, **asked)
    for _ in range(2):  # the first is begun twice
        assert torch.equal(view.model.generate(**batch, **asked), wanted)
    assert bool(steps and steps.proven and not steps.refused) == (family in STEPPING)
    if family not in STEPPING:
        assert view.family.seq2seq or steps.refused


def test_steps_are_taken_and_end_where_transformers_ends() -> None:
    view, batch, steps = stepping("smolvlm")
    asked: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": 0}
    long = view.model.generate(**batch, **asked)
    prompt = batch["input_ids"].shape[1]
    calls: list[int] = []
    view.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(view.model.generate(**batch, **asked), long) and len(calls) == 1, "the prompt alone"
    for place in (0, 2, 5):  # an answer ends with the first token, within what proves a step, and after it
        ends = [int(long[0, prompt + place])]
        for limit in (1, 2, 12):
            ended = asked | {"eos_token_id": ends, "max_new_tokens": limit}
            wanted = own(view.model, **batch, **ended)
            assert torch.equal(view.model.generate(**batch, **ended), wanted)
            steps.proven.clear()
            assert torch.equal(view.model.generate(**batch, **ended), wanted)


def test_a_prompt_of_another_length_and_kind() -> None:
    view, batch, steps = stepping("smolvlm")
    asked: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 0}
    view.model.generate(**batch, **asked)
    for length in (2, 30):
        text = {"input_ids": torch.arange(20, 20 + length)[None] % 15 + 20}
        assert torch.equal(view.model.generate(**text, **asked), own(view.model, **text, **asked))
    assert len(steps.proven) == 2 and len(steps.traced) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"do_sample": True, "temperature": 0.5}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2},
        {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"return_dict_in_generate": True},
        {"logits_processor": [lambda ids, scores: scores]}, {"use_cache": False}, {"min_new_tokens": 3},
        {"suppress_tokens": [7]}, {"cache_implementation": "static"}, {"generation_config": "its own"},
        {"forced_eos_token_id": 0}, {"max_time": 0.0}, {"num_beams": 0},
    ],
)  # fmt: skip
def test_other_settings_are_left_to_transformers(setting: dict[str, Any]) -> None:
    view = view_of(zoo.model("llava"))
    batch = zoo.batch("llava", samples=1)
    batch.pop("labels")
    asked = batch | {"max_new_tokens": 5}
    assert plain_wish(view.model, asked) is not None
    assert plain_wish(view.model, asked | setting) is None
    idle = {"length_penalty": 1.0, "num_beam_groups": 1, "suppress_tokens": [], "encoder_repetition_penalty": 1.0}
    assert plain_wish(view.model, asked | idle) is not None


def test_what_is_no_single_prompt_is_left_to_transformers() -> None:
    view = view_of(zoo.model("llava"))
    batch = zoo.batch("llava", samples=2)
    batch.pop("labels")
    assert plain_wish(view.model, batch | {"max_new_tokens": 5}) is None, "two rows"
    one = {k: v[:1] for k, v in batch.items()}
    assert plain_wish(view.model, one) is None, "no length"
    padded = one | {"attention_mask": torch.zeros_like(one["input_ids"]), "max_new_tokens": 5}
    assert plain_wish(view.model, padded) is None
    view.model.generation_config.repetition_penalty = 1.2
    assert plain_wish(view.model, one | {"max_new_tokens": 5}) is None, "what the model's own config says counts"
    assert not goes_on(torch.tensor([[0, 1, 1]]), 3) and not goes_on(torch.tensor([[0]]), 1)
    assert goes_on(torch.tensor([[[0, 1, 2]], [[0, 7, 8]]]), 3)


def test_a_step_that_comes_to_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    view, batch, steps = stepping("llava-next")
    asked: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 0}
    wanted = own(view.model, **batch, **asked)
    real = Step.forward
    monkeypatch.setattr(Step, "forward", lambda s, *a: real(s, *a) * 1.1)
    assert torch.equal(view.model.generate(**batch, **asked), wanted)
    assert "off by" in steps.refused and not steps.proven
    assert torch.equal(view.model.generate(**batch, **asked), wanted)


def test_a_step_that_cannot_be_traced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    view, batch, steps = stepping("llava")
    asked: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 0}
    wanted = own(view.model, **batch, **asked)

    def fail(*_: Any) -> Any:
        raise ValueError("no trace of this")

    monkeypatch.setattr(Step, "forward", fail)
    for _ in range(2):
        assert torch.equal(view.model.generate(**batch, **asked), wanted)
    assert "cannot be traced: no trace of this" in steps.refused
    assert view.decoder.config._attn_implementation == "sdpa"


def test_inside_autocast_transformers_makes_all_tokens() -> None:
    view, batch, steps = stepping("smolvlm")
    asked: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 0}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(view.model.generate(**batch, **asked), own(view.model, **batch, **asked))
    assert not steps.proven and not steps.refused


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_not_traced(kind: str) -> None:
    view = view_of(zoo.model("llava"))
    view.decoder.config.rope_parameters = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    assert kind in obstacle(view)
    view.decoder.config.rope_parameters = {"full_attention": {"rope_type": kind}, "sliding": {"rope_type": "default"}}
    assert kind in obstacle(view), "by kind of layer"
    view.decoder.config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    assert not obstacle(view)


def test_threads_take_turns() -> None:
    from concurrent.futures import ThreadPoolExecutor

    view, batch, _ = stepping("llava")
    both = zoo.batch("llava", samples=2)
    both.pop("labels")
    asked: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 0}
    wanted = [own(view.model, **given, **asked) for given in (batch, both)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: view.model.generate(**(batch, both)[i % 2], **asked), range(8)))
    assert all(torch.equal(answer_, wanted[i % 2]) for i, answer_ in enumerate(found))
    assert view.decoder.config._attn_implementation == "sdpa"


def test_a_model_that_a_pass_works_on_keeps_transformers_loop() -> None:
    packed = view_of(zoo.model("llava"))
    install_cache(packed.model, CacheForm())
    assert "how it generates" in obstacle(packed)
    hooked = view_of(zoo.model("llava"))
    hooked.decoder.layers[0].register_forward_hook(lambda *_: None)
    assert "blocks" in obstacle(hooked)
    eager = view_of(zoo.model("llava"))
    eager.decoder.config._attn_implementation = "eager"
    facts = use_kernels(eager)
    assert "attention" in facts["stepwise"] and "generate" not in vars(eager.model)
    assert any("attention" in sentence for sentence in use.says(facts))


def test_the_demo_in_bfloat16() -> None:
    view = svlm.load_view("demo")
    use_kernels(view, dtype=torch.bfloat16)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in example_prompt(view).items()}
    asked: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": -1, "pad_token_id": 0}
    assert torch.equal(view.model.generate(**batch, **asked), own(view.model, **batch, **asked))
    steps = vars(view.model)["generate"]
    assert isinstance(steps, Steps) and steps.proven and not isinstance(steps, nn.Module)


def test_the_loop_fills_up_rows_that_have_ended() -> None:
    import numpy as np

    wish = Wish.of(5, [9], 0)
    following = {1: 2, 2: 9, 3: 4, 4: 5, 5: 6, 9: 7, 0: 7, 6: 8}
    found = answer(np.array([1, 3]), lambda last: np.array([following[int(t)] for t in last]), wish)
    assert found.tolist() == [[1, 2, 9, 0, 0], [3, 4, 5, 6, 8]]
    assert answer(np.array([9, 9]), lambda last: last, wish).tolist() == [[9], [9]]
    assert Wish.of(3, [7, 8], None).filler == 7
