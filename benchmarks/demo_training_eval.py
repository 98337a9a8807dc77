"""What the shipped demo model can do, and what damage it shows: every figure that its documentation quotes.

    OMP_NUM_THREADS=2 python benchmarks/demo_training_eval.py [MODEL]

Exact match of greedy answers, generated through the processor and the chat template, in float32 from the shipped
bfloat16 weights: on the check split by kind, with blank pictures, on picture styles never trained on, on easy-VQA's
test split, and after naive round-to-nearest of the language model's linear layers. Writes `demo_training_eval.json`
next to this file.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from svlm.calib.demo import MODEL, easy_vqa_rows, rows

BATCH = 64
GRAY = Image.new("RGB", (96, 96), (128, 128, 128))


def answers(model: Any, processor: Any, data: list[dict[str, Any]]) -> list[str]:
    """Greedy answers to rows, through the chat template, in batches of questions of like length."""
    order = sorted(range(len(data)), key=lambda i: len(data[i]["question"].split()))
    out = [""] * len(data)
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        texts = []
        for i in part:
            content = [{"type": "image"}, {"type": "text", "text": data[i]["question"]}]
            texts.append(
                processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            )
        images = [data[i]["image"] for i in part]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt").to(model.dtype)
        ids = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(part, processor.batch_decode(ids, skip_special_tokens=True)):
            out[i] = text.strip()
    return out


def exact_match(model: Any, processor: Any, data: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Exact match over all rows and by kind."""
    listed = list(data)
    hits: dict[str, list[bool]] = defaultdict(list)
    for row, text in zip(listed, answers(model, processor, listed)):
        hits["all"].append(text == row["answer"])
        hits[row["tags"]["kind"]].append(text == row["answer"])
    return {"questions": len(listed), **{k: round(sum(v) / len(v), 4) for k, v in hits.items()}}


@torch.no_grad()
def rounded(model: Any, bits: int, group: int | None) -> Any:
    """A copy whose language model's linear weights are rounded to the nearest of 2^bits levels; group None: a row."""
    out = copy.deepcopy(model)
    for module in out.model.language_model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight
            w = weight.reshape(-1, group or weight.shape[1])
            scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
            levels = (w / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            weight.copy_((levels * scale).reshape(weight.shape))
    return out


def main() -> None:
    """Measure, print, write."""
    began = time.monotonic()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    check = list(rows("check", 700, 3))
    blank = [{**row, "image": GRAY} for row in check]
    out: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(f.stat().st_size for f in folder.iterdir()),
    }

    def note(name: str, value: dict[str, Any]) -> None:
        out[name] = value
        print(f"{name:28s} {json.dumps(value)}", flush=True)

    note("check", exact_match(model, processor, check))
    note("blank", exact_match(model, processor, blank))
    note("shifted", exact_match(model, processor, rows("shifted", 350, 3)))
    note("easy_vqa_test", exact_match(model, processor, easy_vqa_rows("test")))
    note("rtn_4_bits_group_64", exact_match(rounded(model, 4, 64), processor, check))
    note("rtn_3_bits_per_channel", exact_match(rounded(model, 3, None), processor, check))
    note("rtn_2_bits_group_64", exact_match(rounded(model, 2, 64), processor, check))
    out["seconds"] = round(time.monotonic() - began, 1)
    (Path(__file__).parent / "demo_training_eval.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
