"""fuse.norms and fuse.connector: exact in every family, and stock transformers loads the results."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText

from svlm import passes
from svlm.compress import storage
from svlm.compress.anatomy import view_of
from svlm.compress.base import Context
from svlm.compress.errors import Unmet, WorkFailed
from svlm.compress.pipeline import apply_pass
from svlm.passes.fuse._affine import entering
from svlm.passes.fuse.connector import Connector
from svlm.passes.fuse.norms import Norms
from svlm.passes.quantize._fold import gain_offset
from svlm.passes.quantize.hqq import HQQ
from tests import zoo

ENTERED = {  # norms in front of the connector, and whether their biases can go with them
    "idefics3": (1, 0),
    "smolvlm": (1, 0),
    "qwen2-vl": (1, 1),
    "qwen2.5-vl": (1, 0),
    "qwen3-vl": (1, 1),
    "paligemma": (1, 1),
    "gemma3": (1, 0),
    "blip-2": (1, 1),
    "blip-2-t5": (1, 1),
}


def context(*batches):
    def none(*_, **__):
        raise AssertionError("no walk and no teacher needed")

    return Context(batches, none, none)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def gains(view, path):
    norm = view.model.get_submodule(path)
    return norm.weight.detach() + gain_offset(norm)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_norms_are_exact_everywhere(family, tmp_path):
    model, batch = zoo.build(family)
    view, wanted = view_of(model), logits(model, batch)
    sources = {ref.norm for unit in view.units for ref in unit.linears if ref.norm}
    notes = apply_pass(Norms(), view, context(batch))
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)
    folded = notes.record["norms"]
    assert set(folded) >= sources, "every norm that feeds a stage alone"
    for path in folded:
        assert torch.equal(gains(view, path), torch.ones_like(gains(view, path))), path
    for ref in (ref for unit in view.units for ref in unit.linears if ref.norm in folded):
        bias = getattr(model.get_submodule(ref.norm), "bias", None)
        assert bias is None or ref.module.bias is None or not bias.any(), "a bias that could go on is gone"
    assert notes.numbers["largest_change_of_a_logit"] < 1e-5
    model.save_pretrained(tmp_path)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock, batch), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_connector_is_exact_or_refused(family):
    model, batch = zoo.build(family)
    view, wanted = view_of(model), logits(model, batch)
    if family not in ENTERED:
        with pytest.raises(Unmet, match=r"nothing to fold[\s\S]*(fuse\.norms|no norm|no connector)"):
            Connector().requires(view, context(batch))
        return
    notes = apply_pass(Connector(), view, context(batch))
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert (notes.numbers["norms"], notes.numbers["biases_moved"]) == ENTERED[family]
    (path,) = notes.record["norms"]
    assert torch.equal(gains(view, path), torch.ones_like(gains(view, path)))


def test_both_together_leave_no_scale_before_a_linear():
    model, batch = zoo.build("qwen2-vl")
    view, wanted = view_of(model), logits(model, batch)
    for step in (Norms(), Connector()):
        apply_pass(step, view, context(batch))
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert all(
        torch.equal(g, torch.ones_like(g)) for e in view.ledger for g in (gains(view, p) for p in e.record["norms"])
    )


def test_a_scale_of_zero_stays():
    model, batch = zoo.build("llava")
    view = view_of(model)
    norm = model.get_submodule(view.units[0].linears[0].norm)
    with torch.no_grad():
        norm.weight[3] = 0.0
    wanted = logits(model, batch)
    apply_pass(Norms(), view, context(batch))
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert norm.weight[3] == 0 and (norm.weight.sum() == len(norm.weight) - 1)


def test_a_tied_head_keeps_its_norm():
    config = zoo.CONFIGS["llava"]()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    view = view_of(AutoModelForImageTextToText.from_config(config).eval())
    (head,) = view.parts["head"]
    assert view.tied_embeddings and entering(view, head).obstacle == "the head shares its weight with the embedding"
    notes = apply_pass(Norms(), view, context(zoo.batch("llava")))
    assert notes.numbers["left"] == {"the head shares its weight with the embedding": 1}
    assert head.entry not in notes.record["norms"]


def test_quantized_linears_and_half_selected_stages_stay_as_they_are():
    model, batch = zoo.build("llava")
    view = view_of(model)
    apply_pass(HQQ(bits=4, group=-1, where=("language",)), view, context(batch))
    notes = apply_pass(Norms(), view, context(batch))
    assert notes.numbers["left"] == {"a linear that reads it is quantized already": 6}
    assert not any("language_model.layers" in path for path in notes.record["norms"])
    with pytest.raises(Unmet, match="not selected"):
        Norms(where=("language.attn.q",)).requires(view_of(zoo.model("llava")), context(batch))


def test_a_wrong_anatomy_is_noticed():
    """A norm that the residual stream reads too: the logits tell."""
    model, batch = zoo.build("llava")
    view = view_of(model)
    wrong = copy.copy(view.units[0])
    object.__setattr__(wrong, "entry", "model.vision_tower.pre_layrnorm")
    view.units = (wrong, *view.units[1:])
    with pytest.raises(WorkFailed, match="changed what the model computes"):
        Norms().apply(view, context(batch))


def test_without_data_it_folds_all_the_same(tmp_path):
    model, batch = zoo.build("qwen3-vl")
    view, wanted = view_of(model), logits(model, batch)
    notes = apply_pass(Norms(), view, context())
    assert "largest_change_of_a_logit" not in notes.numbers
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    torch.testing.assert_close(logits(again.model, batch), wanted, rtol=1e-5, atol=1e-5)
