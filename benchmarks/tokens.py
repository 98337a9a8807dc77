"""Every way to give the demo model fewer visual tokens: what it loses, what training brings back, what it saves.

    python benchmarks/tokens.py --runs runs/tokens --json benchmarks/results/tokens.json [--only tokens.dpp --keep 0.25]

Each case is one pass of the menu under `tokens.`, at one `keep`, on the same 256 questions to fit on and 512 to check
with, judged by the same answers of the original; and again after --steps steps of `distill.logits`. Exact match by tag,
KL, FLOPs by part, bytes of the cache after the prompt, time to the first token (vision and prefill, CPU time,
interleaved with the original's). Every method is paired with `tokens.random` question by question at the same `keep`:
the difference of exact match with its bootstrap interval over pictures.

Finished cases are kept in the JSON and not run again; a training that was killed goes on where it was (--runs).
--steps 0 leaves training out. Passes that a stranger adds to the menu take part, unless they have no `keep`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import svlm
from svlm.calib.cost import cost
from svlm.calib.metrics.pairs import paired_bootstrap
from svlm.compress.base import Context
from svlm.compress.disk import write_json
from svlm.passes import names
from svlm.passes.bench import Contestant, medians, one_round

CONTROL = "tokens.random"
CONTROLS = (CONTROL, "tokens.grid", "tokens.pool", "tokens.resolution")
KEEPS = (0.5, 0.25, 0.125)
ROUNDS = 9  # of timing
HEAL: dict[str, Any] = {"lr": 3.0e-4, "batch_size": 64, "average": 0.98}


def methods() -> list[str]:
    """Passes that keep a share of the visual tokens: the control that all are paired with first, then the others."""
    found = [name for name in names() if name.startswith("tokens.")]
    kept = [name for name in found if any(f.name == "keep" for f in dataclasses.fields(svlm.find(name)))]
    return sorted(kept, key=lambda name: (name not in CONTROLS, CONTROLS.index(name) if name in CONTROLS else 0))


class Race:
    """The demo model, its questions, and what the original says: loaded once, shared by all cases."""

    def __init__(self, fit: int, check: int, runs: Path) -> None:
        data = svlm.CalibrationSet.load("demo", fit=fit, check=check, seed=0)
        self.original = svlm.load_view("demo")
        self.bench = svlm.Workbench(self.original, data, cache_dir=runs / "reference", latency=False)
        self.images = [s.image_id for s in self.bench.judge.samples]
        self._said: dict[bytes, Any] = {}

    def context(self, view: svlm.ModelView, scratch: Path | None = None) -> Context:
        """As the workbench gives it, but the original answers a batch once for all cases: all train on the same."""

        @contextmanager
        def teacher() -> Iterator[svlm.ModelView]:
            with self.bench.context(view).teacher() as original:
                forward = original.model.forward

                @functools.wraps(forward)
                def remembered(**inputs: Any) -> Any:
                    digest = hashlib.blake2b(digest_size=16)
                    for name, value in sorted(inputs.items()):
                        digest.update(f"{name} {value.shape if isinstance(value, torch.Tensor) else value}".encode())
                        if isinstance(value, torch.Tensor):
                            digest.update(value.contiguous().numpy().tobytes())
                    key = digest.digest()
                    if key not in self._said:
                        self._said[key] = forward(**inputs)
                    return self._said[key]

                original.model.forward = remembered
                try:
                    yield original
                finally:
                    del original.model.forward

        return dataclasses.replace(self.bench.context(view, scratch=scratch), teacher=teacher)

    def judged(self, view: svlm.ModelView) -> dict[str, Any]:
        """What is kept of a model's measurement."""
        quality, items = self.bench.measure(view)
        one = self.bench.speaking(view).some(1)
        price = cost(view, one, latency=False)
        match = quality["exact_match"]
        made = {"exact_match": match["value"], "delta": match["delta"], "ci95": match["ci95"], "kl": quality["kl"]}
        made |= {"by_tag": quality["by_tag"], "correct": "".join(str(int(row["correct"])) for row in items)}
        made |= {key: price[key] for key in ("visual_tokens", "flops", "kv_bytes", "parameters")}
        return made | self.timed(view)

    def timed(self, view: svlm.ModelView) -> dict[str, Any]:
        """Median CPU milliseconds to the first token of one question, beside the original's in the same rounds."""
        runners = []
        for name, mine in (("original", self.original), ("mine", view)):
            batch = self.bench.speaking(mine).some(1)
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            runners.append(Contestant(name, mine, mine.model.generate, inputs))
        rows: dict[str, list[Any]] = {runner.name: [] for runner in runners}
        for number in range(ROUNDS + 1):
            for runner in runners:
                row = one_round(runner, 2)
                if number:  # the first warms up
                    rows[runner.name].append(row)
        phases = ("vision", "prefill", "first_token")
        spent = {name: {p: medians(found)["cpu_ms"][p] for p in phases} for name, found in rows.items()}
        ratio = spent["mine"]["first_token"] / spent["original"]["first_token"]
        return {"cpu_ms": spent["mine"], "cpu_ms_original": spent["original"], "first_token_ratio": ratio}


