"""Cutting the vocabulary of a model: every family's logits on kept tokens, ids, grids, a view of the original."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf

from svlm import passes
from svlm.compress import vocabulary
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Context
from svlm.compress.errors import Unmet, UsageError
from svlm.compress.pipeline import apply_pass
from svlm.compress.runtime.grid import on_grid
from svlm.compress.vocabulary import Numbering, composed, find_cut, from_ranges, named_ids, narrow, ranges, speaking
from tests import speakers, zoo

IDS = ("input_ids", "labels")


def cut(view: ModelView, batch: dict[str, torch.Tensor], share: float = 0.5) -> Any:
    """Of a random subset of the tokens: those of the batch, of the configs, and some more."""
    model = view.model
    rows = vocabulary.table_rows(model)
    g = torch.Generator().manual_seed(5)
    more = torch.randperm(rows, generator=g)[: int(share * rows)].tolist()
    used = {i for name in IDS if name in batch for i in batch[name].unique().tolist()}
    return find_cut(view, sorted(i for i in {*more, *used, *named_ids(model)} if 0 <= i < rows))


def renumbered(batch: dict[str, torch.Tensor], numbering: Numbering) -> dict[str, torch.Tensor]:
    return batch | {name: batch[name].clone().apply_(numbering) for name in IDS if name in batch}


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def counts(module: torch.nn.Module) -> dict[str, int]:
    """Sizes and ids that a module keeps."""
    return {key: value for key, value in vars(module).items() if type(value) is int}


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_logits_of_kept_tokens_are_those_from_before(family: str, tmp_path) -> None:
    model, batch = zoo.build(family)
    before = logits(model, batch)
    view = view_of(model)
    found = cut(view, batch)
    kept = list(found.numbering.kept)
    assert len(kept) < zoo.VOCAB
    narrow(view, found)
    small = renumbered(batch, found.numbering)
    after = logits(model, small)
    assert after.shape[-1] == len(kept)
    torch.testing.assert_close(after, before[..., kept], rtol=0, atol=1e-6)
    assert view.vocabulary == tuple(kept)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(again, small), after)
    for (name, mine), (_, stock) in zip(model.named_modules(), again.named_modules(), strict=True):
        assert counts(mine) == counts(stock), name
    prompt = {k: v for k, v in small.items() if k != "labels"}
    assert again.generate(**prompt, max_new_tokens=2, do_sample=False).max() < len(kept)


def test_ids_of_configs_follow_and_placeholders_beyond_the_table_stay_beyond() -> None:
    model = speakers.llava(50, image_token=53)
    view = view_of(model)
    found = find_cut(view, [0, 1, 2, 3, 10, 20])
    assert named_ids(model) == {0, 1, 2, 3, 53}
    narrow(view, found)
    assert view.image_token_id == 9 and model.config.text_config.vocab_size == 6
    with pytest.raises(KeyError):
        found.numbering(4)
    assert found.numbering(-100) == -100 and found.numbering(20) == 5
    again = find_cut(view, [0, 1, 2, 3, 5])
    model.generation_config.eos_token_id = [2, 5]
    model.generation_config.bad_words_ids = [[5, 3], [2]]
    narrow(view, again)
    assert model.generation_config.eos_token_id == [2, 4] and model.generation_config.bad_words_ids == [[4, 3], [2]]
    assert model.generation_config.suppress_tokens == [3] and view.image_token_id == 8
    assert view.vocabulary == (0, 1, 2, 3, 20), "ids of the original"


def test_ids_that_nothing_renumbers_are_refused() -> None:
    model = speakers.llava(50)
    model.generation_config.sequence_bias = {(3,): 1.0}
    with pytest.raises(Unmet, match="sequence_bias"):
        named_ids(model)


def test_ids_of_another_vocabulary_stay_as_they_are() -> None:
    model, batch = zoo.build("blip-2")
    model.config.qformer_config.update({"vocab_size": 77, "pad_token_id": 55})
    assert 55 not in named_ids(model)
    view = view_of(model)
    narrow(view, cut(view, batch))
    assert model.config.qformer_config.pad_token_id == 55 and model.config.qformer_config.vocab_size == 77


def test_a_size_that_counts_something_else_too_is_refused(monkeypatch) -> None:
    model = speakers.llava(50)
    built = vocabulary.blueprint

    def strange(model: Any, config: Any) -> Any:
        made = built(model, config)
        made.model.multi_modal_projector.linear_1 = torch.nn.Linear(32, 32 + config.text_config.vocab_size // 50)
        return made

    monkeypatch.setattr(vocabulary, "blueprint", strange)
    with pytest.raises(Unmet, match="no vocabulary") as error:
        find_cut(view_of(model), [0, 1, 2, 3, 4])
    assert "multi_modal_projector.linear_1" in str(error.value)


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_rows_keep_their_grid(tied: bool) -> None:
    view = view_of(speakers.llava(50, tied=tied))
    step = passes.find("quantize.rtn").from_settings(
        {"bits": 4, "group": 16, "symmetric": False, "where": ["embeddings", "head"]}
    )
    apply_pass(step, view, Context([], lambda *a, **k: None, lambda: None))
    before = {path: view.model.get_submodule(path).weight.detach().clone() for path in view.grids}
    kept = [0, 1, 2, 3, 4, 30, 31, 49]
    narrow(view, find_cut(view, kept))
    assert len(view.grids) == (1 if tied else 2)
    for path, grid in view.grids.items():
        weight = view.model.get_submodule(path).weight
        assert torch.equal(weight, before[path][kept]) and on_grid(weight, grid) and grid.zero.shape[0] == 8
    assert view.tied_embeddings == tied
    step.ensures(view)


def test_a_head_in_blocks_that_span_rows_is_refused() -> None:
    view = view_of(speakers.llava(50, tied=False))
    step = passes.find("quantize.bnb").from_settings({"where": ["head"]})
    apply_pass(step, view, Context([], lambda *a, **k: None, lambda: None))
    with pytest.raises(Unmet, match="share their scales"):
        find_cut(view, [0, 1, 2, 3, 4])


def test_the_original_without_rows_shares_all_the_rest() -> None:
    original = view_of(speakers.llava(50))
    before = {k: v.clone() for k, v in original.model.state_dict().items()}
    kept = (0, 1, 2, 3, 4, 20, 40)
    view = speaking(original, kept, None)
    assert isinstance(view, ModelView) and view.vocabulary == kept and original.vocabulary is None
    own = {t.data_ptr() for t in original.model.parameters()}
    fresh = [name for name, t in view.model.named_parameters() if t.data_ptr() not in own]
    assert fresh == ["model.language_model.embed_tokens.weight"]
    assert all(torch.equal(before[k], v) for k, v in original.model.state_dict().items())
    assert original.model.config.text_config.vocab_size == 50 and original.decoder.vocab_size == 50
    nearer = speaking(view, (0, 1, 2, 3, 4, 40), None)
    assert torch.equal(nearer.table.module.weight[5], original.table.module.weight[40])
    for lacking in ((0, 1, 2, 3, 4, 21), None, (0, 1, 2, 3, 4, 49)):
        with pytest.raises(UsageError, match="its original lacks"):
            speaking(view, lacking, None)


def test_a_token_pass_before_goes_on_seeing_the_picture() -> None:
    model = speakers.llava(50, image_token=30)
    view = view_of(model)
    batch = {
        "input_ids": torch.tensor([[1, 30, 30, 30, 30, 7, 8]]),
        "attention_mask": torch.ones(1, 7, dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 16, 16),
    }
    step = passes.find("tokens.grid").from_settings({"keep": 0.5})
    apply_pass(step, view, Context([batch], lambda *a, **k: None, lambda: None))
    before = logits(model, batch)
    found = cut(view, batch)
    narrow(view, found)
    after = logits(model, renumbered(batch, found.numbering))
    torch.testing.assert_close(after, before[..., list(found.numbering.kept)], rtol=0, atol=1e-6)
    assert view.visual_tokens(renumbered(batch, found.numbering)) == [2]


def test_ranges() -> None:
    ids = (0, 1, 2, 5, 9, 10)
    assert ranges(ids) == "0-2 5 9-10" and from_ranges(ranges(ids)) == ids and from_ranges(ranges(())) == ()
    assert composed(None, ids) == ids and composed(ids, (0, 3, 5)) == (0, 5, 10)


def test_a_copy_stands_alone() -> None:
    view = view_of(speakers.llava(50))
    narrow(view, find_cut(view, range(20)))
    assert copy.deepcopy(view.model).get_input_embeddings().weight.shape == (20, 32)
