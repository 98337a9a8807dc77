"""What gates and intervals are worth: simulated models whose loss is known, questions clustered by picture.

    python benchmarks/gates.py --json benchmarks/results/gates.json
    python benchmarks/gates.py --table benchmarks/results/gates.json    # what docs/verification.md shows of it

A question's answer turns wrong, turns right, or stays. Questions about one picture flip together: their correlation is
`icc` (a Dirichlet-multinomial distribution: every flip of a picture makes further ones of the same kind likelier). Each
trial goes through svlm's own evidence, intervals and gates. Coverage is the share of trials whose 95 % interval holds
the true change; the standard error of a coverage of 95 % is 0.5 points with 2,000 trials.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from svlm.calib.metrics.paired import evidence, mean_evidence
from svlm.calib.metrics.pairs import paired_bootstrap
from svlm.compress.disk import write_json
from svlm.compress.evidence import bound, interval
from svlm.compress.gate import Gate

PICTURES = {  # questions of each picture, in turn, and their correlation
    "4 a picture": ((4,), 0.2),
    "1 to 8 a picture": ((1, 2, 3, 4, 5, 8), 0.2),
    "10 a picture, alike": ((10,), 0.4),
}
CHANGES = {  # shares of the answers that turn wrong and right
    "no flips": (0.0, 0.0),
    "few flips, nothing lost": (0.01, 0.01),
    "many flips, nothing lost": (0.03, 0.03),
    "3 points lost, few gained": (0.035, 0.005),
    "3 points lost, many flips": (0.05, 0.02),
}
SIZES = (128, 512, 1024)
Trial = tuple[np.ndarray, np.ndarray]


def draw(
    rng: np.random.Generator, n: int, pictures: tuple[tuple[int, ...], float], change: tuple[float, float]
) -> Trial:
    """The change of each of n answers (-1, 0 or 1), and the number of its picture."""
    sizes, icc = pictures
    counts = np.array([size for size, _ in zip(itertools.cycle(sizes), range(n))])
    counts = counts[: int(np.searchsorted(counts.cumsum(), n)) + 1]
    counts[-1] -= counts.sum() - n
    mass = (1 - icc) / icc
    kinds = np.zeros((len(counts), 3)) + mass * np.array([*change, 1 - sum(change)])
    changes = np.zeros((len(counts), counts.max()), dtype=np.int64)
    for k in range(counts.max()):
        lost, kept = kinds[:, 0], kinds[:, 2]
        at = rng.random(len(counts)) * kinds.sum(1)
        kind = np.where(at < lost, 0, np.where(at >= kinds.sum(1) - kept, 2, 1))
        changes[:, k] = np.array([-1, 1, 0])[kind]
        kinds[np.arange(len(counts)), kind] += 1
    real = np.arange(counts.max()) < counts[:, None]
    return changes[real], np.repeat(np.arange(len(counts)), counts)


def scores(change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers, before and after, that differ by `change`; those that do not are right."""
    return (change <= 0).astype(float), (change >= 0).astype(float)


def quality_of(change: np.ndarray, images: np.ndarray) -> dict[str, Any]:
    """What a gate on exact match reads."""
    proof = evidence(*scores(change), images)
    match = {"delta": float(change.mean()), "ci95": list(interval(proof))}
    return {"exact_match": match, "evidence": {"exact_match": proof}}


def coverage(n: int, pictures: str, change: str, trials: int, *, bootstrap: bool = False) -> dict[str, float]:
    """Shares of intervals that hold the truth, lie above it and below it, and their mean width."""
    rng = np.random.default_rng(n)
    truth = CHANGES[change][1] - CHANGES[change][0]
    above = below = width = 0.0
    for _ in range(trials):
        changes, images = draw(rng, n, PICTURES[pictures], CHANGES[change])
        if bootstrap:
            before, after = scores(changes)
            low, high = paired_bootstrap(list(before), list(after), images, resamples=1000)  # type: ignore[arg-type]
        else:
            low, high = interval(evidence(*scores(changes), images))
        above, below, width = above + (low > truth + 1e-12), below + (high < truth - 1e-12), width + high - low
    held = 1 - (above + below) / trials
    return {"covers": held, "above": above / trials, "below": below / trials, "width": width / trials}


def passes(gate: Gate, n: int, pictures: str, change: str, trials: int) -> dict[str, float]:
    """Shares of trials in which the gate holds, and in which it cannot tell."""
    rng = np.random.default_rng(n + 1)
    held = unsure = 0
    for _ in range(trials):
        passed, says = gate.judge(quality_of(*draw(rng, n, PICTURES[pictures], CHANGES[change])))
        held, unsure = held + passed, unsure + ("cannot tell" in says)
    return {"passes": held / trials, "cannot_tell": unsure / trials}


