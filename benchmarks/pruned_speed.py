"""Does pruning pay in time what it says in FLOPs? Time to the first token of narrower and shallower models.

    python benchmarks/pruned_speed.py --rounds 5 --json benchmarks/results/pruned_speed.json

The demo model, and random weights at SmolVLM-256M's dimensions with one tile of 512 x 512, in float32 in eager torch,
one thread. Each is cut to about half of its FLOPs in several ways (which weights go changes nothing here), and the
time to the first token (vision tower and prefill, CPU time, interleaved medians) is compared with the original's.
`pays`: the speed-up as a share of the FLOPs' ratio; 1 is all that can be hoped for.
"""

from __future__ import annotations

import argparse
import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from runtime import IMAGE_TOKEN, prompt, smolvlm

import svlm
from svlm.calib.ask import example_prompt
from svlm.calib.cost import cost
from svlm.compress.base import Context
from svlm.compress.disk import write_json
from svlm.passes.bench import Contestant, medians, one_round

BOTH = ("vision", "language")
WAYS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "mlp 50 %": [("prune.structured", {"ratio": 0.5, "what": ("mlp",)})],
    "mlp, heads, hidden 33 %": [("prune.structured", {"ratio": 0.33, "what": ("mlp", "heads", "hidden")})],
    "every second block": [],
}


def one_tile() -> dict[str, torch.Tensor]:
    batch = prompt()
    ids = batch["input_ids"]
    extra = (ids == IMAGE_TOKEN).cumsum(1) > 64
    ids = ids[:, ~(extra & (ids == IMAGE_TOKEN))[0]]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": batch["pixel_values"][:, :1]}


def cut(view: Any, way: str) -> Any:
    made = copy.copy(view)
    made.model = copy.deepcopy(view.model)
    made.ledger = type(view.ledger)()
    made.refresh()
    ctx = Context([], lambda *a, **k: None, nullcontext)
    steps = list(WAYS[way])
    if not steps:
        for part in BOTH:
            count = sum(unit.index is not None for unit in made.parts[part]) // 2
            steps.append(("prune.layers", {"where": (part,), "count": count, "criterion": "random"}))
    for name, settings in steps:
        for where in BOTH if name == "prune.structured" else (settings.pop("where"),):
            given = settings | {"where": where}
            if name == "prune.structured":
                given |= {"importance": "magnitude", "multiple": 16}
            svlm.apply_pass(svlm.find(name)(**given), made, ctx)
    return made


def race(view: Any, batch: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    views = {"original": view}
    for way in WAYS:
        try:
            views[way] = cut(view, way)
        except svlm.SvlmError as error:
            print(f"{way}: {error}", flush=True)
    runners = [Contestant(name, v, v.model.generate, batch) for name, v in views.items()]
    rows: dict[str, list[Any]] = {name: [] for name in views}
    for number in range(rounds + 1):
        for c in runners:
            row = one_round(c, 2)
            if number:  # the first warms up
                rows[c.name].append(row)
    timed = {name: medians(found)["cpu_ms"]["first_token"] for name, found in rows.items()}
    flops = {name: cost(v, batch, latency=False)["flops"] for name, v in views.items()}
    total = {name: f["vision"] + (f["connector"] or 0) + f["prefill"] for name, f in flops.items()}
    return {
        name: {
            "first_token_cpu_ms": timed[name],
            "flops": total[name],
            "times_faster": timed["original"] / timed[name],
            "fewer_flops": total["original"] / total[name],
            "pays": timed["original"] / timed[name] / (total["original"] / total[name]),
        }
        for name in views
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["demo", "smolvlm-256m"])
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    torch.set_num_threads(1)
    demo = svlm.load_view("demo")
    made: dict[str, Any] = {}
    for name, view, batch in (
        ("demo", lambda: demo, lambda: example_prompt(demo)),
        ("smolvlm-256m", smolvlm, one_tile),
    ):
        if o.only in (None, name):
            made[name] = race(view(), batch(), o.rounds)
            write_json(o.json, made)
            for way, row in made[name].items():
                print(
                    f"{name:14} {way:24} {row['first_token_cpu_ms']:8.1f} ms of CPU, {row['times_faster']:.2f} times "
                    f"faster with {row['fewer_flops']:.2f} times fewer FLOPs: {row['pays']:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
