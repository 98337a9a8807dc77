"""Weights and activations in 8 bits: what they cost in answers on the demo model, and what they save in OpenVINO.

    python benchmarks/int8.py quality [--fit 64 --check 384]
    python benchmarks/int8.py speed                             a random tower of SigLIP's kind, interleaved medians

`speed` compares one picture through the tower: floats, calibrated 8-bit inputs as svlm compiles them on this processor,
and the same with openvino's integer kernels in any case (`exact` says whether these add up right here).
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch

import svlm
from svlm.calib.walk import Walk
from svlm.compress.anatomy import view_of
from svlm.compress.base import Context
from svlm.passes.quantize._w8a8 import Wish, eight_bits

PARTS = ("vision", "connector", "language")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "weights alone": ("quantize.rtn", {"bits": 8, "group": -1, "search": "none"}),
    "token, search": ("quantize.smooth", {}),
    "token, search, balanced": ("quantize.smooth", {"token_weights": "balanced"}),
    "token, search, uniform": ("quantize.smooth", {"token_weights": "uniform"}),
    "token, 0.5": ("quantize.smooth", {"alpha": 0.5}),
    "token, unsmoothed": ("", {}),
    "static, unsmoothed": ("quantize.static", {"alpha": "none"}),
    "static, unsmoothed, whole range": ("quantize.static", {"alpha": "none", "range": "max"}),
    "static, search": ("quantize.static", {"alpha": "search"}),
    "static, 0.5": ("quantize.static", {"alpha": 0.5}),
    "static everywhere, search": ("quantize.static", {"where": PARTS, "alpha": "search"}),
}


def quality(fit: int, check: int, seed: int) -> None:
    data = svlm.CalibrationSet.load("demo", fit=fit, check=check, seed=seed)
    bench = svlm.Workbench(svlm.load_view("demo"), data, latency=False)
    print(
        f"| case | KL | exact match, change | agreement |\n|---|---:|---:|---:|  fit {fit}, check {check}, seed {seed}"
    )
    for title, (name, settings) in CASES.items():
        small = svlm.load_view("demo")
        ctx = bench.context(small)
        if name:
            svlm.apply_pass(svlm.find(name)(**settings), small, ctx)
        else:
            eight_bits(small, ctx.walk(PARTS, name="plain"), Wish("token", "mse", "none", "gradient"))
        found, _ = bench.measure(small)
        change = 100 * found["exact_match"]["delta"]
        print(f"| {title} | {found['kl']:.2e} | {change:+.2f} | {found['agreement']:.4f} |", flush=True)


def tower(rounded: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random LLaVA whose tower has SigLIP-base's width and six of its layers: 256 patches."""
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 6}
    config = tf.LlavaConfig(
        vision_config=tf.SiglipVisionConfig(**sizes, image_size=256, patch_size=16, vision_use_head=False),
        text_config=tf.LlamaConfig(
            vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
        ),
        image_token_index=99,
        image_seq_length=256,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    view = view_of(tf.AutoModelForImageTextToText.from_config(config).eval())
    ids = torch.cat([torch.full((1, 256), 99), torch.arange(4)[None]], 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 256, 256)}
    if rounded:
        ctx = Context([batch], lambda where=None, **o: Walk(view, [batch], where, **o), nullcontext)
        step = svlm.find("quantize.static")(where=("vision",), alpha="none", token_weights="uniform")
        svlm.apply_pass(step, view, ctx)
    return view, batch


def speed(rounds: int, threads: int) -> None:
    import openvino as ov

    from svlm.compress.runtime.openvino.build import _settings, integers_exact
    from svlm.compress.runtime.openvino.convert import Image, convert_part, fix_shapes, observe

    core = ov.Core()
    exact = integers_exact(core)
    native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    print(f"integer kernels exact: {exact}; {threads} thread(s)")
    runs: dict[str, Any] = {}
    for title, rounded, kernels in (
        ("floats", False, None),
        ("8 bits, as compiled here", True, exact),
        ("8 bits, integer kernels", True, True),
    ):
        view, batch = tower(rounded)
        seen = observe(view, batch)
        path, call = view.tower_path, seen.calls[view.tower_path]
        graph, counts = convert_part(view, Image(view.tower, call), path, seen.examples[path])
        fix_shapes(graph, [[1, *shape] for shape in call.shapes])
        compiled = core.compile_model(graph, "CPU", _settings(path, counts, threads, native, kernels))
        with torch.no_grad():
            wanted = Image(view.tower, call)(*seen.examples[path])[0].numpy()
        request = compiled.create_infer_request()
        found = next(iter(request.infer({0: batch["pixel_values"].numpy()}).values()))
        off = abs(found - wanted).mean() / abs(wanted).mean()
        print(f"{title}: mean difference from torch {off:.2e}; {counts.static} inputs calibrated", flush=True)
        runs[title] = (request, batch["pixel_values"].numpy())
    times: dict[str, list[float]] = {title: [] for title in runs}
    for _ in range(rounds):
        for title, (request, pixels) in runs.items():
            start = time.process_time()
            request.infer({0: pixels})
            times[title].append(time.process_time() - start)
    base = statistics.median(times["floats"])
    for title, found in times.items():
        print(f"{title}: {1e3 * statistics.median(found):.1f} ms of CPU, {statistics.median(found) / base:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "speed"])
    parser.add_argument("--fit", type=int, default=64)
    parser.add_argument("--check", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if args.what == "quality":
        quality(args.fit, args.check, args.seed)
    else:
        speed(args.rounds, torch.get_num_threads())