class Spent:
    """What a case takes, from here on."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def told(self, name: str) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        print(f"{name}: {wall:.0f} s, {cpu:.0f} s of CPU time", file=sys.stderr, flush=True)
        return {"seconds": wall, "cpu_seconds": cpu}


def case_name(method: str, keep: float, steps: int = 0) -> str:
    return f"{method} {keep:g}" + (f" + {steps} steps" if steps else "")


def run_case(race: Race, method: str, keep: float, steps: int, kept: dict[str, Any], save: Any, runs: Path) -> None:
    """Put what is lacking of one method at one keep into `kept`: untrained, and trained."""
    plain, trained = case_name(method, keep), case_name(method, keep, steps)
    if plain in kept and (not steps or trained in kept or "refused" in kept[plain]):
        return
    spent = Spent()
    view = svlm.load_view("demo")
    try:
        notes = svlm.apply_pass(svlm.find(method).from_settings({"keep": keep}), view, race.context(view))
    except svlm.SvlmError as error:
        kept[plain] = {"refused": str(error)}
        save()
        return
    if plain not in kept:
        kept[plain] = race.judged(view) | {"notes": notes.numbers} | spent.told(plain)
        save()
    if steps and trained not in kept:
        spent, scratch = Spent(), runs / "scratch" / trained.replace(" ", "-")
        scratch.mkdir(parents=True, exist_ok=True)
        heal = svlm.find("distill.logits").from_settings(HEAL | {"steps": steps})
        try:
            notes = svlm.apply_pass(heal, view, race.context(view, scratch))
        except svlm.SvlmError as error:
            kept[trained] = {"refused": str(error)}
        else:
            told = {key: notes.numbers[key] for key in ("best_step", "kl_first", "kl_best", "data", "diverged_at")}
            kept[trained] = race.judged(view) | {"notes": told} | spent.told(trained)
        save()
        shutil.rmtree(scratch, ignore_errors=True)


def pair(kept: dict[str, Any], images: list[str], method: str, keep: float, steps: int) -> dict[str, Any] | None:
    """Exact match beside `tokens.random` at the same keep, question by question; None where either is lacking."""
    mine, control = (kept.get(case_name(name, keep, steps), {}) for name in (method, CONTROL))
    if method == CONTROL or "correct" not in mine or "correct" not in control:
        return None
    was, now = ([c == "1" for c in row["correct"]] for row in (control, mine))
    return {"delta": (sum(now) - sum(was)) / len(now), "ci95": list(paired_bootstrap(was, now, images))}


def show(made: dict[str, Any], keeps: list[float], steps: int) -> None:
    kept, images = made["cases"], made["images"]
    base = made["original"]
    kinds = list(base["by_tag"].get("kind", {}))
    print(f"original: exact match {base['exact_match']:.1%}, {base['visual_tokens']} visual tokens", end="; ")
    print(", ".join(f"{kind} {base['by_tag']['kind'][kind]['value']:.1%}" for kind in kinds))
    titles = f"{'':30}{'tokens':>7}{'match':>8}{'change':>8}{'beside random':>22}{'KL':>8}{'first token':>12}{'KV':>9}"
    for keep in keeps:
        for trained in sorted({0, steps}):
            print(f"\nkeep {keep:g}" + (f", {trained} steps of distillation" if trained else ", untrained"))
            print(titles + "".join(f"{kind:>9}" for kind in kinds))
            for method in methods():
                row = kept.get(case_name(method, keep, trained))
                if row is None:
                    continue
                label = method + (" (control)" if method in CONTROLS else "")
                if "refused" in row:
                    print(f"{label:30} refused: {row['refused'].splitlines()[0]}")
                    continue
                beside = pair(kept, images, method, keep, trained)
                told = "–"
                if beside is not None:
                    low, high = (100 * bound for bound in beside["ci95"])
                    told = f"{100 * beside['delta']:+.1f} [{low:+.1f}, {high:+.1f}]"
                match = f"{row['exact_match']:>8.1%}{100 * row['delta']:>+8.1f}{told:>22}{row['kl']:>8.4f}"
                saved = f"{row['first_token_ratio']:>11.2f}x{row['kv_bytes'] / 1000:>6.0f} kB"
                tags = "".join(f"{100 * row['by_tag']['kind'][kind]['delta']:+9.1f}" for kind in kinds)
                print(f"{label:30}{row['visual_tokens']:>7}{match}{saved}{tags}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=methods(), default=methods(), metavar="METHOD")
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEPS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--fit", type=int, default=256)
    parser.add_argument("--check", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    if o.threads:
        torch.set_num_threads(o.threads)
    made: dict[str, Any] = json.loads(o.json.read_text()) if o.json.is_file() else {}
    asked = {"fit": o.fit, "check": o.check, "heal": HEAL}
    if made and made["asked"] != asked:
        raise SystemExit(f"{o.json} holds results for {made['asked']}, not for {asked}; give another --json")
    race = Race(o.fit, o.check, o.runs)
    made = {"asked": asked, "images": race.images, "cases": {}, "beside_random": {}} | made

    def save() -> None:
        for keep in o.keep:
            for steps in sorted({0, o.steps}):
                for method in methods():
                    found = pair(made["cases"], race.images, method, keep, steps)
                    if found is not None:
                        made["beside_random"][case_name(method, keep, steps)] = found
        write_json(o.json, made)

    if "original" not in made:
        made["original"] = race.judged(race.original)
        save()
    for keep in o.keep:
        for method in sorted({CONTROL, *o.only}, key=methods().index):
            run_case(race, method, keep, o.steps, made["cases"], save, o.runs)
    save()
    show(made, o.keep, o.steps)


if __name__ == "__main__":
    main()
