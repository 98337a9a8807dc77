"""The demo model: what ships loads with stock classes, knows its data, and was trained as it is asked."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from svlm.calib.demo import MODEL, build, layout, outliers, rows, scene


@functools.cache
def shipped() -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(MODEL)


def chat(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return [*said, {"role": "assistant", "content": answer}] if answer else said


def test_training_layout_equals_single_questions() -> None:
    model, processor = build.build_model(), build.build_processor()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.ndim == 2 else 1)  # so that attention and answers depend on what they should
    scenes = [scene("val", i) for i in range(2)]
    asked = [[(q.question, q.answer) for q in made.questions[:5]] for made in scenes]
    packed = layout.pack(asked)
    with torch.no_grad():
        values = layout.pixels(np.stack([np.asarray(made.image) for made in scenes]))
        together = layout.language(model, layout.see(model, values), packed)
        for i, (made, pairs) in enumerate(zip(scenes, asked)):
            row = 0
            for question, answer in pairs:
                text = processor.apply_chat_template(chat(question, answer))
                inputs = processor(images=[made.image], text=[text], return_tensors="pt")
                count = len(layout.encode(answer)) + 1
                alone = model(**inputs).logits[0, -count - 1 : -1]
                assert inputs["input_ids"][0, -count:].tolist() == packed.labels[i, row : row + count].tolist()
                torch.testing.assert_close(together[i, row : row + count], alone, atol=1e-4, rtol=0)
                row += count


def test_outlier_channels_leave_the_function_alone() -> None:
    model, other = build.build_model(), build.build_model()
    outliers.spread(other, 0.5)
    ids = torch.randint(10, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    blocks = model.model.language_model.layers, other.model.language_model.layers
    assert all((a.mlp.up_proj.weight != b.mlp.up_proj.weight).any() for a, b in zip(*blocks))


def test_pixels_equal_the_processor() -> None:
    made = scene("val", 0).image
    ours = layout.pixels(np.asarray(made)[None])
    torch.testing.assert_close(ours, build.build_processor().image_processor(made, return_tensors="pt")["pixel_values"])


def test_the_vocabulary_knows_every_word_of_the_data() -> None:
    unknown = build.SPECIAL.index("<unk>")
    for row in rows("fit", 200, 4):
        assert unknown not in layout.encode(row["question"] + " " + row["answer"])


def test_processor_round_trip(tmp_path: Path) -> None:
    made = build.build_processor()
    made.save_pretrained(tmp_path)
    for other in (AutoProcessor.from_pretrained(tmp_path), shipped()[1]):
        texts = [p.apply_chat_template(chat("Where is the Bear?", "top left")) for p in (made, other)]
        assert texts[0] == texts[1]
        image = Image.new("RGB", (64, 80), (10, 200, 30))
        a, b = (p(images=[image], text=[texts[0]], return_tensors="pt") for p in (made, other))
        assert a["input_ids"].tolist() == b["input_ids"].tolist()
        torch.testing.assert_close(a["pixel_values"], b["pixel_values"])
        assert other.tokenizer.padding_side == "left"
        assert other.tokenizer.decode(a["input_ids"][0], skip_special_tokens=True) == "where is the bear ? top left"


def test_chat_template_takes_turns_and_plain_text() -> None:
    processor = shipped()[1]
    talk = [*chat("where is the bear?", "top left"), {"role": "user", "content": "and the ship?"}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert text == "<bos><user><image> where is the bear?<assistant> top left<eos><user> and the ship?<assistant>"


def test_the_folder_is_stock_and_small() -> None:
    model, _ = shipped()
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert sum(f.stat().st_size for f in MODEL.iterdir()) < 25e6
    assert not model.generation_config.do_sample and model.generation_config.eos_token_id == 2
    assert AutoModelForImageTextToText.from_pretrained(MODEL).dtype == torch.bfloat16


@pytest.mark.parametrize("blank", [False, True])
def test_it_answers(blank: bool) -> None:
    model, processor = shipped()
    asked = list(rows("check", 32, 3))
    texts = [processor.apply_chat_template(chat(row["question"]), add_generation_prompt=True) for row in asked]
    images = [Image.new("RGB", (96, 96), (128, 128, 128)) if blank else row["image"] for row in asked]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    said = processor.batch_decode(ids, skip_special_tokens=True)
    score = sum(a.strip() == row["answer"] for a, row in zip(said, asked)) / len(asked)
    assert score <= 0.5 if blank else score >= 0.8
