"""The demo model at an average of 3.5 bits by quantize.mixed, against uniform 4 bits by quantize.gptq, same samples.

    python benchmarks/mixed.py --seeds 0 1 2 --json benchmarks/results/mixed.json

Vision tower, connector and language model, groups of 64, the same solver for both. The seed draws the questions to fit
on and those to check with, over other pictures. A few answer tokens make up most of the KL, so there are many check
questions, and the difference is taken question by question: `apart` is its mean, `error` the standard error of that
mean, both in nats a token. Results are kept as they come; --resume goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import svlm
from svlm.calib.metrics.divergence import kl, log_probabilities
from svlm.compress.base import evaluating
from svlm.compress.disk import write_json
from svlm.compress.runtime.grid import packed_bytes


def answers(view: Any, batches: list[Any]) -> list[torch.Tensor]:
    """Log-probabilities [answer tokens, vocabulary] of every check question."""
    rows = []
    with evaluating(view.model):
        for batch in batches:
            logits, marked = view.model(**batch).logits[:, :-1], batch["labels"][:, 1:] != -100
            rows += [log_probabilities(row[mask]) for row, mask in zip(logits, marked)]
    return rows


def rounded(bench: svlm.Workbench, name: str, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    view = svlm.load_view("demo")
    notes = svlm.apply_pass(svlm.find(name).from_settings(settings), view, bench.context(view))
    return view, notes.numbers


def compare(seed: int, fit: int, check: int, bits: float, uniform: int, group: int) -> dict[str, Any]:
    bench = svlm.Workbench(svlm.load_view("demo"), svlm.CalibrationSet.load("demo", fit=fit, check=check, seed=seed))
    batches = list(bench.encoder.batches(bench.judge.samples, bench.batch_size))
    original = answers(bench.original, batches)
    tokens = sum(map(len, original))
    found: dict[str, Any] = {"tokens": tokens, "questions": len(original)}
    lost = {}
    for name, settings in (("quantize.gptq", {"bits": uniform}), ("quantize.mixed", {"bits": bits})):
        view, numbers = rounded(bench, name, settings | {"group": group})
        small = answers(view, batches)
        lost[name] = torch.stack([kl(was, now).sum() for was, now in zip(original, small)]).double()
        same = [torch.equal(was.argmax(-1), now.argmax(-1)) for was, now in zip(original, small)]
        found[name] = {
            "kl": float(lost[name].sum()) / tokens,
            "same_answer": sum(same) / len(same),
            "bytes": sum(packed_bytes(tuple(view.weight(path).shape), grid) for path, grid in view.grids.items()),
        }
        kept = ("budget_bytes", "budget_used", "average_bits", "linears_by_bits")
        found[name] |= {key: numbers[key] for key in kept if key in numbers}
    apart = (lost["quantize.mixed"] - lost["quantize.gptq"]) * len(original) / tokens
    return found | {"apart": float(apart.mean()), "error": float(apart.std()) / len(apart) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fit", type=int, default=256)
    parser.add_argument("--check", type=int, default=1024)
    parser.add_argument("--bits", type=float, default=3.5)
    parser.add_argument("--uniform", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    rows: dict[str, Any] = json.loads(o.json.read_text()) if o.resume and o.json.is_file() else {}
    for seed in o.seeds:
        if f"seed {seed}" not in rows:
            rows[f"seed {seed}"] = compare(seed, o.fit, o.check, o.bits, o.uniform, o.group)
            write_json(o.json, rows)
            print(f"seed {seed}", rows[f"seed {seed}"], file=sys.stderr, flush=True)
    print(table(rows, o.bits, o.uniform))


def table(rows: dict[str, Any], bits: float, uniform: int) -> str:
    """Markdown: a line a seed."""
    lines = [
        f"| | KL, gptq {uniform} bits | KL, mixed {bits:g} bits | difference | bytes | budget used | same answer |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        a, b = row["quantize.gptq"], row["quantize.mixed"]
        lines.append(
            f"| {name} | {a['kl']:.5f} | {b['kl']:.5f} | {row['apart']:+.5f} ± {row['error']:.5f} "
            f"| {a['bytes']:,} → {b['bytes']:,} | {100 * b['budget_used']:.2f} % "
            f"| {100 * a['same_answer']:.1f} % → {100 * b['same_answer']:.1f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
