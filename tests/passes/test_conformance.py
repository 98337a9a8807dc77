"""One test for every pass on the menu: frozen, YAML round trip, `rebuild` equals `apply`, promise kept, no hooks."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import yaml

from svlm import passes
from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.anatomy import view_of
from svlm.compress.base import Context, Pass, evaluating
from svlm.compress.errors import Unmet
from svlm.compress.pipeline import apply_pass, ask_promises
from svlm.compress.runtime.activations import installed
from tests import zoo

FAMILIES = zoo.FAMILIES
SMALL = {  # settings that suit models with widths of 16 to 64
    "prune.structured": {"ratio": 0.5, "multiple": 4, "what": ["mlp"]},
    "prune.wanda": {"pattern": "2:4", "where": ["vision", "language"]},
    "prune.sparsegpt": {"sparsity": 0.5, "blocksize": 16, "where": ["vision", "language"]},
    "distill.logits": {"steps": 2, "batch_size": 2},
    "distill.features": {"steps": 2, "batch_size": 2, "features": ["vision", "language"]},
    "distill.blocks": {"steps": 2, "batch_size": 1},
    "fuse.prefuse": {"tokens": 2, "blocks": 2, "gate": 0.5},
    "quantize.rtn": {"bits": 4, "group": -1, "where": ["language"]},
    "quantize.gptq": {"bits": 4, "group": -1, "where": ["language"]},
    "quantize.awq": {"bits": 4, "group": -1, "where": ["language"], "steps": 3},
    "quantize.round": {"bits": 4, "group": -1, "where": ["language"], "steps": 2, "batch_size": 1},
    "quantize.hqq": {"bits": 4, "group": -1, "where": ["language"]},
    "quantize.bnb": {"where": ["language"]},
    "quantize.smooth": {"alpha": 0.5, "where": ["language"]},
    "quantize.static": {"alpha": "none", "where": ["vision"]},
    "quantize.mixed": {"bits": 3.5, "group": -1, "where": ["language", "embeddings"], "refine": 0},
    "quantize.kv_cache": {"group": 4, "residual": 4},
}


def make(name: str) -> Pass:
    return passes.find(name).from_settings(SMALL.get(name, {}))


def context(view, teacher, batches):
    from contextlib import contextmanager

    @contextmanager
    def lend():
        with evaluating(teacher.model):
            yield teacher

    return Context(batches, lambda where=None, **o: Walk(view, batches, where, **o), lend)


@pytest.mark.parametrize("name", passes.names())
def test_settings(name):
    kind = passes.find(name)
    assert kind.name == name and kind.summary and kind.paper
    step = make(name)
    assert kind.from_settings(yaml.safe_load(yaml.safe_dump(step.settings()))) == step
    field = next((f.name for f in dataclasses.fields(step)), "name")  # some have no setting
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(step, field, None)
    ladder, milder = 0, step.weaker()
    while milder is not None and ladder < 20:
        assert type(milder) is kind and milder != step
        ladder, milder = ladder + 1, milder.weaker()
    assert ladder < 20, "the ladder ends"
    for setting in dataclasses.fields(kind):
        assert setting.name in (kind.__doc__ or ""), f"{name}: the docstring does not explain '{setting.name}'"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", passes.names())
def test_apply_rebuild_promise(name, family, tmp_path):
    model, batch = zoo.build(family)
    view = view_of(model)
    view.storage_dtype = torch.bfloat16
    storage.round_to_storage(view)
    teacher = view_of(copy.deepcopy(model))
    teacher.storage_dtype = torch.bfloat16
    step = make(name)
    with torch.no_grad():
        model(**batch)  # transformers adds hooks of its own at the first forward
    hooks = count_hooks(model)
    ctx = context(view, teacher, [batch])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        notes = apply_pass(step, view, ctx)
    except Unmet as error:
        after = model.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items()), "requires touched a weight"
        assert str(error) and family in UNMET.get(name, ()), f"{name} claims {family}: {error}"
        return
    assert family not in UNMET.get(name, ())
    yaml.safe_dump(notes.numbers), yaml.safe_dump(notes.record)
    kept, broken = ask_promises(view, passes.find)
    assert kept == [name] and broken is None
    if not name.startswith("tokens.") and name not in MECHANISMS:
        assert count_hooks(model) == hooks, "hooks are left"
    with torch.no_grad():
        wanted = model(**batch).logits
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    with torch.no_grad():
        found = again.model(**batch).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert ask_promises(again, passes.find) == ([name], None)


CROSS = (
    "blip-2",
    "blip-2-t5",
    "florence-2",
    "trocr",
    "donut",
)  # where reducing visual tokens is refused, with a reason
CHOOSING = ("dpp", "random", "grid", "pool", "divprune", "visionzip", "apet", "fastv", "pyramid")
UNMET: dict[str, tuple[str, ...]] = {f"tokens.{name}": CROSS for name in CHOOSING}
MECHANISMS = ("fuse.freeze_vision", "fuse.bypass", "fuse.prefuse")  # what they put onto a model is hooks
UNMET |= dict.fromkeys(MECHANISMS, CROSS)
UNMET["tokens.merge"] = (  # packed pictures with rotary places, attention without a mask, windows
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "blip-2",
    "blip-2-t5",
    "florence-2",
    "donut",
)
UNMET["tokens.visionzip"] = (*CROSS, "llava-next", "llava-onevision")  # patches of a token: by picture, not by config
UNMET["fuse.connector"] = ("llava", "llava-next", "llava-onevision", "internvl", "florence-2", "trocr", "donut")
UNMET["prune.vocabulary"] = FAMILIES  # the zoo has no tokenizers; tests/compress/test_vocabulary.py cuts every family
UNMET["tokens.resolution"] = FAMILIES  # no processors; tests/passes/tokens/test_resolution.py has those of every family
UNMET["quantize.kv_cache"] = ("trocr",)  # generates without a cache


def count_hooks(model) -> int:
    """Those that round a linear's input are what the model is, not left over."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) - (installed(m) is not None) for m in model.modules()]
    return sum(hooks)
