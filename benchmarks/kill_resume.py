"""Kill a three-pass run at random instants, resume it, and compare the final weights with an undisturbed run's.

    python benchmarks/kill_resume.py --kills 20 --seed 0 --json benchmarks/kill_resume.json

Each trial starts `svlm compress` in a process of its own and sends SIGKILL to the whole process group after a time
drawn uniformly: three in four between the first stage on disk and the end of the undisturbed run, the others before
(start-up and rehearsal). Then it runs again with `--resume`. Exit code 1 if any weight differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RECIPE = """
calibration: {fit: 96, check: 96, seed: 0}
passes:
  - prune.structured: {ratio: 0.25, where: language, what: [mlp]}
    gate: null
  - distill.logits: {steps: 12, lr: 1.0e-4, batch_size: 16}
    gate: null
  - quantize.gptq: {bits: 4, group: 64}
    gate: null
"""


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    arguments = ["compress", "demo", "-r", str(recipe), "-d", "demo", "-o", str(out), "--batch-size", "16", *more]
    return [sys.executable, "-m", "svlm", *arguments]


def weights(out: Path) -> dict[str, str]:
    """sha256 of every weight file, and of the ledger that says how to read them."""
    files = sorted([*out.glob("*.safetensors"), out / "svlm.json"])
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run_and_kill(arguments: list[str], now: Callable[[], bool]) -> bool:
    """Start, SIGKILL the process group as soon as `now()` holds. True if it was still running then."""
    child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while child.poll() is None:
        if now():
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return True
        time.sleep(0.002)
    return False


def undisturbed(arguments: list[str], out: Path) -> tuple[float, float]:
    """Run to the end; returns the seconds to the first stage on disk, and to the end."""
    start, first = time.perf_counter(), []

    def first_stage() -> bool:
        if not first and any((out / ".svlm" / "stages").glob("00-*")):
            first.append(time.perf_counter() - start)
        return False

    run_and_kill(arguments, first_stage)
    if not (out / "svlm.json").is_file():
        raise SystemExit("the undisturbed run failed: " + " ".join(arguments))
    return first[0], time.perf_counter() - start


def after(seconds: float) -> Callable[[], bool]:
    """Holds from so many seconds on."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


def stage_reached(out: Path) -> str:
    """Where the kill hit, from what is on disk."""
    if (out / "svlm.json").is_file():
        return "published"
    stages = sorted(p.name.rsplit("-", 1)[0] for p in (out / ".svlm" / "stages").glob("[0-9]*") if p.is_dir())
    scratch = list((out / ".svlm" / "scratch").glob("*/*/*")) if (out / ".svlm" / "scratch").is_dir() else []
    return (stages[-1] if stages else "before the baseline") + (f" + {len(scratch)} block files" if scratch else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="svlm-kill-"))
    try:
        recipe = folder / "three.yaml"
        recipe.write_text(RECIPE)
        first, length = undisturbed(command(recipe, folder / "calm"), folder / "calm")
        wanted = weights(folder / "calm")
        print(f"undisturbed: {length:.1f} s, first stage after {first:.1f} s, {wanted}", flush=True)
        rows = []
        for trial in range(options.kills):
            out, instant = (
                folder / f"trial{trial}",
                draw.uniform(*((0.0, first) if trial % 4 == 3 else (first, length))),
            )
            killed = run_and_kill(command(recipe, out), after(instant))
            where = stage_reached(out)
            done = subprocess.run(command(recipe, out, "--resume"), capture_output=True, text=True, check=False)
            same = done.returncode == 0 and weights(out) == wanted
            rows.append(
                {"trial": trial, "killed_after": round(instant, 2), "killed": killed, "reached": where, "same": same}
            )
            print(
                f"{trial:3d}  killed after {instant:6.2f} s  ({where})  {'identical' if same else 'DIFFERENT'}",
                flush=True,
            )
            if done.returncode != 0:
                print(done.stderr[-2000:], flush=True)
            shutil.rmtree(out, ignore_errors=True)
        good = sum(row["same"] for row in rows)
        print(f"{good} of {len(rows)} resumed runs ended with bit-identical weights")
        if options.json:
            options.json.write_text(json.dumps({"seconds": round(length, 2), "trials": rows}, indent=1) + "\n")
        return 0 if good == len(rows) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
