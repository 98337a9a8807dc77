"""Generation after fuse.prefuse: caches, several images, later turns, rows without an image."""

from __future__ import annotations

import pytest
import torch

from svlm.compress.runtime.reduce import installed
from tests import zoo
from tests.passes.fuse.prefused import CLOSE, fused
from tests.passes.tokens.helpers import generate, kept_of, logits, single, two_images


def test_generation_with_and_without_cache_and_one_by_one(family):
    _, _, batch, view = family
    together, full = generate(view.model, batch), logits(view.model, batch)
    assert torch.equal(together, generate(view.model, batch, use_cache=False))
    assert installed(view.model).generating.given is None
    for row in range(3):
        alone = single(batch, row)
        torch.testing.assert_close(logits(view.model, alone)[0], full[row, -alone["input_ids"].shape[1] :], **CLOSE)
        assert torch.equal(generate(view.model, alone)[0], together[row])
    original = generate(zoo.model(family[0]), batch)
    assert not torch.equal(original, together), "the weights are others: so are the answers"


def test_answers_scored_with_labels_are_those_that_generation_makes(family):
    """Teacher-forced logits of an answer, marked by labels, are the logits of generating it; without labels not."""
    name, _, batch, view = family
    alone = single(batch, 0)
    settings = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [0, zoo.IMAGE, zoo.VIDEO]}
    made = view.model.generate(**alone, max_new_tokens=4, return_dict_in_generate=True, output_logits=True, **settings)
    length = alone["input_ids"].shape[1]
    ids = made.sequences
    labels = torch.where(torch.arange(ids.shape[1]) < length, -100, ids)
    whole = {k: v for k, v in alone.items() if v.shape != alone["input_ids"].shape}
    whole |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in alone:
        whole["mm_token_type_ids"] = (ids == zoo.IMAGE).int()
    if "token_type_ids" in alone:
        types = (ids == zoo.IMAGE).long() if name == "gemma3" else (torch.arange(ids.shape[1]) >= length).long()[None]
        whole["token_type_ids"] = types
    with torch.no_grad():
        scored = view.model(**whole, labels=labels).logits[0, length - 1 : -1]
        unmarked = view.model(**whole).logits[0, length - 1 : -1]
    wanted = torch.cat(made.logits)
    torch.testing.assert_close(scored, wanted, **CLOSE)
    torch.testing.assert_close(unmarked[0], wanted[0], **CLOSE)
    assert not torch.allclose(unmarked[1:], wanted[1:], **CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "qwen3-vl"])
def test_two_images_in_one_prompt(name):
    view, batch = fused(zoo.model(name)), two_images(9, name)
    full = logits(view.model, batch)
    assert view.visual_tokens(batch) == [4, 2]
    kept = kept_of(view, batch) & (batch["input_ids"] == zoo.IMAGE)
    assert kept.sum(1).tolist() == [4, 2]
    changed = batch | {"pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][len(batch["pixel_values"]) // 3 : 2 * len(batch["pixel_values"]) // 3] += 1
    second = int(kept[0].nonzero()[2])
    other = logits(view.model, changed)
    torch.testing.assert_close(other[0, : second - 4], full[0, : second - 4])
    torch.testing.assert_close(other[1], full[1])
    assert not torch.allclose(other[0, -1], full[0, -1]), "the second image's change is seen at the end"
    assert torch.equal(generate(view.model, batch), generate(view.model, batch, use_cache=False))


def test_a_later_turn_on_the_same_cache(llava):
    """Its text is not fused, as if labels had marked all after the first prompt. A new image is, with its turn."""
    _, batch, view = llava
    first = single(batch, 0)
    more = torch.randint(3, zoo.END - 1, (1, 5), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        cache = view.model(**first, use_cache=True).past_key_values
        ids = torch.cat([first["input_ids"], more], 1)
        cached = view.model(input_ids=more, attention_mask=torch.ones_like(ids), past_key_values=cache).logits
        labels = torch.where(torch.arange(ids.shape[1]) < first["input_ids"].shape[1], -100, ids)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": first["pixel_values"]}
        fresh = view.model(**whole, labels=labels).logits
    torch.testing.assert_close(cached, fresh[:, -5:], **CLOSE)
    image = torch.full((1, 16), zoo.IMAGE)
    turn = torch.cat([more[:, :2], image, more[:, 2:]], 1)
    ids = torch.cat([ids, turn], 1)
    with torch.no_grad():
        given = {"input_ids": turn, "pixel_values": torch.randn(1, 3, 16, 16)}
        out = view.model(**given, attention_mask=torch.ones_like(ids), past_key_values=cache)
    assert out.logits.shape[1] == 21 and out.past_key_values.get_seq_length() == ids.shape[1]
    assert out.past_key_values.get_query_offset() == ids.shape[1] - 2 * (16 - 2), "2 tokens of each image are held"


def test_rows_without_an_image_are_left_alone(llava):
    model, _, view = llava
    batch = two_images()
    ids = batch["input_ids"].clone()
    ids[1, ids[1] == zoo.IMAGE] = 7
    mixed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": batch["pixel_values"][:2]}
    text = {"input_ids": ids[1:], "attention_mask": torch.ones_like(ids[1:])}
    torch.testing.assert_close(logits(view.model, mixed)[1], logits(model, text)[0], **CLOSE)
    assert torch.equal(logits(view.model, text), logits(model, text))
