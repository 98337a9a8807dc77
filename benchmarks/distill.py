"""Heal the pruned demo model in several ways and compare what is left: KL and answers on the check split.

    python benchmarks/distill.py --steps 100 --fit 64 --check 256

Every way starts from the same model (prune.structured) and takes the same
steps on the same batches. Differences of exact match are paired with the original's answers, as in every report.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import svlm
from svlm.compress.disk import write_json
from svlm.compress.pipeline import apply_pass
from svlm.passes import find

Steps = list[tuple[str, dict[str, Any]]]
WAYS: dict[str, Steps] = {
    "not healed": [],
    "logits, forward": [("distill.logits", {})],
    "logits, reverse": [("distill.logits", {"loss": "reverse"})],
    "logits, skewed": [("distill.logits", {"loss": "skewed"})],
    "logits, skewed reverse": [("distill.logits", {"loss": "skewed_reverse"})],
    "features + logits, mse": [("distill.features", {})],
    "features + logits, even": [("distill.features", {"weight": 1.0})],
    "features + logits, cosine": [("distill.features", {"distance": "cosine"})],
    "features alone, mse": [("distill.features", {"weight": 0.0})],
    "blocks": [("distill.blocks", {})],
    "blocks, then logits": [("distill.blocks", {}), ("distill.logits", {})],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--where", nargs="+", default=["language"])
    parser.add_argument("--what", nargs="+", default=["mlp"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--train", default="full")
    parser.add_argument("--fit", type=int, default=64)
    parser.add_argument("--check", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of ways")
    parser.add_argument("--json", type=Path, help="write the table here")
    o = parser.parse_args()
    data = svlm.CalibrationSet.load("demo", fit=o.fit, check=o.check, seed=o.seed)
    bench = svlm.Workbench(svlm.load_view("demo"), data, latency=False)
    rows: dict[str, Any] = {}
    for name, steps in WAYS.items():
        if o.only and name not in o.only:
            continue
        view = svlm.load_view("demo")
        prune = find("prune.structured")(ratio=o.ratio, where=tuple(o.where), what=tuple(o.what))  # type: ignore[call-arg]
        apply_pass(prune, view, bench.context(view, seed=o.seed))
        numbers: dict[str, Any] = {}
        for kind, settings in steps:
            trained = {"steps": o.steps, "lr": o.lr, "train": o.train, **settings}
            numbers = apply_pass(find(kind)(**trained), view, bench.context(view, seed=o.seed)).numbers
        quality, _ = bench.measure(view)
        exact = quality["exact_match"]
        rows[name] = {
            "kl": quality["kl"],
            "exact_match": exact["value"],
            "delta": exact["delta"],
            "ci95": exact["ci95"],
        }
        rows[name]["best_step"] = numbers.get("best_step")
        print(f"{name:28s} {json.dumps(rows[name])}", flush=True)
    if o.json:
        write_json(o.json, {"settings": {k: str(v) for k, v in vars(o).items()}, "rows": rows})


if __name__ == "__main__":
    main()
