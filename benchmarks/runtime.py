"""Original in bf16 eager transformers against W4 (quantize.rtn, 4 bits in groups of 64), in torch and in OpenVINO.

    python benchmarks/runtime.py [--threads 1] [--rounds 3] [--only demo]

writes benchmarks/results/runtime.json: the demo model, and random weights at SmolVLM-256M's dimensions with four tiles
(whose head is quantized, too). CPU time is compared, one process, interleaved.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import svlm
from svlm.compress.base import Context
from svlm.compress.runtime.openvino.build import load_openvino
from svlm.passes.api import environment
from svlm.passes.bench import Contestant, interleaved

KEPT = Path(__file__).parent / "results" / "runtime.json"
TOKENS, TILES, IMAGE_TOKEN = 32, 4, 49190


def smolvlm() -> Any:
    """Random weights at SmolVLM-256M's dimensions, in bfloat16 values."""
    from transformers import AutoModelForImageTextToText, LlamaConfig, SmolVLMConfig
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    vision = SmolVLMVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512,
        patch_size=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    config = SmolVLMConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=IMAGE_TOKEN, scale_factor=4,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    view = svlm.view_of(model)
    view.storage_dtype = torch.bfloat16
    return view


def prompt() -> dict[str, torch.Tensor]:
    """Four tiles of 64 visual tokens and 32 of text."""
    g = torch.Generator().manual_seed(0)
    words = torch.randint(3, 40000, (1, 32), generator=g)
    ids = torch.cat([words[:, :4], torch.full((1, 64 * TILES), IMAGE_TOKEN), words[:, 4:]], 1)
    pixels = torch.randn(1, TILES, 3, 512, 512, generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def narrow(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}


def race(
    name: str, make: Any, batch: dict[str, torch.Tensor], where: tuple[str, ...], threads: int, rounds: int
) -> Any:
    def compressed() -> Any:
        view = make()
        ctx = Context([], lambda *a, **k: None, nullcontext)
        svlm.apply_pass(svlm.find("quantize.rtn")(bits=4, group=64, where=where), view, ctx)
        return view

    with tempfile.TemporaryDirectory() as folder:
        size = {"original": svlm.save(make(), Path(folder) / "a"), "w4": svlm.save(compressed(), Path(folder) / "b")}
        fast = load_openvino(compressed(), batch, Path(folder) / "ir", threads=threads)
        size["openvino"] = fast.notes["bytes"]
    original, torch_view = make(), compressed()
    for view in (original, torch_view):
        view.model.bfloat16()
    runners = [
        Contestant("original", original, original.model.generate, narrow(batch)),
        Contestant("torch", torch_view, torch_view.model.generate, narrow(batch)),
        Contestant("openvino", fast.view, fast.generate, batch),
    ]
    timed = interleaved(runners, TOKENS, rounds)
    faster = {
        runtime: {p: round(timed["original"]["cpu_ms"][p] / ms, 3) for p, ms in timed[runtime]["cpu_ms"].items() if ms}
        for runtime in ("torch", "openvino")
    }
    made = {"bytes": size, "times_faster": faster, "timed": timed}
    print(name, json.dumps(faster), size, flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["demo", "smolvlm-256m"])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    made: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    if asked.only != "smolvlm-256m":
        from svlm.calib.ask import example_prompt

        batch = example_prompt(svlm.load_view("demo"))
        parts = ("vision", "connector", "language")
        made["demo"] = race("demo", lambda: svlm.load_view("demo"), batch, parts, asked.threads, asked.rounds)
    if asked.only != "demo":
        parts = ("vision", "connector", "language", "head")
        made["smolvlm-256m"] = race("smolvlm-256m", smolvlm, prompt(), parts, asked.threads, asked.rounds)
    made["environment"] = environment()
    KEPT.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
