"""Batches hold the model's own tokens, padded on the left, and labels on the answer and its end alone."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PaliGemmaProcessor, TrOCRProcessor

from svlm.calib.dataset import CalibrationSet, ImageSource, Sample
from svlm.calib.demo import MODEL
from svlm.calib.encode import Encoder
from svlm.compress.errors import DataError


@functools.cache
def shipped() -> Any:
    return AutoProcessor.from_pretrained(MODEL)


@functools.cache
def demo() -> CalibrationSet:
    return CalibrationSet.load("demo", fit=8, check=24)


def changed(template: str | None) -> Any:
    processor = copy.deepcopy(shipped())
    processor.chat_template = template
    processor.tokenizer.chat_template = None
    return processor


def noise(number: int, question: str, *answers: str, images: int = 1) -> Sample:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    picture = ImageSource(picture=Image.fromarray(pixels))
    return Sample(str(number), str(number), (picture,) * images, question, answers)


def learnt(encoder: Encoder, batch: dict[str, torch.Tensor]) -> list[str]:
    return [encoder.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_labels_are_the_first_answer_and_its_end_on_the_right_of_every_row() -> None:
    encoder = Encoder(shipped())
    samples = [noise(0, "where is the bear?", "top left", "up left"), noise(1, "is there a guitar?", "no")]
    batch = encoder.encode(samples)
    assert learnt(encoder, batch) == ["top left <eos>", "no <eos>"]
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert (labels[labels != -100] == ids[labels != -100]).all()
    assert (labels[:, -1] == encoder.tokenizer.eos_token_id).all()
    real = mask.sum(1)
    assert real[0] != real[1] and (mask[:, -1] == 1).all()
    for row, length in zip(range(2), real):
        assert (ids[row, :-length] == encoder.tokenizer.pad_token_id).all() and mask[row, -length:].all()
        assert (ids[row] == shipped().image_token_id).sum() == 64
    assert batch["pixel_values"].shape == (2, 3, 96, 96)


def test_a_batch_is_what_the_processor_itself_makes_of_the_conversation() -> None:
    sample = noise(0, "where is the bear?", "top left")
    chat = [*sample.conversation, {"role": "assistant", "content": "top left"}]
    text = shipped().apply_chat_template(chat)
    expected = shipped()(images=[sample.images[0].open()], text=[text], add_special_tokens=False, return_tensors="pt")
    batch = Encoder(shipped()).encode([sample])
    for key in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[key], expected[key]), key


def test_prompts_end_where_the_answer_begins() -> None:
    encoder = Encoder(shipped())
    samples = demo().check[:8]
    prompts, whole = encoder.prompts(samples), encoder.encode(samples)
    assert "labels" not in prompts and set(encoder.encode(samples, answers=False)) == set(prompts)
    for i in range(8):
        asked = prompts["input_ids"][i][prompts["attention_mask"][i] == 1]
        told = whole["input_ids"][i][(whole["attention_mask"][i] == 1) & (whole["labels"][i] == -100)]
        assert torch.equal(asked, told)


def test_a_padded_row_has_the_logits_of_a_row_alone() -> None:
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    encoder = Encoder(shipped())
    samples = sorted(demo().check, key=lambda s: len(s.question or ""))[:: len(demo().check) - 1]
    with torch.no_grad():
        together = model(**{k: v for k, v in encoder.encode(samples).items() if k != "labels"}).logits
        for row, sample in zip(together, samples):
            alone = model(**{k: v for k, v in encoder.encode([sample]).items() if k != "labels"}).logits[0]
            torch.testing.assert_close(row[-6:], alone[-6:], atol=1e-4, rtol=1e-4)
        prompts = encoder.prompts(samples)
        tokens = model.generate(**prompts, max_new_tokens=6, do_sample=False)
    answers = encoder.decode(tokens[:, prompts["input_ids"].shape[1] :])
    assert len(answers) == 2 and all(a and "<" not in a and a == a.strip() for a in answers)
    assert encoder.read_answer(tokens[0, prompts["input_ids"].shape[1] :]) == answers[0]


def test_decode_leaves_out_what_is_no_text() -> None:
    encoder = Encoder(shipped())
    ids = encoder.tokenizer("top left", add_special_tokens=False)["input_ids"]
    eos, pad = encoder.tokenizer.eos_token_id, encoder.tokenizer.pad_token_id
    assert encoder.decode(torch.tensor([[*ids, eos, pad], [-100, -100, *ids]])) == ["top left", "top left"]
    assert encoder.decode([[eos, pad]]) == [""]


def test_batches_are_all_samples_in_order() -> None:
    encoder = Encoder(shipped())
    batches = list(encoder.batches(demo().check[:10], 4))
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 2]
    said = [text.removesuffix("<eos>").strip() for b in batches for text in learnt(encoder, b)]
    assert said == [s.answers[0] for s in demo().check[:10]]


def test_an_empty_answer_teaches_to_stop() -> None:
    encoder = Encoder(shipped())
    assert learnt(encoder, encoder.encode([noise(0, "where is the bear?", "")])) == ["<eos>"]


def test_earlier_turns_are_part_of_the_prompt() -> None:
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many objects are there?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        {"role": "user", "content": [{"type": "text", "text": "where is the bear?"}]},
    ]
    one = noise(0, "where is the bear?", "top left")
    encoder = Encoder(shipped())
    batch = encoder.encode([Sample("0", "0", one.images, one.question, one.answers, {}, turns)])
    assert learnt(encoder, batch) == ["top left <eos>"]
    assert "how many objects are there ? <assistant> 3 <eos>" in encoder.tokenizer.decode(batch["input_ids"][0])


NO_END = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}{% if p['type'] == 'image' %}"
)
NO_END += "<image>{% else %} {{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"


def test_a_template_without_an_end_of_turn_gets_the_eos() -> None:
    encoder = Encoder(changed(NO_END + PROMPT))
    batch = encoder.encode([noise(0, "where is the bear?", "top left"), noise(1, "where is the bear?", "3")])
    assert learnt(encoder, batch) == ["top left <eos>", "3 <eos>"]


def test_what_the_template_writes_after_the_end_of_turn_is_not_learnt() -> None:
    after = "{% if not add_generation_prompt %}<eos> the{% endif %}"
    encoder = Encoder(changed(NO_END + PROMPT + after))
    batch = encoder.encode([noise(0, "where is the bear?", "top left")])
    assert encoder.tokenizer.decode(batch["input_ids"][0]).endswith("top left <eos> the <eos>")
    tidy = Encoder(changed(NO_END + PROMPT + "{% if not add_generation_prompt %}<eos> {% endif %}"))
    assert learnt(tidy, tidy.encode([noise(0, "where is the bear?", "top left")])) == ["top left <eos>"]


def test_a_template_that_renders_the_prompt_differently_is_refused() -> None:
    other = NO_END + "{% if add_generation_prompt %}<assistant> the{% endif %}"
    with pytest.raises(DataError, match="renders a prompt differently") as error:
        Encoder(changed(other)).encode([noise(0, "where is the bear?", "top left")])
    assert "sample 0" in error.value.where and "chat template" in error.value.change


def test_a_processor_without_a_template_is_asked_in_plain_text() -> None:
    encoder = Encoder(changed(None))
    batch = encoder.encode([noise(0, "where is the bear?", "top left"), noise(1, "is there a guitar?", "no")])
    assert learnt(encoder, batch) == ["top left <eos>", "no <eos>"]
    assert (batch["input_ids"] == shipped().image_token_id).sum(1).tolist() == [64, 64]
    asked = encoder.tokenizer.decode(encoder.prompts([noise(0, "where is the bear?")])["input_ids"][0])
    assert asked.endswith("<image> where is the bear ?")


def test_a_template_for_texts_gets_the_placeholder_as_text() -> None:
    processor = changed(None)
    processor.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}" + PROMPT
    )
    encoder = Encoder(processor)
    batch = encoder.encode([noise(0, "where is the bear?", "top left")])
    assert learnt(encoder, batch) == ["top left <eos>"]
    assert (batch["input_ids"] == processor.image_token_id).sum() == 64


def test_paligemma_has_its_processor_join_prompt_and_answer() -> None:
    images = copy.deepcopy(shipped().image_processor)
    images.image_seq_length = 9
    tokenizer = copy.deepcopy(shipped().tokenizer)
    encoder = Encoder(PaliGemmaProcessor(images, tokenizer))
    batch = encoder.encode([noise(0, "where is the bear?", "top left"), noise(1, "is there a guitar?", "no")])
    assert learnt(encoder, batch) == ["top left <eos>", "no <eos>"]
    assert (batch["input_ids"] == encoder.processor.image_token_id).sum(1).tolist() == [9, 9]
    assert "labels" not in encoder.prompts([noise(0, "where is the bear?")])


def test_a_decoder_of_its_own_gets_labels_of_its_own() -> None:
    encoder = Encoder(TrOCRProcessor(shipped().image_processor, shipped().tokenizer))
    batch = encoder.encode([noise(0, "what does it say?", "top left"), noise(1, "what does it say?", "no")])
    assert set(batch) == {"pixel_values", "labels"} and batch["pixel_values"].shape[0] == 2
    assert learnt(encoder, batch) == ["top left <eos>", "no <eos>"]
    assert batch["labels"][1].tolist()[2:] == [-100]  # padded on the right, where the decoder goes on
    assert set(encoder.prompts([noise(0, "what does it say?")])) == {"pixel_values"}
    apart = Encoder(shipped(), seq2seq=True).encode([noise(0, "where is the bear?", "no")])
    assert learnt(encoder, apart) == ["no <eos>"] and apart["labels"].shape[1] == 2 < apart["input_ids"].shape[1]


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no processor") as missing:
        Encoder(None)
    assert "processor_config.json" in missing.value.change
    with pytest.raises(DataError, match="no processor with tokenizer"):
        Encoder(shipped().image_processor)
    encoder = Encoder(shipped())
    with pytest.raises(DataError, match="without an answer"):
        encoder.encode([noise(0, "where is the bear?")])
    with pytest.raises(DataError, match="zero samples"):
        encoder.prompts([])
    with pytest.raises(DataError, match="no such image"):
        encoder.prompts([Sample("0", "0", (ImageSource(tmp_path / "lost.png"),), "what?")])


def test_image_tokens_that_were_cut_off_are_refused() -> None:
    long = noise(0, "where is the bear?", "top left", images=9)  # 576 image tokens; the model takes 512
    with pytest.raises(DataError, match="does not fit the model's 512"):
        Encoder(shipped()).encode([noise(1, "where is the bear?", "top left"), long])
    blind = changed("{{ bos_token }}<user> {{ messages[0]['content'][-1]['text'] }}" + PROMPT)
    with pytest.raises(DataError):
        Encoder(blind).prompts([noise(0, "where is the bear?")])
