"""Less work on visual tokens in the decoder: exact match, KL, FLOPs, time to first token and KV bytes, demo model.

    python benchmarks/fuse.py --json benchmarks/results/fuse.json [--only freeze bypass] [--steps 400] [--runs DIR]

Each case is a recipe, run as `svlm compress` runs it, over the same 256 questions to fit on and 512 to check with, and
fresh scenes to train on; a line of the table is one stage of it. Killed cases go on where they were, finished ones are
not run again. Cases whose passes are not on the menu are left out. Figures of a case that was trained depend on
--steps, so give each number of steps a file and a folder of its own.

freeze, freeze-kl      visual tokens frozen in half of the blocks, chosen greedily or each alone.
fastv-50, fastv-25     half or a quarter of each image's tokens from block 2 on. pyramid: a half, a quarter, an eighth.
bypass, bypass-2       visual tokens skip the decoder and are read in one block, or in two; then distillation.
prefuse-4, prefuse-4-n2, prefuse-2, prefuse-1
                       four tokens an image, two or one, after one block or two that fuse image and question; distilled.
pool-4, pool-2, pool-1 as many tokens by pooling, with the same distillation: what prefuse has to beat.
grid-50, grid-25, pool-50, pool-25
                       fewer tokens before the decoder: what the others have to beat at the same count.

Each prefuse case that was run beside its pool case (the same count of tokens, the same distillation) is also asked
--paired questions of other pictures together with it: `beside_pool` has the difference with its interval. `first_token`
has the CPU milliseconds to the first token, original and results in turns in one process, medians.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import svlm
from svlm import passes
from svlm.calib.ask import example_prompt
from svlm.compress.disk import write_json
from svlm.compress.recipe import Recipe
from svlm.passes.api import Options, compress_model
from svlm.passes.bench import Contestant, interleaved

HEAL = {"distill.logits": {"lr": 2.0e-4}}
LEARN = {"distill.logits": {"batch_size": 128, "optimizer": "muon", "lr": 1.0e-2, "average": 0.98}}  # anew, not back
CASES: dict[str, list[dict[str, dict[str, Any]]]] = {
    "freeze": [{"fuse.freeze_vision": {"share": 0.5}}],
    "freeze-kl": [{"fuse.freeze_vision": {"share": 0.5, "criterion": "kl"}}],
    "fastv-50": [{"tokens.fastv": {"keep": 0.5, "block": 2}}],
    "fastv-25": [{"tokens.fastv": {"keep": 0.25, "block": 2}}],
    "pyramid": [{"tokens.pyramid": {"ratio": 0.5}}],
    "bypass": [{"fuse.bypass": {"count": 1}}, LEARN],
    "bypass-2": [{"fuse.bypass": {"count": 2}}, LEARN],
    "bypass-3": [{"fuse.bypass": {"count": 3}}, LEARN],
    "prefuse-4": [{"fuse.prefuse": {"tokens": 4}}, HEAL],
    "prefuse-4-n2": [{"fuse.prefuse": {"tokens": 4, "blocks": 2}}, HEAL],
    "prefuse-2": [{"fuse.prefuse": {"tokens": 2}}, HEAL],
    "prefuse-1": [{"fuse.prefuse": {"tokens": 1}}, HEAL],
    "pool-4": [{"tokens.pool": {"keep": 0.0625}}, HEAL],
    "pool-2": [{"tokens.pool": {"keep": 0.03125}}, HEAL],
    "pool-1": [{"tokens.pool": {"keep": 0.015625}}, HEAL],
    "prefuse-4-muon": [{"fuse.prefuse": {"tokens": 4}}, LEARN],
    "pool-4-muon": [{"tokens.pool": {"keep": 0.0625}}, LEARN],
    "grid-50": [{"tokens.grid": {"keep": 0.5}}],
    "grid-25": [{"tokens.grid": {"keep": 0.25}}],
    "pool-50": [{"tokens.pool": {"keep": 0.5}}],
    "pool-25": [{"tokens.pool": {"keep": 0.25}}],
}
BESIDE = {"prefuse-4": "pool-4", "prefuse-2": "pool-2", "prefuse-1": "pool-1", "prefuse-4-muon": "pool-4-muon"}


def there(case: str) -> bool:
    """Whether all passes of a case are on the menu."""
    return all(name in passes.names() for row in CASES[case] for name in row)


def recipe_of(case: str, fit: int, check: int, steps: int) -> Recipe:
    rows: list[dict[str, Any]] = []
    for row in CASES[case]:
        ((name, settings),) = row.items()
        rows.append({name: settings | ({"steps": steps} if name.startswith("distill.") else {}), "gate": None})
    value = {"name": case, "passes": rows, "calibration": {"fit": fit, "check": check, "seed": 0}}
    return Recipe.from_json(value, svlm.find)


def told(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is kept of a report: one row a stage."""
    rows = []
    for stage in report["stages"]:
        quality, cost = stage["quality"], stage["cost"]
        match, latency = quality["exact_match"], cost["latency_ms"]
        row = {"pass": stage["pass"], "settings": stage["settings"], "exact_match": match["value"]}
        row |= {"delta": match["delta"], "ci95": match["ci95"], "kl": quality["kl"], "flops": cost["flops"]}
        row |= {"visual_tokens": cost["visual_tokens"], "kv_bytes": cost["kv_bytes"], "parameters": cost["parameters"]}
        row["ttft_ms"] = None if latency["prefill"] is None else latency["vision"] + latency["prefill"]
        rows.append(row | {"decode_ms": latency["decode_per_token"], "seconds": stage["seconds"]})
    return rows


