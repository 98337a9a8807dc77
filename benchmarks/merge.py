"""Token merging inside the vision tower: what it saves in time, and what it costs in answers.

    python benchmarks/merge.py --json benchmarks/results/merge.json                # both parts, all schedules
    python benchmarks/merge.py --only speed                                        # the CLIP-L sized tower alone
    python benchmarks/merge.py --only demo --steps 0 --schedules early constant    # answers without training

`speed`: a LLaVA with a tower of CLIP-L/336's dimensions (24 blocks, 1024 wide, 577 tokens) and random weights. The
tower of the original and those of copies that merge half of its tokens take turns in one process; CPU time, medians.

`demo`: the embedded model with half of its tokens merged, judged on the check split as after every pass, before and
after `distill.logits`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import svlm
from svlm.calib.cost import cost
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Context, evaluating
from svlm.compress.disk import write_json

IMAGE = 99
SCHEDULES = ("early", "decreasing", "constant")


def clip_l() -> tuple[ModelView, dict[str, torch.Tensor]]:
    """A LLaVA around a tower of CLIP-L/336's dimensions; the language model is as small as can be."""
    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = tf.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=1024,
    )  # fmt: skip
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=576)
    model = tf.AutoModelForImageTextToText.from_config(config).eval()
    ids = torch.tensor([[1, 2, *[IMAGE] * 576, 3, 4]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 336, 336)}
    return view_of(model), batch


def merged(view: ModelView, batch: dict[str, torch.Tensor], **settings: Any) -> ModelView:
    """A copy that shares its weights with `view`."""
    shared = {id(p): p for p in view.model.parameters()}
    made = view_of(copy.deepcopy(view.model, shared))
    ctx = Context([batch], lambda *a, **k: None, lambda: None)
    svlm.apply_pass(svlm.find("tokens.merge")(**settings), made, ctx)
    return made


def speed(rounds: int, keep: float, schedules: list[str]) -> dict[str, Any]:
    view, batch = clip_l()
    views = {"original": view} | {name: merged(view, batch, keep=keep, schedule=name) for name in schedules}
    times: dict[str, list[float]] = {name: [] for name in views}
    pixels = batch["pixel_values"]
    for number in range(rounds + 1):
        for name, one in views.items():
            with evaluating(one.model):
                start = time.process_time()
                one.tower(pixels)
                spent = time.process_time() - start
            if number:  # the first warms up
                times[name].append(spent)
    rows = {}
    for name, one in views.items():
        flops = cost(one, batch, latency=False)["flops"]["vision"]
        rows[name] = {"cpu_ms": 1000 * statistics.median(times[name]), "flops": flops}
    for name, row in rows.items():
        row["time_ratio"] = row["cpu_ms"] / rows["original"]["cpu_ms"]
        row["flops_ratio"] = row["flops"] / rows["original"]["flops"]
        print(
            f"{name:12} {row['cpu_ms']:8.0f} ms of CPU, {row['time_ratio']:.3f} of the original's time, "
            f"{row['flops_ratio']:.3f} of its FLOPs",
            flush=True,
        )
    return rows


def answers(steps: int, fit: int, check: int, keep: float, schedules: list[str]) -> dict[str, Any]:
    data = svlm.CalibrationSet.load("demo", fit=fit, check=check)
    bench = svlm.Workbench(svlm.load_view("demo"), data, latency=False)
    rows: dict[str, Any] = {}
    for schedule in schedules:
        view = svlm.load_view("demo")
        settings = {"keep": keep, "schedule": schedule}
        svlm.apply_pass(svlm.find("tokens.merge")(**settings), view, bench.context(view))
        rows[schedule] = {"untrained": judged(bench, view, schedule, "untrained")}
        if steps:
            svlm.apply_pass(svlm.find("distill.logits")(steps=steps), view, bench.context(view))
            rows[schedule][f"distilled, {steps} steps"] = judged(bench, view, schedule, f"{steps} steps")
    return rows


def judged(bench: svlm.Workbench, view: ModelView, schedule: str, what: str) -> dict[str, Any]:
    quality, _ = bench.measure(view)
    match = quality["exact_match"]
    print(
        f"{schedule:12} {what:12} exact match {match['value']:.2%}, {100 * match['delta']:+.1f} points "
        f"[{100 * match['ci95'][0]:.1f}, {100 * match['ci95'][1]:.1f}], KL {quality['kl']:.4f}",
        flush=True,
    )
    return {"exact_match": match, "kl": quality["kl"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "demo"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--steps", type=int, default=400, help="of distill.logits; 0: none")
    parser.add_argument("--fit", type=int, default=256)
    parser.add_argument("--check", type=int, default=512)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    torch.set_num_threads(1)
    made: dict[str, Any] = {"keep": o.keep}
    if o.only != "demo":
        made["speed"] = speed(o.rounds, o.keep, o.schedules)
    if o.only != "speed":
        made["demo"] = answers(o.steps, o.fit, o.check, o.keep, o.schedules)
    if o.json:
        write_json(o.json, made)


if __name__ == "__main__":
    main()
