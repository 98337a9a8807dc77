"""Taking parts of a compressed model back: every pass, what comes of it, and that nothing is left of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from svlm import passes
from svlm.compress import storage, vocabulary
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import evaluating
from svlm.compress.errors import Unmet
from svlm.compress.parts import Parts
from svlm.compress.pipeline import apply_pass
from svlm.compress.runtime import activations
from tests import zoo
from tests.compress.test_vocabulary import cut, renumbered
from tests.passes.test_conformance import context, make

Batch = dict[str, torch.Tensor]


def ran(view: ModelView, batch: Batch) -> torch.Tensor:
    with evaluating(view.model):
        return view.model(**batch).logits


def pair(family: str, name: str, **settings: Any) -> tuple[ModelView, ModelView, Batch]:
    """A model of the family after a pass, its original, and a batch."""
    model, batch = zoo.build(family)
    small, original = view_of(model), view_of(copy.deepcopy(model))
    for view in (small, original):
        view.storage_dtype = torch.bfloat16
        storage.round_to_storage(view)
        ran(view, batch)
    step = passes.find(name).from_settings(settings) if settings else make(name)
    apply_pass(step, small, context(small, original, [batch]))
    ran(small, batch)
    return small, original, batch


def traces(*views: ModelView) -> list[Any]:
    """Who holds what: each module's attributes and the entries of its dictionaries, by identity; all configs."""
    seen: list[Any] = []
    for view in views:
        for path, module in view.model.named_modules():
            for key, value in vars(module).items():
                inside = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else None
                seen.append((path, id(module), key, id(value), inside))
            config = vars(module).get("config")
            seen.append(config.to_json_string(use_diff=False) if config is not None else "")
    return seen


def names(parts: Parts) -> list[str]:
    return [group.name for group in parts.groups]


def check(small: ModelView, original: ModelView, batch: Batch) -> None:
    """Each group runs and so does the rest, all together are the original, and no trace of it is left."""
    parts = Parts(small, original)
    wanted, was, before = ran(original, batch), ran(small, batch), traces(small, original)
    whole = [part for group in parts.groups for part in group.parts]
    assert len(whole) == len(set(whole)) and {"vision", "language"} <= set(whole)
    for group in parts.groups:
        for chosen in (group.parts, [part for part in whole if part not in group.parts]):
            with parts.restored(chosen):
                found = ran(small, batch)
            assert found.shape == wanted.shape and torch.isfinite(found).all(), group.name
        if parts.unchanged(group):
            with parts.restored(group.parts):
                torch.testing.assert_close(ran(small, batch), was, rtol=0, atol=0)
        for part in group.parts:
            pairs = parts.blocks(part)
            if all(parts.fits(*two) for two in pairs):
                for also, those in [((), [two]) for two in pairs[-2:]] + [(group.parts, pairs)]:
                    with parts.restored(also, those):
                        assert torch.isfinite(ran(small, batch)).all(), those[0][0].name
    with parts.restored(whole):
        torch.testing.assert_close(ran(small, batch), wanted, rtol=0, atol=0)
    assert traces(small, original) == before
    torch.testing.assert_close(ran(small, batch), was, rtol=0, atol=0)
    torch.testing.assert_close(ran(original, batch), wanted, rtol=0, atol=0)


# families in which a mechanism meets what is special about them, one or two for each
QUICK = [
    ("quantize.static", "gemma3"),
    ("tokens.grid", "qwen3-vl"),
    ("tokens.merge", "idefics3"),
    ("tokens.visionzip", "gemma3"),
    ("tokens.fastv", "llava"),
    ("fuse.prefuse", "llava"),
    ("fuse.norms", "donut"),
]


@pytest.mark.parametrize(("name", "family"), QUICK)
def test_parts_of_a_compressed_model(name: str, family: str) -> None:
    check(*pair(family, name))


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("name", [name for name in passes.names() if name not in ("prune.vocabulary",)])
def test_parts_after_every_pass(name: str, family: str) -> None:
    try:
        made = pair(family, name)
    except Unmet:
        pytest.skip("the pass refuses this family; tests/passes/test_conformance.py says which")
    check(*made)


