"""quantize.kv_cache: what it refuses, counts and promises (the cache itself: tests/compress/test_kv_cache.py)."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from svlm import passes
from svlm.compress import storage
from svlm.compress.anatomy import view_of
from svlm.compress.errors import PromiseBroken, Unmet
from svlm.compress.export.run import export_model
from svlm.compress.pipeline import apply_pass
from svlm.compress.runtime.kv_cache import CacheForm, installed, remove
from svlm.passes.quantize.kv_cache import KVCache
from svlm.passes.quantize.rtn import RTN
from svlm.passes.tokens.grid import Grid
from tests import zoo
from tests.passes.test_conformance import context
from tests.passes.tokens.helpers import generate, prompts


def applied(family: str, step: KVCache, *before):
    model, batch = zoo.build(family)
    view = view_of(model)
    for each in (*before, step):
        notes = apply_pass(each, view, context(view, view, [batch]))
    return view, notes.numbers


def test_counts_follow_from_the_config():
    """llava of the zoo: 3 layers, 2 heads of 8 channels, answers of 3 tokens, float32."""
    view, numbers = applied("llava", KVCache(bits=4, group=4, residual=4, sink=1))
    assert numbers["layers"] == 3 and numbers["other_layers"] == {} and numbers["value_groups"] == [4]
    assert numbers["bytes_per_token"] == 3 * 2 * (2 * 8) * 4
    # a token and layer: 2 heads x (keys 4 bytes of codes + 1/4 of 8 scales and minima; values 4 bytes + 2 of each)
    assert numbers["bytes_per_packed_token"] == 3 * 2 * (4 + 2 * 8 * 4 / 4 + 4 + 2 * 2 * 4)
    lengths = [int(n) - 3 for n in zoo.batch("llava")["attention_mask"].sum(1)]
    assert numbers["prompts"] == numbers["prompts_with_packed_tokens"] == 2
    longest = numbers["longest_prompt"]
    assert longest["tokens"] == max(lengths) and longest["bytes"] == max(lengths) * numbers["bytes_per_token"]
    out = view.model.generate(**prompts("llava", 1), max_new_tokens=1, return_dict_in_generate=True)
    held = sum(layer.bytes for layer in out.past_key_values.layers)
    kept = len(prompts("llava", 1)["input_ids"][0])
    assert held == 3 * CacheForm(4, 4, 4, 1).bytes(kept, 2, 8, 4) < kept * numbers["bytes_per_token"]
    _, short = applied("llava", KVCache())
    assert short["prompts_with_packed_tokens"] == 0, "shorter than sink, residual and one group: told"


def test_counts_windows_cross_attention_and_reduced_tokens():
    _, numbers = applied("gemma3", KVCache(group=4, residual=4))
    assert numbers["layers"] == 1 and numbers["other_layers"] == {"DynamicSlidingWindowLayer": 2}
    _, numbers = applied("florence-2", KVCache(group=4))
    assert numbers["cross_layers"] == numbers["layers"] == 2 and numbers["prompts_with_packed_tokens"] == 2
    assert numbers["longest_prompt"]["tokens"] == 1 + max(zoo.batch("florence-2")["attention_mask"].sum(1).tolist())
    _, whole = applied("llava", KVCache(group=4))
    _, fewer = applied("llava", KVCache(group=4), Grid(keep=0.25))
    assert fewer["longest_prompt"]["tokens"] == whole["longest_prompt"]["tokens"] - 12


def test_refusals():
    view, _ = applied("llava", KVCache())
    with pytest.raises(Unmet, match=r"found: [248] bits"):
        KVCache(bits=8).requires(view, context(view, view, []))
    view = view_of(zoo.model("trocr"))
    with pytest.raises(Unmet, match="use_cache: false"):
        KVCache().requires(view, context(view, view, []))
    view = view_of(zoo.model("llava"))
    view.model.generation_config.cache_implementation = "static"
    with pytest.raises(Unmet, match="static cache"):
        KVCache().requires(view, context(view, view, []))
    config = zoo.CONFIGS["llava"]()
    config.text_config = tf.MistralConfig(**zoo.TEXT, sliding_window=9)
    view = view_of(tf.AutoModelForImageTextToText.from_config(config))
    with pytest.raises(Unmet, match="DynamicSlidingWindowLayer"):
        KVCache().requires(view, context(view, view, []))
    with pytest.raises(ValueError, match="group"):
        KVCache(group=0)


def test_promise_ladder_and_the_saved_model(tmp_path):
    step = KVCache(bits=2, group=4, residual=4, sink=0)
    view, _ = applied("llava", step, RTN(bits=4, group=-1, where=("language",)))
    wanted = generate(view.model, prompts("llava"), 16)
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    assert installed(again.model) == CacheForm(2, 4, 4, 0)
    assert torch.equal(generate(again.model, prompts("llava"), 16), wanted)
    facts = export_model(tmp_path / "saved", "compressed-tensors", tmp_path / "out", find=passes.find)
    assert any("quantize.kv_cache" in note for note in facts["notes"])
    assert [step.weaker().bits, step.weaker().weaker().bits, step.weaker().weaker().weaker()] == [4, 8, None]
    step.ensures(again)
    with pytest.raises(PromiseBroken, match="CacheForm"):
        step.weaker().ensures(again)
    remove(again.model)
    with pytest.raises(PromiseBroken, match="exact cache"):
        step.ensures(again)
