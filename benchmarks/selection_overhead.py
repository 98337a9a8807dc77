"""What choosing visual tokens costs beside the vision tower: every method of the menu, 576 tokens in, 64 out, batch 8.

    python benchmarks/selection_overhead.py --json benchmarks/results/selection_overhead.json

A LLaVA-1.5 with random weights: a tower as large as CLIP-L (24 layers, width 1024, pictures of 336 pixels), features of
width 4096 for the choice. Per method: the choice itself (`Reduction.choose`) and whatever the pass does inside the
tower besides (hooks that it put there), both in CPU time, as a share of the tower's. Tower and choices take turns for
some rounds, medians are compared, so other work on the machine does not decide. Methods are those of the menu under
`tokens.` that choose; their settings are the defaults. What a pass does only where its model has data is left out.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import svlm
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Context, evaluating
from svlm.compress.disk import write_json
from svlm.compress.runtime.reduce import installed
from svlm.passes import names

IMAGE, TARGET = 5, 0.05
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def llava(layers: int, side: int, width: int) -> ModelView:
    """Random weights; the decoder is one thin block, for nothing is measured there."""
    vision = tf.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=side,
        patch_size=14,
    )
    text = tf.LlamaConfig(
        vocab_size=32, hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=width // 128
    )
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    torch.manual_seed(0)
    return view_of(tf.LlavaForConditionalGeneration(config).eval())


def prompts(view: ModelView, batch: int) -> dict[str, torch.Tensor]:
    """Each with one picture and twenty tokens of text."""
    side = view.model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(6, 32, (batch, 20), generator=generator)
    image = torch.full((batch, view.per_image() or 0), IMAGE)
    ids = torch.cat([text[:, :4], image, text[:, 4:]], dim=1)
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def twin(view: ModelView) -> ModelView:
    """A copy that shares every tensor."""
    shared = {id(t): t for t in (*view.model.parameters(), *view.model.buffers())}
    return view_of(copy.deepcopy(view.model, shared))


class Chosen(Exception):
    """The forward has come to the choice; nothing after it is needed."""


def hooks_of(module: torch.nn.Module) -> set[tuple[str, str, int]]:
    return {(path, kind, key) for path, m in module.named_modules() for kind in HOOKS for key in vars(m)[kind]}


def prepared(
    view: ModelView, batch: dict[str, torch.Tensor], seen: Any, before: set[tuple[str, str, int]]
) -> tuple[Callable[[], Any], float]:
    """The choice that the pass on `view` makes of `batch`, and the CPU milliseconds of its hooks inside the tower.

    Args:
        seen: what the tower returns. before: the hooks that were in it before the pass (`hooks_of`).
    """
    reduction = installed(view.model)
    assert reduction is not None
    inside = [0.0]

    def timed(hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return hook(*args, **kwargs)
            finally:
                inside[0] += 1000 * (time.process_time() - start)

        return run

    added = hooks_of(view.tower) - before
    for path, kind, key in added:
        held = vars(view.tower.get_submodule(path))[kind]
        held[key] = timed(held[key])
    if not added:  # what it returns is known
        view.tower.forward = lambda *args, **kwargs: seen
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    choose = reduction.choose

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        raise Chosen

    reduction.choose = noted
    try:
        view.model(**batch)
    except Chosen:
        pass
    finally:
        reduction.choose = choose
    (args, kwargs), *_ = calls
    return lambda: choose(*args, **kwargs), inside[0]


def cpu_ms(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return 1000 * (time.process_time() - start)


def measured(view: ModelView, batch: dict[str, torch.Tensor], keep: float, rounds: int, only: list[str]) -> dict:
    context = Context([batch], lambda *_, **__: None, lambda: None)
    pixels = batch["pixel_values"]
    found: dict[str, Any] = {}
    with evaluating(view.model):
        seen = view.tower(pixels, output_hidden_states=True)
        runs: dict[str, Callable[[], Any]] = {}
        for name in names():
            kind = svlm.find(name)
            if not name.startswith("tokens.") or not hasattr(kind, "choose") or (only and name not in only):
                continue
            mine = twin(view)
            before = hooks_of(mine.tower)
            try:
                step = kind.from_settings({"keep": keep})
                step.requires(mine, context)
                step.apply(mine, context)
                runs[name], inside = prepared(mine, batch, seen, before)
            except (svlm.SvlmError, AssertionError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
                continue
            found[name] = {"inside_cpu_ms": inside}
            print(f"{name}: inside the tower {inside:.1f} ms", file=sys.stderr, flush=True)
        times: dict[str, list[float]] = {name: [] for name in ("tower", *runs)}
        for number in range(rounds):
            times["tower"].append(cpu_ms(lambda: view.tower(pixels, output_hidden_states=True)))
            for name, run in runs.items():
                if not number:
                    run()  # warm
                times[name].append(cpu_ms(run))
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    tower = statistics.median(times["tower"])
    for name, row in found.items():
        row["choice_cpu_ms"] = statistics.median(times[name])
        row["share"] = (row["choice_cpu_ms"] + row["inside_cpu_ms"]) / tower
    return {"tower_cpu_ms": tower, "rounds": times, "methods": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--side", type=int, default=336)
    parser.add_argument("--width", type=int, default=4096, help="of the features among which is chosen")
    parser.add_argument("--keep", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    if o.threads:
        torch.set_num_threads(o.threads)
    view = llava(o.layers, o.side, o.width)
    tokens = view.per_image() or 0
    made = measured(view, prompts(view, o.batch), o.keep / tokens, o.rounds, o.only)
    made |= {"batch": o.batch, "layers": o.layers, "tokens": tokens, "kept": o.keep, "width": o.width}
    made |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"tower: {made['tower_cpu_ms']:.0f} ms of CPU time; {tokens} tokens in, {o.keep} out, batch {o.batch}")
    print(f"{'method':20}{'choice, ms':>12}{'inside, ms':>12}{'of the tower':>14}")
    for name, row in made["methods"].items():
        missed = "" if row["share"] < TARGET else "  more than 5 %"
        print(f"{name:20}{row['choice_cpu_ms']:12.1f}{row['inside_cpu_ms']:12.1f}{row['share']:14.2%}{missed}")
    if o.json:
        write_json(o.json, made)


if __name__ == "__main__":
    main()
