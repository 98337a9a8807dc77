"""How much of the demo model can go, and what training brings back: cuts, removed blocks, orders of passes, `small`.

    python benchmarks/recovery.py --runs runs/recovery --json benchmarks/results/recovery.json [--only cut-30 small]

Each case is a recipe, run as `svlm compress` runs it, over the same 256 questions to fit on and 512 to check with,
and fresh scenes to train on. The table has the stages: exact match against the original on the same questions, its
paired interval, KL, parameters, bytes. Cases named after a recipe that ships are that recipe. Killed cases go on
where they were; finished ones are not run again.

cut-30, cut-50      30 and 50 % of the parameters of language model and vision tower, all from the MLPs (41 and 67 % of
                    their channels, ranked over all blocks), then distillation.
blocks-kl, blocks-influence, blocks-random
                    two of the eight blocks, chosen in three ways among the deeper half of each tower, then the same
                    distillation.
blocks-kl-any       the same chosen among all eight: what goes first is not what heals best.
prune-distil-quantize, quantize-prune-distil
                    the same block, bits and number of steps in two orders; after rounding only scales can be trained.
small               the recipe that ships: everything together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import svlm
from svlm.compress.disk import write_json
from svlm.compress.recipe import Recipe
from svlm.passes.api import Options, compress_model, read_recipe

BOTH = ["vision", "language"]
STATES = ["connector", "language"]
DEEP = ["vision.blocks[2:]", "language.blocks[2:]"]
HEAL: dict[str, Any] = {
    "steps": 400,
    "features": STATES,
    "weight": 1.0,
    "batch_size": 128,
    "optimizer": "muon",
    "average": 0.98,
    "lr": 1.0e-2,
}


def cut(ratio: float) -> list[Any]:
    prune = {"ratio": ratio, "where": BOTH, "importance": "flap", "allocation": "global", "multiple": 16}
    return [{"prune.structured": prune}, {"distill.features": HEAL}]


def blocks(criterion: str, where: Sequence[str] = DEEP) -> list[Any]:
    prune = {"count": 2, "where": list(where), "criterion": criterion}
    return [{"prune.layers": prune}, {"distill.features": HEAL}]


CASES: dict[str, list[Any] | None] = {  # None: a recipe that ships
    "cut-30": cut(0.41),
    "cut-50": cut(0.67),
    "blocks-kl": blocks("kl"),
    "blocks-influence": blocks("influence"),
    "blocks-random": blocks("random"),
    "blocks-kl-any": blocks("kl", BOTH),
    "prune-distil-quantize": None,
    "quantize-prune-distil": None,
    "small": None,
}


def recipe_of(name: str, check: int) -> Recipe:
    passes = CASES[name]
    if passes is None:
        value = read_recipe(name).to_json()
    else:
        value = {"name": name, "passes": [row | {"gate": None} for row in passes]}
    value = value | {"calibration": {"fit": 256, "check": check, "seed": 0}}
    return Recipe.from_json(value, svlm.find)


def told(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is kept of a report: one row a stage."""
    rows = []
    for stage in report["stages"]:
        quality, cost = stage["quality"], stage["cost"]
        match = quality["exact_match"]
        row = {
            "pass": stage["pass"],
            "verdict": stage["verdict"],
            "exact_match": match["value"],
            "delta": match["delta"],
        }
        row |= {"ci95": match["ci95"], "kl": quality["kl"], "parameters": cost["parameters"], "bytes": cost["bytes"]}
        row |= {"flops": cost["flops"], "visual_tokens": cost["visual_tokens"], "seconds": stage["seconds"]}
        rows.append(row)
    return rows


def show(name: str, rows: list[dict[str, Any]]) -> None:
    print(name)
    for row in rows:
        low, high = (100 * bound for bound in row["ci95"])
        share, smaller = row["parameters"] / rows[0]["parameters"], rows[0]["bytes"] / row["bytes"]
        change = f"{100 * row['delta']:+5.1f} [{low:+.1f}, {high:+.1f}]"
        print(
            f"  {row['pass'] or 'original':20} exact match {100 * row['exact_match']:5.1f} %  {change:20} "
            f"KL {row['kl']:.4f}  parameters {share:.2f}  bytes /{smaller:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--check", type=int, default=512)
    parser.add_argument("--runs", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    kept: dict[str, Any] = json.loads(o.json.read_text()) if o.json.is_file() else {}
    for name in o.only:
        if name not in kept:
            out = o.runs / name
            options = Options(resume=out.exists(), latency=False)
            report = compress_model("demo", recipe_of(name, o.check), "demo", out, options)
            kept[name] = told(report)
            write_json(o.json, kept)
        show(name, kept[name])


if __name__ == "__main__":
    main()
