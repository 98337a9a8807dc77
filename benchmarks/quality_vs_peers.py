"""The demo model's decoder at few bits: svlm's passes against every other tool that runs here, on the same samples.

    python benchmarks/quality_vs_peers.py --python llmcompressor=VENV/bin/python --python hqq=VENV2/bin/python ... \\
        --seeds 0 1 2 --json benchmarks/results/quality_vs_peers.json

Language model's linears only (what every peer can do); 128 calibration questions, the same for all; judged by svlm on
512 check questions: KL of the answer tokens against the original, exact match. A peer runs in the interpreter that is
given for it (`benchmarks/peers.py`) and hands over the weights it would use, so that storage and kernels play no part.
A peer without an interpreter is left out. Results are kept as they come; --resume goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import svlm
from svlm.compress.disk import write_json
from svlm.compress.storage import DEMO

SETTINGS = {"W4 g64": (4, 64), "W3 g64": (3, 64), "W2 g32": (2, 32)}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "svlm rtn, plain": ("quantize.rtn", {"search": "none"}),
    "svlm rtn": ("quantize.rtn", {}),
    "svlm gptq": ("quantize.gptq", {}),
}
PEERS = ("llmcompressor", "gptqmodel", "auto-round", "hqq", "bitsandbytes", "optimum-quanto", "torchao")


def calibration(bench: svlm.Workbench, path: Path) -> None:
    """The fit questions as tensors of one sample each, for the peers."""
    tensors = {}
    for number, batch in enumerate(bench.encoder.batches(bench.judge.answered(bench.data.fit), 1)):
        tensors |= {f"{number}.{k}": v.contiguous() for k, v in batch.items() if k != "labels"}
    save_file(tensors, path)


def judged(bench: svlm.Workbench, view: Any) -> dict[str, float]:
    quality, _ = bench.measure(view)
    return {"kl": quality["kl"], "exact_match": quality["exact_match"]["value"]}


def ours(bench: svlm.Workbench, name: str, settings: dict[str, Any], bits: int, group: int) -> dict[str, float]:
    view = svlm.load_view("demo")
    step = svlm.find(name).from_settings({"bits": bits, "group": group, "where": ["language"]} | settings)
    svlm.apply_pass(step, view, bench.context(view))
    return judged(bench, view)


def theirs(
    bench: svlm.Workbench, peer: str, python: str, batches: Path, bits: int, group: int
) -> dict[str, float] | str:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "weights.safetensors"
        command = [python, str(Path(__file__).with_name("peers.py")), peer, "--model", str(DEMO)]
        command += ["--batches", str(batches), "--bits", str(bits), "--group", str(group), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not out.is_file():
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
        view = svlm.load_view("demo")
        for path, weight in load_file(out).items():
            view.linear(path).module.weight.data.copy_(weight)
        return judged(bench, view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help="interpreter of a peer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fit", type=int, default=128)
    parser.add_argument("--check", type=int, default=512)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    pythons = dict(item.partition("=")[::2] for item in o.python)
    rows: dict[str, Any] = json.loads(o.json.read_text()) if o.resume and o.json.is_file() else {}
    for seed in o.seeds:
        data = svlm.CalibrationSet.load("demo", fit=o.fit, check=o.check, seed=seed)
        bench = svlm.Workbench(svlm.load_view("demo"), data, latency=False)
        with tempfile.TemporaryDirectory() as folder:
            batches = Path(folder) / "batches.safetensors"
            calibration(bench, batches)
            for label, name in itertools.product(SETTINGS, [*OURS, *(p for p in PEERS if p in pythons)]):
                key = f"{label} | {name} | seed {seed}"
                if key in rows:
                    continue
                torch.manual_seed(seed)
                if name in OURS:
                    rows[key] = ours(bench, *OURS[name], *SETTINGS[label])
                else:
                    rows[key] = theirs(bench, name, pythons[name], batches, *SETTINGS[label])
                write_json(o.json, rows)
                print(key, rows[key], file=sys.stderr, flush=True)
    print(table(rows, o.seeds))


def table(rows: dict[str, Any], seeds: list[int]) -> str:
    """Markdown: KL of every seed, and the mean exact match."""
    lines = ["| setting | tool | KL, seed by seed | exact match, mean |", "|---|---|---|---:|"]
    for label, name in itertools.product(SETTINGS, [*OURS, *PEERS]):
        found = [rows.get(f"{label} | {name} | seed {seed}") for seed in seeds]
        failed = [f for f in found if isinstance(f, str)]
        if failed:
            lines.append(f"| {label} | {name} | does not run: {failed[0]} | |")
        elif all(found):
            kl = ", ".join(format(f["kl"], ".5f") for f in found)
            match = sum(f["exact_match"] for f in found) / len(found)
            lines.append(f"| {label} | {name} | {kl} | {100 * match:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
