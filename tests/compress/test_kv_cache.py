"""The packed KV cache: its grids against a naive oracle, its bookkeeping, and `generate` with it in every family."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import transformers as tf

from svlm.calib.dataset import CalibrationSet
from svlm.calib.encode import Encoder
from svlm.compress.runtime.kv_cache import CacheForm, PackedLayer, States, install, installed, pack_cache, remove
from svlm.compress.runtime.kv_grid import dequantize, pack, quantize, unpack, value_group
from svlm.passes.api import load_view
from svlm.passes.tokens.grid import Grid
from tests import zoo
from tests.oracles import kivi
from tests.passes.tokens.helpers import generate, prompts, reduced

TIGHT = CacheForm(bits=8, group=4, residual=4, sink=1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [1, 5, 8])
def test_packing(bits, width):
    codes = torch.randint(0, 2**bits, (2, 3, width), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == -(-width * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, width), codes)
    first = sum(int(code) << (bits * i) for i, code in enumerate(codes[0, 0, : 8 // bits]))
    assert int(packed[0, 0, 0]) == first


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grid_is_the_nearest_point(bits):
    x = torch.randn(5, 9, 7)
    back = dequantize(*quantize(x, bits, dim=1))
    for i in range(5):
        for c in range(7):
            wanted = torch.tensor(kivi.rounded(x[i, :, c].tolist(), bits))
            torch.testing.assert_close(back[i, :, c], wanted, rtol=0, atol=1e-5)


def test_grid_of_strange_groups():
    flat = torch.full((1, 4, 2), 3.25, dtype=torch.bfloat16)
    assert torch.equal(dequantize(*quantize(flat, 4, dim=1)), flat)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(1, 4, 2)
        x[0, 1, 0] = bad
        back = dequantize(*quantize(x, 4, dim=1))
        assert not torch.isfinite(back[..., 0]).any() and torch.isfinite(back[..., 1]).all()
    x = torch.randn(64, 32, 4).to(torch.bfloat16)
    error = (dequantize(*quantize(x, 8, dim=1)).float() - x.float()).abs()
    step = (x.amax(1, True) - x.amin(1, True)).float() / 255
    assert bool((error <= 2.5 * step).all()), "half a step, and the rounding of minimum, scale and result to bfloat16"
    assert [value_group(n, 32) for n in (64, 80, 8, 127)] == [32, 20, 8, 1]


def grow(form: CacheForm, states: torch.Tensor, keys: bool, seed: int = 0) -> States:
    """States that took in `states` in runs of random length."""
    held, at, draw = States(form, states, keys), 0, random.Random(seed)
    while at < states.shape[2]:
        n = draw.choice([1, 1, 2, 7, 20])
        held.append(states[:, :, at : at + n])
        at += n
    return held


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(
    "form", [CacheForm(2, 4, 5, 0), CacheForm(4, 3, 0, 2), CacheForm(8, 6, 8, 4), CacheForm(4, 32, 32, 4)]
)
def test_held_states_equal_the_oracle(form, keys):
    states = torch.randn(2, 2, 75, 6)
    width = value_group(6, form.group)
    for seed in range(3):
        held = grow(form, states, keys, seed)
        found = held.all()
        assert len(held) == 75 and held.codes.shape[2] == form.packable(75 - form.sink) > 0
        settings = {"bits": form.bits, "group": form.group, "residual": form.residual, "sink": form.sink}
        for row in range(2):
            for head in range(2):
                wanted = kivi.seen(states[row, head].tolist(), keys=keys, width=width, **settings)
                torch.testing.assert_close(found[row, head], torch.tensor(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keys", [True, False])
def test_crop_forgets_the_end_and_rounds_nothing_again(keys):
    form = CacheForm(4, 4, 3, 2)
    states, more = torch.randn(1, 2, 30, 6), torch.randn(1, 2, 20, 6)
    for tokens in (0, 1, 5, 6, 9, 13, 27, 29, 30, 40):
        held = grow(form, states, keys)
        before = held.all()
        held.crop(tokens)
        stay = max(0, 30 - tokens)
        assert len(held) == stay and torch.equal(held.all(), before[:, :, :stay])
        packed = held.codes.clone()
        held.append(more)
        assert len(held) == stay + 20 and torch.equal(held.codes[:, :, : packed.shape[2]], packed)
        assert torch.equal(
            held.all()[:, :, :stay][:, :, : form.sink + packed.shape[2]],
            before[:, :, :stay][:, :, : form.sink + packed.shape[2]],
        )
        torch.testing.assert_close(held.all(), torch.cat([states[:, :, :stay], more], 2), rtol=0, atol=0.3)
        assert torch.equal(held.all()[:, :, -form.residual :], more[:, :, -form.residual :])


def test_layer_moves_rows_counts_bytes_and_resets():
    form = CacheForm(4, 32, 32, 4)
    layer = PackedLayer(form)
    keys, values = torch.randn(2, 3, 300, 64), torch.randn(2, 3, 300, 64)
    assert layer.get_seq_length() == 0 and layer.keys is None
    seen = layer.update(keys, values)
    assert torch.equal(seen[0], keys) and torch.equal(seen[1], values), "a prompt attends to exact states"
    assert layer.get_seq_length() == 300 and layer.get_mask_sizes(1) == (301, 0)
    exact = 2 * keys.numel() * 4
    assert layer.bytes == 2 * form.bytes(300, 3, 64, 4) < 0.4 * exact
    stored = [t.untyped_storage().nbytes() for side in layer.sides for t in side.tensors()]
    assert sum(stored) == layer.bytes, "no tensor keeps a larger one alive"
    all_keys, all_values = layer.keys, layer.values
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.keys, all_keys[[1, 0]]) and torch.equal(layer.values, all_values[[1, 0]])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.values, all_values[[1, 1, 0, 0]])
    layer.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(layer.keys, all_keys)
    layer.crop(-290)
    assert layer.get_seq_length() == 10 and torch.equal(layer.values, all_values[:, :, :10])
    with pytest.raises(ValueError):
        layer.crop(5)
    with pytest.raises(TypeError):
        layer.keys = keys
    layer.reset()
    assert layer.get_seq_length() == 0 == layer.bytes
    layer.update(keys[:1], values[:1])
    assert layer.get_seq_length() == 300, "another batch size after a reset"


def test_half_the_bits_in_bfloat16():
    for bits, most in ((8, 0.57), (4, 0.32), (2, 0.2)):
        form = CacheForm(bits, 32, 0, 0)
        layer = PackedLayer(form)
        x = torch.randn(1, 2, 3200, 64, dtype=torch.bfloat16)
        layer.update(x, x)
        assert layer.bytes == form.bytes(3200, 2, 64, 2) == 2 * x.numel() * (bits + 1) // 8
        assert layer.bytes / (2 * x.numel() * 2) < most


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f != "trocr"])
def test_generate_in_every_family(family):
    """Eight bits answer as the exact cache does, over many groups; in two bits the cache is coarser, and felt."""
    model, batch = zoo.model(family), {k: v for k, v in zoo.batch(family).items() if k != "labels"}
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options |= {"return_dict_in_generate": True, "suppress_tokens": [0, zoo.IMAGE, zoo.VIDEO]}
    exact = model.generate(**batch, **options)
    found = {}
    for bits in (8, 2):
        install(model, CacheForm(bits, 4, 4, 1))
        found[bits] = model.generate(**batch, **options)
    assert torch.equal(found[8].sequences, exact.sequences)
    assert torch.equal(found[2].logits[0], exact.logits[0]), "the prompt attends to exact states"
    assert not torch.equal(found[2].logits[-1], exact.logits[-1])
    caches = [found[8].past_key_values]
    if isinstance(caches[0], tf.EncoderDecoderCache):
        caches = [caches[0].self_attention_cache, caches[0].cross_attention_cache]
        assert all(layer.form.whole and not layer.sides[0].recent.shape[2] for layer in caches[1].layers)
    packed = [layer for cache in caches for layer in cache.layers if isinstance(layer, PackedLayer)]
    others = [layer for cache in caches for layer in cache.layers if not isinstance(layer, PackedLayer)]
    assert packed and all(layer.sides[0].codes.shape[2] for layer in packed)
    assert all(layer.is_sliding for layer in others) and bool(others) == (family == "gemma3")


def test_long_text_beams_and_lookup():
    model = zoo.model("qwen2-vl")
    ids = torch.randint(3, 90, (2, 90))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][1, :11] = 0
    wanted = {beams: generate(model, batch, 30, num_beams=beams) for beams in (1, 3)}
    install(model, CacheForm(8, 8, 8, 4))
    for beams, tokens in wanted.items():
        assert torch.equal(generate(model, batch, 30, num_beams=beams), tokens)
    alone = {k: v[:1] for k, v in batch.items()}
    assert torch.equal(generate(model, alone, 30, prompt_lookup_num_tokens=4), wanted[1][:1]), "guesses are cropped off"


def test_second_turn_continues_the_cache():
    model, batch = zoo.model("llava"), prompts("llava")
    install(model, TIGHT)
    first = model.generate(
        **batch, max_new_tokens=9, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
        suppress_tokens=[0, zoo.IMAGE, zoo.VIDEO],
    )  # fmt: skip
    cache = first.past_key_values
    asked = torch.full((3, 6), 7)
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(3, 15)], dim=1)
    more = {"input_ids": torch.cat([first.sequences, asked], dim=1), "attention_mask": mask}
    wanted = generate(model, more | {"pixel_values": batch["pixel_values"]}, 9)
    before = [side.codes.clone() for layer in cache.layers for side in layer.sides]
    for reused in (copy.deepcopy(cache), cache):
        assert torch.equal(generate(model, more, 9, past_key_values=reused), wanted)
        after = [side.codes for layer in reused.layers for side in layer.sides]
        for old, new in zip(before, after):
            assert new.shape[2] > old.shape[2] and torch.equal(new[:, :, : old.shape[2]], old)


def test_with_fewer_visual_tokens():
    """The shortened cache and the packed one together: as the shortened one alone, and rows still move together."""
    view, batch = reduced(zoo.model("llava"), Grid(keep=0.5)), prompts("llava")
    wanted = generate(view.model, batch, 20), generate(view.model, batch, 20, num_beams=2)
    install(view.model, TIGHT)
    assert torch.equal(generate(view.model, batch, 20), wanted[0])
    assert torch.equal(generate(view.model, batch, 20, num_beams=2), wanted[1])
    cache = tf.DynamicCache(config=view.model.config.get_text_config())
    pack_cache(cache, TIGHT)
    with torch.no_grad():
        view.model(**batch, past_key_values=cache)
        full = batch["input_ids"].shape[1]
        assert cache.get_seq_length() == full and len(cache.layers[0].sides[0]) == full - 8
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)

        def step(rows):
            cells = {"input_ids": torch.full((len(rows), 1), 7), "attention_mask": mask[rows]}
            out = view.model(**cells, past_key_values=copy.deepcopy(cache)).logits
            return out

        logits = step([0, 1, 2])
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        torch.testing.assert_close(step([2, 0, 1]), logits[[2, 0, 1]], rtol=1e-4, atol=1e-4)
        cache.reset()
    assert type(cache) is tf.DynamicCache and cache.get_seq_length() == 0
    assert all(isinstance(layer, PackedLayer) for layer in cache.layers)


def test_whose_cache_it_is():
    """Copies keep the packing; a cache given, one asked for by name, and none at all stay what they are."""
    model, batch = zoo.model("llava"), prompts("llava")
    plain = generate(model, batch, 12)
    install(model, CacheForm(2, 4, 4, 0))
    twin = copy.deepcopy(model)
    assert installed(twin) == installed(model) == CacheForm(2, 4, 4, 0)
    coarse = generate(model, batch, 12)
    assert torch.equal(generate(twin, batch, 12), coarse) and not torch.equal(coarse, plain)
    given = tf.DynamicCache(config=model.config.get_text_config())
    for options in ({"past_key_values": given}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(generate(model, batch, 12, **options), plain)
    assert not any(isinstance(layer, PackedLayer) for layer in given.layers)
    remove(model)
    assert installed(model) is None and torch.equal(generate(model, batch, 12), plain)
    assert torch.equal(generate(twin, batch, 12), coarse), "the copy keeps its own"


def test_demo_answers_with_eight_bits():
    view = load_view("demo")
    model = view.model
    inputs = Encoder(view.processor, seq2seq=False).prompts(list(CalibrationSet.load("demo", fit=8, check=8).check))
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    exact = model.generate(**inputs, **options)
    install(model, CacheForm(8, 16, 8, 4))
    packed = model.generate(**inputs, **options)
    assert torch.equal(packed.sequences, exact.sequences)
    held = sum(layer.bytes for layer in packed.past_key_values.layers)
    assert held < 0.6 * sum(2 * layer.keys.numel() * 4 for layer in exact.past_key_values.layers)