def mean_coverage(spread: float, pictures: int, trials: int) -> float:
    """How often the one-sided 95 % bound of a mean lies above it; a picture's share is log-normal with this sigma."""
    rng, held = np.random.default_rng(pictures), 0
    names = np.arange(pictures)
    for _ in range(trials):
        values = np.exp(spread * rng.standard_normal(pictures))
        held += bound(mean_evidence(values, names, pictures), 0.95) >= np.exp(spread**2 / 2)
    return held / trials


def table(made: dict[str, Any]) -> str:
    """The results as docs/verification.md shows them."""
    trials = made["trials"]
    told = [
        f"Coverage of 95 % intervals, {trials['coverage']:,} trials each (in brackets: above + below the truth):",
        "",
    ]
    columns = [(pictures, n) for pictures in PICTURES for n in SIZES]
    told += ["| | " + " | ".join(f"{pictures}: n = {n}" for pictures, n in columns) + " |", "|---" * 10 + "|"]
    cells = {(row["pictures"], row["n"], row["change"]): row for row in made["coverage"]}

    def cell(row: dict[str, Any]) -> str:
        return f"{100 * row['covers']:.1f} ({100 * row['above']:.1f} + {100 * row['below']:.1f})"

    told += [f"| {c} | " + " | ".join(cell(cells[p, n, c]) for p, n in columns) + " |" for c in CHANGES]
    old = ", ".join(f"{row['change']}: {100 * row['covers']:.1f}" for row in made["bootstrap"])
    told += ["", f"The percentile bootstrap over pictures, n = 128, 4 a picture, 500 trials: {old}.", ""]
    told += [
        f"Gates at n = 1,024, {trials['gates']} trials each: % that pass, and % of which the gate cannot tell:",
        "",
    ]
    told += ["| gate | | " + " | ".join(PICTURES) + " |", "|---" * 5 + "|"]
    groups: dict[tuple[str, str], list[str]] = {}
    for row in made["gates"]:
        gate = ", ".join(f"{key} {value}" for key, value in row["gate"].items() if key in ("max_drop", "confidence"))
        shown = f"{100 * row['passes']:.1f}" + (
            f", {100 * row['cannot_tell']:.1f}" if "confidence" in row["gate"] else ""
        )
        groups.setdefault((gate, row["change"]), []).append(shown)
    told += [f"| `{gate}` | {change} | " + " | ".join(shown) + " |" for (gate, change), shown in groups.items()]
    tail = "; ".join(f"sigma {r['sigma']}, {r['pictures']} pictures: {100 * r['covers']:.1f}" for r in made["mean"])
    told += ["", f"One-sided 95 % bounds of a mean whose pictures' shares are log-normal (the KL's tail): {tail}."]
    return "\n".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trials", type=int, default=2000, help="of each coverage; gates have 200")
    parser.add_argument("--table", type=Path, help="print what a run left, simulate nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    made: dict[str, Any] = {
        "trials": {"coverage": options.trials, "gates": 200},
        "coverage": [],
        "bootstrap": [],
        "gates": [],
        "mean": [],
    }
    for pictures, n, change in itertools.product(PICTURES, SIZES, CHANGES):
        row = {"pictures": pictures, "n": n, "change": change} | coverage(n, pictures, change, options.trials)
        made["coverage"].append(row)
        told = f"covers {row['covers']:.1%} ({row['above']:.1%} above, {row['below']:.1%} below)"
        print(f"{pictures:20} n {n:4} {change:26} {told}", flush=True)
    for change in CHANGES:
        covers = coverage(128, "4 a picture", change, 500, bootstrap=True)["covers"]
        made["bootstrap"].append({"pictures": "4 a picture", "n": 128, "change": change, "covers": covers})
        print(f"percentile bootstrap, 4 a picture, n 128, {change:26} covers {covers:.1%}", flush=True)
    strict, sure, loose = (
        Gate(max_drop=0.01, confidence=0.95),
        Gate(max_drop=0.02, confidence=0.95),
        Gate(max_drop=0.02),
    )
    for gate, change, pictures in itertools.product((strict, sure, loose), CHANGES, PICTURES):
        row = {"gate": gate.to_json(), "pictures": pictures, "n": 1024, "change": change}
        row |= passes(gate, 1024, pictures, change, 200)
        made["gates"].append(row)
        told = f"passes {row['passes']:.1%}, cannot tell {row['cannot_tell']:.1%}"
        print(f"max_drop {gate.max_drop} confidence {gate.confidence} {pictures:20} {change:26} {told}", flush=True)
    for spread, pictures in itertools.product((0.5, 1.0, 1.5), (128, 256)):
        covers = mean_coverage(spread, pictures, options.trials)
        made["mean"].append({"sigma": spread, "pictures": pictures, "covers": covers})
        print(f"mean of log-normal shares, sigma {spread}, {pictures} pictures: bound holds {covers:.1%}", flush=True)
    if options.json:
        write_json(options.json, made)


if __name__ == "__main__":
    main()
