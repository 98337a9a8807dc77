"""Original in bf16 eager transformers against compressed models in torch and in OpenVINO.

    python benchmarks/runtime.py [--threads 1] [--rounds 3] [--only demo] [--resume]

writes benchmarks/results/runtime.json: the demo model, and random weights at SmolVLM-256M's dimensions with four tiles
(whose head is quantized, too). In torch all linears have 4 bits in groups of 64, plainly rounded; in OpenVINO those of
the vision tower have 8 bits and calibrated 8-bit inputs instead (quantize.static), for integer kernels. CPU time is
compared, one process, interleaved. Every round is written as it ends, so that --resume goes on with the next one. On a
processor without bfloat16 the original's vision tower takes most of the time, a minute and more a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import svlm
from svlm.calib.walk import Walk
from svlm.compress.base import Context
from svlm.compress.disk import write_json
from svlm.compress.runtime.kernels.use import rows as rows_of
from svlm.compress.runtime.kernels.use import says, use_kernels
from svlm.compress.runtime.openvino.build import load_openvino
from svlm.passes.api import environment
from svlm.passes.bench import Contestant, medians, one_round

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


def prompt(tiles: int = TILES) -> dict[str, torch.Tensor]:
    """Tiles of 64 visual tokens, and 32 tokens of text."""
    g = torch.Generator().manual_seed(0)
    words = torch.randint(3, 40000, (1, 32), generator=g)
    ids = torch.cat([words[:, :4], torch.full((1, 64 * tiles), IMAGE_TOKEN), words[:, 4:]], 1)
    pixels = torch.randn(1, TILES, 3, 512, 512, generator=g)[:, :tiles]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def compressed(make: Any, where: tuple[str, ...], fit: dict[str, torch.Tensor] | None) -> Any:
    """A model with 4 bits in the parts `where`; with `fit` its tower in 8 bits, inputs calibrated on that batch."""
    view = make()
    data = [] if fit is None else [{"labels": fit["input_ids"]} | fit]
    ctx = Context(data, lambda where=None, **o: Walk(view, data, where, **o), nullcontext)
    four = tuple(part for part in where if fit is None or part != "vision")
    svlm.apply_pass(svlm.find("quantize.rtn")(bits=4, group=64, where=four, search="none"), view, ctx)
    if fit is not None:
        svlm.apply_pass(svlm.find("quantize.static")(where=("vision",)), view, ctx)
    return view


def given(batch: dict[str, torch.Tensor], view: Any) -> dict[str, torch.Tensor]:
    """The batch in the dtype that the model runs in."""
    return {k: v.to(view.model.dtype) if v.is_floating_point() else v for k, v in batch.items()}


def race(
    name: str,
    make: Any,
    batch: dict[str, torch.Tensor],
    fit: dict[str, torch.Tensor],
    where: tuple[str, ...],
    asked: Any,
    made: dict[str, Any],
) -> None:
    """Add to `made` what is missing of its rounds."""
    kept = made.setdefault(name, {})
    rounds = kept.setdefault("rounds", [])
    if len(rounds) >= asked.rounds:
        return

    told = Told(name)
    with tempfile.TemporaryDirectory() as folder:
        original = make()
        size = {"original": svlm.save(original, Path(folder) / "original")}
        original.model.bfloat16()
        size["torch"] = svlm.save(compressed(make, where, None), Path(folder) / "torch")
        told("quantized and saved")
        small = compressed(make, where, fit)
        size["openvino"] = svlm.save(small, Path(folder) / "openvino")
        told("the tower calibrated")
        fast = load_openvino(small, batch, Path(folder) / "ir", threads=asked.threads)
        size["openvino_graphs"] = fast.notes["bytes"]
        told("converted for openvino")
        torch_view = svlm.load_view(Path(folder) / "torch")
    facts = use_kernels(torch_view)
    gc.collect()
    told("kernels measured")
    print("\n".join(says(facts)), flush=True)
    runners = [
        Contestant("original", original, original.model.generate, given(batch, original)),
        Contestant("torch", torch_view, torch_view.model.generate, given(batch, torch_view)),
        Contestant("openvino", fast.view, fast.generate, batch),
    ]
    warm = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    warm = {k: v[:, batch["input_ids"][0] != original.image_token_id] for k, v in warm.items()}
    for c in runners:
        first = warm if c.name == "original" else c.inputs
        c.generate(**first, max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
        told(f"{c.name} is warm")
    while len(rounds) < asked.rounds:
        row = {}
        turn = len(rounds) % len(runners)  # what ran before leaves caches and matrix units as it used them
        for c in runners[turn:] + runners[:turn]:
            row[c.name] = one_round(c, TOKENS)
            told(f"round {len(rounds) + 1} {c.name}: {row[c.name]['end_to_end'][1] / 1000:.1f} s of CPU")
        rounds.append(row)
        titles, cells = rows_of(facts)
        kept.update(bytes=size, kernels={"titles": titles, "rows": cells, "says": says(facts)})
        kept["integer_kernels"] = fast.notes["integer_kernels"]
        kept.update(summary(rounds))
        write(made)
    print(name, json.dumps(kept["times_faster"]), size, flush=True)


class Told:
    """Says how far a race is, with the seconds since its start."""

    def __init__(self, name: str) -> None:
        self.name, self.start = name, time.monotonic()

    def __call__(self, what: str) -> None:
        print(f"{self.name} {time.monotonic() - self.start:5.0f} s: {what}", flush=True)


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    timed = {name: medians([row[name] for row in rounds]) for name in rounds[0]}
    faster = {
        runtime: {p: round(timed["original"]["cpu_ms"][p] / ms, 3) for p, ms in timed[runtime]["cpu_ms"].items() if ms}
        for runtime in timed
        if runtime != "original"
    }
    return {"times_faster": faster, "timed": timed}


def write(made: dict[str, Any]) -> None:
    write_json(KEPT, made | {"environment": environment()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["demo", "smolvlm-256m"])
    parser.add_argument("--resume", action="store_true", help="keep the rounds that are there, make the others")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    made: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    if asked.only != "smolvlm-256m":
        from svlm.calib.ask import example_prompt
        from svlm.calib.encode import Encoder

        if not asked.resume:
            made.pop("demo", None)
        view = svlm.load_view("demo")
        fit = Encoder(view.processor).encode(svlm.CalibrationSet.load("demo", fit=64, check=1).fit)
        parts = ("vision", "connector", "language")
        race("demo", lambda: svlm.load_view("demo"), example_prompt(view), fit, parts, asked, made)
    if asked.only != "demo":
        if not asked.resume:
            made.pop("smolvlm-256m", None)
        race("smolvlm-256m", smolvlm, prompt(), prompt(1), ("vision", "connector", "language", "head"), asked, made)


if __name__ == "__main__":
    main()
