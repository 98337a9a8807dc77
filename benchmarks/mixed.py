"""The demo model at an average of 3.5 bits by quantize.mixed, against uniform 4 bits by quantize.gptq, same samples.

    python benchmarks/mixed.py --seeds 0 1 2 --work DIR --json benchmarks/results/mixed.json

Vision tower, connector and language model, groups of 64, the same solver for both. The seed draws the questions to fit
on. A few answer tokens make up most of the KL, so both are judged as in `quality_vs_peers.py`, on 8,192 fresh questions
that no pass has seen, and compared question by question: `apart` is the mean difference in nats a token with its
standard error, `ratio` mixed over uniform with its 95 % interval, and in the last line the same over all seeds.
Results are kept as they come; --resume goes on, with the same --work.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from quality_vs_peers import Fresh, change, mean, ratio

import svlm
from svlm.compress.disk import write_json
from svlm.compress.runtime.grid import packed_bytes

PASSES = ("quantize.gptq", "quantize.mixed")


def rounded(bench: svlm.Workbench, name: str, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    view = svlm.load_view("demo")
    notes = svlm.apply_pass(svlm.find(name).from_settings(settings), view, bench.context(view))
    return view, notes.numbers


def compare(fresh: Fresh, seed: int, o: argparse.Namespace) -> dict[str, Any]:
    data = svlm.CalibrationSet.load("demo", fit=o.fit, check=16, seed=seed)
    bench = svlm.Workbench(svlm.load_view("demo"), data, latency=False)
    found: dict[str, Any] = {}
    for name, bits in zip(PASSES, (o.uniform, o.bits)):
        view, numbers = rounded(bench, name, {"bits": bits, "group": o.group})
        rows = fresh.judge(view, decoder_only=False)
        np.save(judged(o, name, seed), rows)
        weights = sum(packed_bytes(tuple(view.weight(path).shape), grid) for path, grid in view.grids.items())
        found[name] = {"kl": mean(rows), **change(rows), "bytes": weights}
        kept = ("budget_bytes", "budget_used", "average_bits", "linears_by_bits")
        found[name] |= {key: numbers[key] for key in kept if key in numbers}
    return found | beside(o, [seed])


def judged(o: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(o.work) / f"{name}--seed_{seed}.npy"


def beside(o: argparse.Namespace, seeds: list[int]) -> dict[str, Any]:
    """Mixed against uniform over `seeds`, question by question."""
    uniform, mixed = (sum(np.load(judged(o, name, seed)) for seed in seeds) for name in PASSES)
    apart = (mixed[:, 0] - uniform[:, 0]) * len(mixed) / mixed[:, 1].sum()
    error = float(apart.std()) / len(apart) ** 0.5
    return {"apart": float(apart.mean()), "error": error, "ratio": list(ratio(mixed, uniform))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fit", type=int, default=256)
    parser.add_argument("--fresh", type=int, default=8192, help="questions that judge")
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--uniform", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--work", type=Path, required=True, help="where judgements are kept")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    rows: dict[str, Any] = json.loads(o.json.read_text()) if o.resume and o.json.is_file() else {}
    rows.pop("all seeds", None)
    o.work.mkdir(parents=True, exist_ok=True)
    fresh = Fresh(o.fresh, o.work / f"reference-{o.fresh}.safetensors")
    for seed in o.seeds:
        if f"seed {seed}" not in rows or not all(judged(o, name, seed).is_file() for name in PASSES):
            rows[f"seed {seed}"] = compare(fresh, seed, o)
            write_json(o.json, rows)
            print(f"seed {seed}", rows[f"seed {seed}"], file=sys.stderr, flush=True)
    rows["all seeds"] = beside(o, o.seeds)
    write_json(o.json, rows)
    print(table(rows, o.bits, o.uniform))


def table(rows: dict[str, Any], bits: float, uniform: int) -> str:
    """Markdown: a line a seed."""
    lines = [
        f"| | KL, gptq {uniform} bits | KL, mixed {bits:g} bits | difference | ratio | bytes | budget used "
        "| exact match, points gained |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        over = "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"])
        difference = f"{row['apart']:+.5f} ± {row['error']:.5f}"
        if PASSES[0] not in row:
            lines.append(f"| {name} | | | {difference} | {over} | | | |")
            continue
        a, b = (row[kind] for kind in PASSES)
        gained = " → ".join(f"{100 * kind['change']:+.2f} ± {100 * kind['change_95']:.2f}" for kind in (a, b))
        lines.append(
            f"| {name} | {a['kl']:.5f} | {b['kl']:.5f} | {difference} | {over} "
            f"| {a['bytes']:,} → {b['bytes']:,} | {100 * b['budget_used']:.2f} % | {gained} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
