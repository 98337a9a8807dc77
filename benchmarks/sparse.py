"""The demo model with zeros by prune.wanda and prune.sparsegpt, alone and followed by quantize.gptq, same samples.

    python benchmarks/sparse.py --json benchmarks/results/sparse.json

Vision tower, connector and language model. KL is in nats an answer token against the original, over the check
questions; `kept` is the share of the zeros that are zeros at the end as well (of the linear that kept the fewest),
`sum` the KL of the two passes alone added up. One row has quantize.gptq without the promise; the last rows take other
tokens for the statistics. Results are kept as they come; --resume goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import svlm
from svlm.compress.disk import write_json
from svlm.compress.ledger import Ledger

Steps = list[tuple[str, dict[str, Any]]]
BITS: Steps = [("quantize.gptq", {"bits": 4, "group": 64})]
ZEROS: dict[str, Steps] = {
    f"{name} {pattern.replace('unstructured', '50 %')}": [(f"prune.{name}", {"sparsity": 0.5, "pattern": pattern})]
    for name in ("wanda", "sparsegpt")
    for pattern in ("unstructured", "2:4")
}
ALONE: dict[str, Steps] = {"gptq 4 bits": BITS, **ZEROS}
BOTH: dict[str, Steps] = {f"{name}, gptq 4 bits": steps + BITS for name, steps in ZEROS.items()}
UNAWARE = "without the promise"
CONTROL: dict[str, Steps] = {f"wanda 2:4, gptq 4 bits, {UNAWARE}": ZEROS["wanda 2:4"] + [(UNAWARE, {})] + BITS}
TOKENS: dict[str, Steps] = {
    f"{name}, {tokens}": [(f"prune.{name.split()[0]}", {"sparsity": 0.5, "token_weights": tokens})]
    for name in ("wanda 50 %", "sparsegpt 50 %")
    for tokens in ("text", "uniform", "balanced")
}


def run(bench: svlm.Workbench, steps: Steps) -> dict[str, Any]:
    """KL, exact match, zeros and how many of them the steps after the first kept."""
    view, zeros = svlm.load_view("demo"), {}
    for name, settings in steps:
        if name == UNAWARE:
            view.ledger = Ledger()
            continue
        svlm.apply_pass(svlm.find(name).from_settings(settings), view, bench.context(view))
        zeros = zeros or {ref.path: ref.module.weight == 0 for ref in view.linears() if name.startswith("prune.")}
    kept = [bool((view.weight(path)[mask] == 0).all()) for path, mask in zeros.items()]
    share = [float((view.weight(path)[mask] == 0).double().mean()) for path, mask in zeros.items() if mask.any()]
    quality, _ = bench.measure(view)
    weights = [view.weight(path) for path in zeros]
    count = sum(w.numel() for w in weights)
    return {
        "kl": quality["kl"],
        "exact_match": quality["exact_match"],
        "sparsity": sum(int((w == 0).sum()) for w in weights) / count if count else 0.0,
        "kept": min(share) if share else None,
        "all_kept": all(kept) if zeros else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=128)
    parser.add_argument("--check", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    rows: dict[str, Any] = json.loads(o.json.read_text()) if o.resume and o.json.is_file() else {}
    data = svlm.CalibrationSet.load("demo", fit=o.fit, check=o.check, seed=o.seed)
    bench = svlm.Workbench(svlm.load_view("demo"), data)
    for name, steps in {**ALONE, **BOTH, **CONTROL, **TOKENS}.items():
        if o.only in name and name not in rows:
            torch.manual_seed(0)
            rows[name] = run(bench, steps)
            write_json(o.json, rows)
            print(name, rows[name], file=sys.stderr, flush=True)
    print(table(rows))


def table(rows: dict[str, Any]) -> str:
    """Markdown: a line a row."""
    lines = ["| | KL | sum | exact match | zeros | kept |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in rows.items():
        first, _, then = name.partition(", ")
        alone = [rows[part]["kl"] for part in (first, then) if part in rows]
        added = f"{sum(alone):.4f}" if len(alone) == 2 else ""
        match, kept = row["exact_match"], row["kept"]
        lines.append(
            f"| {name} | {row['kl']:.4f} | {added} | {100 * match['value']:.1f} % ({100 * match['delta']:+.1f}) "
            f"| {100 * row['sparsity']:.1f} % | {'' if kept is None else f'{100 * kept:.0f} %'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