def show(case: str, rows: list[dict[str, Any]]) -> None:
    print(case)
    first = rows[0]
    for row in rows:
        low, high = (100 * bound for bound in row["ci95"])
        change = f"{100 * row['delta']:+6.1f} [{low:+.1f}, {high:+.1f}]"
        flops = " ".join(f"{part} {row['flops'][part] / first['flops'][part]:.2f}" for part in ("vision", "prefill"))
        time = "" if row["ttft_ms"] is None else f"TTFT {row['ttft_ms']:.1f} ms  "
        print(
            f"  {row['pass'] or 'original':20} exact match {100 * row['exact_match']:5.1f} %  {change:22} "
            f"KL {row['kl']:.4f}  FLOPs {flops}  {time}KV {row['kv_bytes'] / first['kv_bytes']:.2f}  "
            f"parameters {row['parameters'] / first['parameters']:.2f}"
        )


def beside_pool(case: str, runs: Path, questions: int) -> dict[str, Any]:
    """Points of exact match that a case is ahead of pooling, over questions that neither run has seen."""
    data = svlm.CalibrationSet.load("demo", fit=16, check=questions, seed=1)
    bench = svlm.Workbench(svlm.load_view("demo"), data, latency=False)
    theirs, mine = (bench.measure(svlm.load_view(runs / name))[1] for name in (BESIDE[case], case))
    return {"questions": questions, **bench.compare(theirs, mine)}


def first_tokens(cases: list[str], runs: Path, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds to the first token: the original's and those of results, in turns."""
    views = {"original": svlm.load_view("demo")} | {case: svlm.load_view(runs / case) for case in cases}
    runners = [Contestant(name, v, v.model.generate, example_prompt(v)) for name, v in views.items()]
    return {name: row["cpu_ms"]["first_token"] for name, row in interleaved(runners, 2, rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=[case for case in CASES if there(case)])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--fit", type=int, default=256)
    parser.add_argument("--check", type=int, default=512)
    parser.add_argument("--paired", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=21, help="of timing")
    parser.add_argument("--runs", type=Path, default=Path("runs/fuse"))
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    kept: dict[str, Any] = json.loads(o.json.read_text()) if o.json.is_file() else {}
    for case in o.only:
        if case not in kept:
            out = o.runs / case
            recipe = recipe_of(case, o.fit, o.check, o.steps)
            kept[case] = told(compress_model("demo", recipe, "demo", out, Options(resume=out.exists())))
            write_json(o.json, kept)
        show(case, kept[case])
    pairs = kept.setdefault("beside_pool", {})
    for case, pool in BESIDE.items():
        if case not in pairs and all((o.runs / name / "svlm.json").is_file() for name in (case, pool)):
            pairs[case] = beside_pool(case, o.runs, o.paired)
            write_json(o.json, kept)
        if case in pairs:
            print(f"{case} beside {pool}: {pairs[case]}")
    finished = [case for case in CASES if (o.runs / case / "svlm.json").is_file()]
    kept["first_token"] = first_tokens(finished, o.runs, o.rounds)
    write_json(o.json, kept)
    for case, ms in kept["first_token"].items():
        print(f"{case:14} {ms:5.1f} ms to the first token, {ms / kept['first_token']['original']:.2f}")


if __name__ == "__main__":
    main()
