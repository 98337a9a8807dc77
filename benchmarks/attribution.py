"""Planted causes on the demo model, and what `svlm verify --attribute` says of them.

    python benchmarks/attribution.py --json benchmarks/results/attribution.json

Vision tower, connector and language model are rounded to 4 bits, so that each has lost something; one is damaged on top
of it: the vision tower is rounded to 2 bits instead, or noise as large as its weights is added to the connector, or all
weights of one block of the language model are zero. Each run has its own questions, noise and block. It is right if the
part that is named is the damaged one (and, for the block, if that block is named too). Results are kept as they come;
--resume goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import svlm
from svlm.calib.attribution import attribute
from svlm.compress.disk import write_json

CAUSES = {"vision at 2 bits": "vision", "connector noised": "connector", "language block zeroed": "language"}
ROUNDED = ("vision", "connector", "language")


def planted(cause: str, seed: int) -> tuple[Any, str]:
    """The demo model with a cause, and the part or the block that was damaged."""
    view = svlm.load_view("demo")
    part = CAUSES[cause]
    coarse = {part} if cause == "vision at 2 bits" else set()
    for bits, where in ((4, [p for p in ROUNDED if p not in coarse]), (2, sorted(coarse))):
        if where:
            step = svlm.find("quantize.rtn").from_settings(
                {"bits": bits, "group": 64, "search": "none", "where": where}
            )
            svlm.apply_pass(step, view, svlm.Context([], None, None))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if cause == "connector noised":
            for ref in view.linears("connector"):
                weight = ref.module.weight
                weight += torch.randn(weight.shape, generator=g) * weight.std()
        if cause == "language block zeroed":
            blocks = [unit for unit in view.parts["language"] if unit.index is not None]
            unit = blocks[seed % len(blocks)]
            for ref in unit.linears:
                ref.module.weight.zero_()
            return view, unit.name
    return view, part


def run(cause: str, seed: int, questions: int) -> dict[str, Any]:
    """One planted cause and what was found."""
    data = svlm.CalibrationSet.load("demo", fit=1, check=questions, seed=seed)
    bench = svlm.Workbench(svlm.load_view("demo"), data, latency=False)
    small, where = planted(cause, seed)
    began = time.perf_counter()
    made = attribute(bench, small, questions=questions)
    right = made["named"] == CAUSES[cause] and (not where.endswith("]") or made["named_block"] == where)
    shares = {
        row["part"]: {key: row["restored"][key] for key in ("share", "ci95")} | {"alone": row["alone"]["share"]}
        for row in made["parts"]
        if "restored" in row
    }
    return {
        "cause": cause,
        "seed": seed,
        "planted": where,
        "named": made["named"],
        "named_block": made["named_block"],
        "right": right,
        "kl": made["loss"]["kl"],
        "exact_match": made["loss"]["exact_match"]["delta"],
        "parts": shares,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of each cause")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    made: list[dict[str, Any]] = json.loads(o.json.read_text())["runs"] if o.resume and o.json.is_file() else []
    known = {(row["cause"], row["seed"]) for row in made}
    for seed in range(o.runs):
        for cause in CAUSES:
            if (cause, seed) in known:
                continue
            made.append(run(cause, seed, o.questions))
            print(f"{cause}, seed {seed}: {made[-1]['named']}, {'right' if made[-1]['right'] else 'WRONG'}", flush=True)
            found = {name: [row["right"] for row in made if row["cause"] == name] for name in CAUSES}
            counts = {name: {"right": sum(rows), "runs": len(rows)} for name, rows in found.items()}
            write_json(o.json, {"questions": o.questions, "right": counts, "runs": made})
    sys.exit(0 if all(row["right"] for row in made) else 1)


if __name__ == "__main__":
    main()
