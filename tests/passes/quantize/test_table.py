"""The token embedding on a grid: one tensor with a tied head, saved packed, loaded bit for bit; who else loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from svlm import passes
from svlm.compress import storage
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.errors import SelectorError, Unmet, UsageError
from svlm.compress.export.run import export_model
from svlm.compress.inspect import part_sizes
from svlm.compress.pipeline import apply_pass, ask_promises
from svlm.compress.runtime.grid import packed_bytes
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.quantize.rtn import RTN
from tests import zoo
from tests.passes.quantize.helpers import BF16, context, fresh, weights

ROWS = 3000
LOADED_BY_OTHERS = ("llava", "gemma3", "blip-2-t5", "florence-2")  # free; tied and scaled; three modules, one tensor


def large(tied: bool) -> ModelView:
    """A LLaVA whose embedding is most of it."""
    torch.manual_seed(0)
    text = tf.LlamaConfig(**zoo.TEXT | {"vocab_size": ROWS, "tie_word_embeddings": tied})
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**zoo.VISION),
        text_config=text,
        image_token_index=zoo.IMAGE,
        image_seq_length=16,
        tie_word_embeddings=tied,
    )
    view = view_of(tf.AutoModelForImageTextToText.from_config(config).eval())
    view.storage_dtype = BF16
    storage.round_to_storage(view)
    return view


def data(family: str = "llava") -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(family, samples=3, seed=seed) for seed in range(2)]


def run(step: Any, view: ModelView, family: str = "llava") -> Any:
    batches = data(family)
    return apply_pass(step, view, context(view, batches))


def logits(model: Any, family: str = "llava") -> torch.Tensor:
    with torch.no_grad():
        return model(**data(family)[0]).logits


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_saves_its_embedding_packed_and_loads_it_bit_for_bit(family: str, tmp_path: Path) -> None:
    view = fresh(family)
    step = RTN(bits=8, group=16, where=("embeddings",))
    notes = run(step, view, family)
    assert list(view.grids) == [view.table.path] and notes.numbers["linears"] == 0
    assert notes.numbers["stock_transformers"] == "loads it"
    assert notes.numbers["searched_without_importance"] == (view.table.head is None)
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    before = view.model.state_dict()
    assert all(torch.equal(before[name], t) for name, t in again.model.state_dict().items())
    assert again.table.path == view.table.path and (again.table.head is None) == (view.table.head is None)
    assert ask_promises(again, passes.find) == (["quantize.rtn"], None)
    if family not in LOADED_BY_OTHERS:
        return
    stock = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(logits(stock, family), logits(view.model, family), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_it_takes_on_disk_and_in_the_books(bits: int, tied: bool, tmp_path: Path) -> None:
    view = large(tied)
    whole = storage.save(view, tmp_path / "before")
    run(RTN(bits=bits, group=16, where=("embeddings", "head")), view)
    tensors = 1 if tied else 2
    assert len(view.grids) == tensors and view.table.path in view.grids
    each = packed_bytes((ROWS, 32), view.grids[view.table.path])
    assert each == ROWS * 32 * bits // 8 + ROWS * 2 * 2 + 16
    saved = storage.save(view, tmp_path / "after")
    assert abs((whole - saved) - tensors * (ROWS * 32 * 2 - each)) < 2000, "headers and alignment apart"
    assert part_sizes(view)["embeddings"] == (ROWS * 32, each - 16), "svlm inspect counts it packed"
    again = storage.load_model(tmp_path / "after", find=passes.find)
    assert torch.equal(logits(again.model), logits(view.model))
    assert len(again.grids) == tensors


def test_either_name_means_the_one_tensor_and_the_inputs_of_a_tied_head_weigh_its_errors() -> None:
    found = []
    for where in (("embeddings",), ("head",), ("head", "embeddings")):
        view = large(tied=True)
        run(RTN(bits=3, group=16, where=where), view)
        assert list(view.grids) == ["model.language_model.embed_tokens"]
        assert view.linear("lm_head").module.weight is view.table.module.weight
        found.append(view.weight(view.table.path).detach())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    blind = large(tied=True)
    apply_pass(RTN(bits=3, group=16, where=("embeddings",)), blind, context(blind, []))
    assert not torch.equal(found[0], blind.weight(blind.table.path))


def test_with_linears_it_is_rounded_first_and_they_see_it() -> None:
    view = fresh()
    notes = run(RTN(bits=4, group=8, where=("embeddings", "language")), view)
    assert notes.numbers["embeddings"] == 1 and notes.numbers["linears"] == len(view.linears("language"))
    assert set(view.grids) == {view.table.path, *(ref.path for ref in view.linears("language"))}
    stepwise = fresh()
    run(RTN(bits=4, group=8, where=("embeddings",)), stepwise)
    run(RTN(bits=4, group=8, where=("language",)), stepwise)
    found = weights(stepwise, "language")
    assert all(torch.equal(w, found[path]) for path, w in weights(view, "language").items())


def test_what_is_refused() -> None:
    view = fresh("paligemma")
    with pytest.raises(SelectorError, match="'embeddings' matches no linear"):
        GPTQ(group=8, where=("embeddings",)).requires(view, context(view, data("paligemma")))
    with pytest.raises(Unmet, match=r"quantize.rtn and quantize.mixed round the two as one"):
        GPTQ(group=8, where=("head",)).requires(view, context(view, data("paligemma")))
    run(RTN(bits=8, group=8, where=("embeddings",)), view, "paligemma")
    with pytest.raises(Unmet, match="embedding is quantized already"):
        run(RTN(bits=8, group=8, where=("head",)), view, "paligemma")


def test_two_kinds_of_grids_are_svlm_load_s_alone_and_said_to_be(tmp_path: Path) -> None:
    view = fresh()
    run(RTN(bits=4, group=16, where=("language",)), view)
    notes = run(RTN(bits=8, group=16, where=("embeddings",)), view)
    assert notes.numbers["stock_transformers"].startswith("does not load it, svlm.load does: ")
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    assert torch.equal(logits(again.model), logits(view.model))
    facts = export_model(tmp_path / "saved", "compressed-tensors", tmp_path / "copy", find=passes.find)
    assert any("stock transformers does not" in note and "embeddings" in note for note in facts["notes"])
    with pytest.raises(AttributeError, match="'Embedding' object has no attribute 'weight'"):
        tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    with pytest.raises(UsageError, match="gptq cannot hold 1 of"):
        export_model(tmp_path / "saved", "gptq", tmp_path / "gptq", find=passes.find)
    facts = export_model(tmp_path / "saved", "gptq_v2", tmp_path / "dense", find=passes.find, dense=True)
    assert list(facts["dense"]) == [view.table.path]


def test_a_misspelt_selector_is_told_of_the_embeddings():
    with pytest.raises(SelectorError, match="or 'embeddings'"):
        run(RTN(where=("embedings",)), large(tied=False))
