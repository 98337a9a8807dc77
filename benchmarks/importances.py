"""What each importance of prune.structured loses at once: the demo model, a share of all MLP channels, no healing.

    python benchmarks/importances.py --seeds 0 1 2 --json benchmarks/results/importances.json

Vision tower and language model. The seed draws the questions to fit on and those to check with, over other pictures,
and seeds `random`. KL is to the original's answer distributions, in nats a token; `apart` is the difference to `random`
question by question, with the standard error of its mean. Results are kept as they come; --resume goes on.
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

CONTROL = "random"
ROWS: dict[str, dict[str, Any]] = {
    CONTROL: {"importance": "random"},
    "magnitude": {"importance": "magnitude"},
    "taylor": {"importance": "taylor"},
    "minitron": {"importance": "minitron"},
    "flap": {"importance": "flap"},
    "flap, no bias": {"importance": "flap", "compensate": "never"},
    "minitron, global": {"importance": "minitron", "allocation": "global"},
    "flap, global": {"importance": "flap", "allocation": "global"},
}


def answers(view: Any, batches: list[Any]) -> list[torch.Tensor]:
    """Log-probabilities [answer tokens, vocabulary] of every check question."""
    rows = []
    with evaluating(view.model):
        for batch in batches:
            logits, marked = view.model(**batch).logits[:, :-1], batch["labels"][:, 1:] != -100
            rows += [log_probabilities(row[mask]) for row, mask in zip(logits, marked)]
    return rows


def compare(seed: int, fit: int, check: int, ratio: float, multiple: int) -> dict[str, Any]:
    bench = svlm.Workbench(svlm.load_view("demo"), svlm.CalibrationSet.load("demo", fit=fit, check=check, seed=seed))
    batches = list(bench.encoder.batches(bench.judge.samples, bench.batch_size))
    original = answers(bench.original, batches)
    tokens = sum(map(len, original))
    found: dict[str, Any] = {"tokens": tokens, "questions": len(original)}
    control = torch.zeros(0)
    for name, settings in ROWS.items():
        view = svlm.load_view("demo")
        common = {"ratio": ratio, "multiple": multiple, "where": ["vision", "language"], "what": ["mlp"], "seed": seed}
        step = svlm.find("prune.structured").from_settings(common | settings)
        numbers = svlm.apply_pass(step, view, bench.context(view)).numbers
        small = answers(view, batches)
        lost = torch.stack([kl(was, now).sum() for was, now in zip(original, small)]).double()
        same = [torch.equal(was.argmax(-1), now.argmax(-1)) for was, now in zip(original, small)]
        control = lost if name == CONTROL else control
        apart = (lost - control) * len(original) / tokens
        found[name] = {
            "kl": float(lost.sum()) / tokens,
            "same_answer": sum(same) / len(same),
            "apart": float(apart.mean()),
            "error": float(apart.std()) / len(apart) ** 0.5,
            "parameters": numbers["parameters"],
            "parameters_before": numbers["parameters_before"],
        }
        print(f"seed {seed}, {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fit", type=int, default=64)
    parser.add_argument("--check", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--multiple", type=int, default=16)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    rows: dict[str, Any] = json.loads(o.json.read_text()) if o.resume and o.json.is_file() else {}
    for seed in o.seeds:
        if f"seed {seed}" not in rows:
            rows[f"seed {seed}"] = compare(seed, o.fit, o.check, o.ratio, o.multiple)
            write_json(o.json, rows)
    print(table(rows))


def table(rows: dict[str, Any]) -> str:
    """Markdown: a line an importance, a column a seed."""
    lines = [
        "| | " + " | ".join(f"KL, {seed}" for seed in rows) + " | less than random | same answer | parameters |",
        "|---|" + "---:|" * (len(rows) + 3),
    ]
    for name in ROWS:
        found = [row[name] for row in rows.values()]
        error = sum(f["error"] ** 2 for f in found) ** 0.5 / len(found)
        lines.append(
            f"| {name} | "
            + " | ".join(f"{f['kl']:.4f}" for f in found)
            + f" | {-sum(f['apart'] for f in found) / len(found):.4f} ± {error:.4f} "
            + f"| {100 * sum(f['same_answer'] for f in found) / len(found):.1f} % "
            + f"| {found[0]['parameters'] / found[0]['parameters_before']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