def test_a_model_that_speaks_fewer_tokens() -> None:
    model, batch = zoo.build("llava")
    small, whole = view_of(model), view_of(copy.deepcopy(model))
    found = cut(small, batch)
    vocabulary.narrow(small, found)
    few = renumbered(batch, found.numbering)
    original = vocabulary.speaking(whole, small.vocabulary, None)
    with torch.no_grad():
        for ref in small.linears("language"):
            ref.module.weight *= 0.9
    ran(small, few), ran(original, few)
    check(small, original, few)
    parts = Parts(small, original)
    assert [g.name for g in parts.groups if not parts.unchanged(g)] == ["language"]


def test_a_narrower_language_model_is_one_with_all_that_it_meets() -> None:
    small, original, batch = pair(
        "llava", "prune.structured", ratio=0.25, what=["hidden"], where="language", multiple=4
    )
    parts = Parts(small, original)
    assert names(parts) == ["vision", "connector + language + embeddings + head"]
    assert "24 channels here, 32 in the original" in " ".join(parts.groups[1].why)
    assert parts.unchanged(parts.groups[0]) and not parts.unchanged(parts.groups[1])
    assert not any(parts.fits(*two) for two in parts.blocks("language"))
    check(small, original, batch)


def test_a_part_brings_back_what_it_lost_and_no_other_does() -> None:
    """Of each part in turn the weights are changed: that part alone is changed, and it alone makes up for it."""
    for part in ("vision", "connector", "language", "head"):
        model, batch = zoo.build("llava")
        small, original = view_of(model), view_of(copy.deepcopy(model))
        with torch.no_grad():
            for ref in small.linears(part):
                ref.module.weight += 0.1
        wanted, was = ran(original, batch), ran(small, batch)
        parts = Parts(small, original)
        assert not torch.equal(wanted, was)
        assert [g.name for g in parts.groups if not parts.unchanged(g)] == [part]
        for group in parts.groups:
            with parts.restored(group.parts):
                assert torch.equal(ran(small, batch), wanted if group.name == part else was)


def test_one_block_is_put_back_where_it_stood_in_the_original() -> None:
    small, original, batch = pair("llava", "prune.layers", count=1, criterion="random", seed=1)
    parts = Parts(small, original)
    pairs = parts.blocks("language")
    (gone,) = parts.gone("language")
    was = [unit.name for unit in original.parts["language"] if unit.name != gone]
    assert [there.name for _, there in pairs] == was
    with torch.no_grad():
        for ref in pairs[-1][0].linears:
            ref.module.weight *= 0.5
    damaged = ran(small, batch)
    assert [parts.same(*two) for two in pairs] == [True] * (len(pairs) - 1) + [False]
    with parts.restored((), pairs[-1:]):
        healed = ran(small, batch)
    with torch.no_grad():
        for ref in pairs[-1][0].linears:
            ref.module.weight *= 2
    assert not torch.equal(damaged, healed) and torch.equal(ran(small, batch), healed)


def test_rounded_inputs_go_with_their_part() -> None:
    small, original, _ = pair("llava", "quantize.static")
    parts = Parts(small, original)
    assert not parts.unchanged(parts.groups[0])
    with parts.restored(("vision",)):
        assert not any(activations.installed(module) for module in small.model.modules())
    assert small.activations


def test_nothing_is_left_after_an_error() -> None:
    small, original, batch = pair("llava", "tokens.grid")
    parts = Parts(small, original)
    was, before = ran(small, batch), traces(small, original)
    with pytest.raises(KeyError), parts.restored(("vision", "tokens", "language")):
        ran(small, batch)
        small.model.register_forward_pre_hook(lambda *_: None)
        small.model.config.text_config.num_hidden_layers = 7
        raise KeyError
    assert traces(small, original) == before and torch.equal(ran(small, batch), was)


def test_generation_with_parts_of_another_depth() -> None:
    small, original, batch = pair("llava", "prune.layers", count=1, criterion="random")
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    wanted = original.model.generate(**prompt, **options)
    parts = Parts(small, original)
    with parts.restored([part for group in parts.groups for part in group.parts]):
        assert torch.equal(small.model.generate(**prompt, **options), wanted)
    assert small.model.generate(**prompt, **options).shape == wanted.shape


def test_the_packed_cache_is_a_part() -> None:
    small, original, batch = pair("llava", "quantize.kv_cache")
    parts = Parts(small, original)
    assert names(parts)[-1] == "cache"
    prompt = {key: value for key, value in batch.items() if key != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}

    def layers() -> set[str]:
        return {type(layer).__name__ for layer in small.model.generate(**prompt, **options).past_key_values.layers}

    packed = layers()
    with parts.restored(("cache",)):
        assert layers().isdisjoint(packed)
    assert layers() == packed
