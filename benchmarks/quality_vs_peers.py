"""The demo model's decoder at few bits: svlm's passes against every other tool that runs here, on the same samples.

    python benchmarks/quality_vs_peers.py --python llmcompressor=VENV/bin/python --python hqq=VENV2/bin/python ... \\
        --seeds 0 1 2 --work DIR --json benchmarks/results/quality_vs_peers.json

Language model's linears only, which is what every peer can do (one row of svlm's has vision tower and connector as
well); 128 calibration questions, the same for all. A peer runs in the interpreter that is given for it
(`benchmarks/peers.py`) and hands over the weights it would use, so that storage and kernels play no part; one without
an interpreter is left out, and one that needs no data is judged once, for seed 0. Weights stay in --work, where the
next run finds them.

Judged by svlm on 8,192 fresh questions of the demo's generator that no tool has seen: KL(original || quantized) of the
answer tokens, and exact match (every token of the answer, its end included, is the most probable one). Few tokens carry
most of a mean KL (those where the original itself hesitates), so that a mean over some hundred questions is luck:
every mean comes with its standard error, every ratio to the best peer with a 95 % interval (bootstrap over questions,
paired): seed by seed against the best peer of that seed, and over all seeds against the best peer of all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import svlm
from svlm.compress.base import evaluating
from svlm.compress.disk import write_json
from svlm.compress.storage import DEMO
from svlm.passes.distill._observe import answer_logits

SETTINGS = {"W4 g64": (4, 64), "W3 g64": (3, 64), "W2 g32": (2, 32)}
Steps = list[tuple[str, dict[str, Any]]]
SCALES = ("distill.logits", {"train": "scales", "lr": 1e-3, "steps": 100, "data": "fit"})
OURS: dict[str, Steps] = {
    "svlm rtn, plain": [("quantize.rtn", {"search": "none"})],
    "svlm rtn": [("quantize.rtn", {})],
    "svlm gptq": [("quantize.gptq", {})],
    "svlm gptq, not equalized": [("quantize.gptq", {"equalize": False})],
    "svlm gptq + scales": [("quantize.gptq", {}), SCALES],
    "svlm gptq, everywhere": [("quantize.gptq", {"where": ["vision", "connector", "language"]})],
}
WITHOUT_DATA = ("hqq", "bitsandbytes", "optimum-quanto", "torchao")  # the same weights whatever the seed
PEERS = ("llmcompressor", "gptqmodel", "auto-round", *WITHOUT_DATA)
FRESH = 1000  # seed of the questions for the KL


class Fresh:
    """Questions that nobody has seen, and what the original makes of them: log probabilities at every answer token."""

    def __init__(self, count: int, file: Path) -> None:
        self.view = svlm.load_view("demo")
        data = svlm.CalibrationSet.load("demo", fit=16, check=16, seed=FRESH)
        assert data.recovery is not None
        bench = svlm.Workbench(self.view, data, latency=False)
        samples = list(itertools.islice(data.recovery(), count))
        self.batches = list(bench.encoder.batches(samples, 128))
        if not file.is_file():
            self._write(file)
        kept = load_file(file)
        self.reference = kept.pop("log_p")
        self.merged = [  # what the decoder gets, as long as vision tower and connector are the original's
            {"inputs_embeds": kept[str(i)], "attention_mask": b["attention_mask"], "labels": b["labels"]}
            for i, b in enumerate(self.batches)
        ]
        predicted = [torch.cat([row[row != -100] for row in batch["labels"]]) for batch in self.batches]
        self.answer = torch.cat(predicted)
        self.question = torch.cat([(batch["labels"] != -100).sum(1) for batch in self.batches])

    def _write(self, file: Path) -> None:
        seen: list[torch.Tensor] = []
        hook = self.view.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        log_p = self._log_p(self.view, self.batches)
        hook.remove()
        save_file({"log_p": log_p} | {str(i): embeds.contiguous() for i, embeds in enumerate(seen)}, file)

    def _log_p(self, view: Any, batches: list[Any]) -> torch.Tensor:
        with evaluating(view.model):
            return torch.cat([answer_logits(view, batch).float().log_softmax(-1) for batch in batches])

    def judge(self, view: Any, decoder_only: bool) -> np.ndarray:
        """[questions, 4]: KL summed over a question's answer tokens, their number, all of them right, right before."""
        log_q = self._log_p(view, self.merged if decoder_only else self.batches)
        token = (self.reference.exp() * (self.reference - log_q)).sum(-1).clamp(min=0)
        right, before = ((p.argmax(-1) == self.answer).float() for p in (log_q, self.reference))
        columns = [
            torch.stack([getattr(part, how)() for part in values.split(self.question.tolist())])
            for values, how in ((token, "sum"), (torch.ones_like(token), "sum"), (right, "min"), (before, "min"))
        ]
        return torch.stack(columns, 1).double().numpy()


def mean(rows: np.ndarray) -> float:
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def change(rows: np.ndarray) -> dict[str, float]:
    """Of exact match against the original on the same questions, and half its 95 % interval."""
    difference = rows[:, 2] - rows[:, 3]
    return {"change": float(difference.mean()), "change_95": float(1.96 * difference.std() / len(rows) ** 0.5)}


def ratio(a: np.ndarray, b: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean of `a` over mean of `b`, with its 95 % interval; questions are drawn in pairs."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(a), size=(draws, len(a)))
    ratios = a[picks, 0].sum(1) / b[picks, 0].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return mean(a) / mean(b), float(low), float(high)


def calibration(bench: svlm.Workbench, path: Path) -> None:
    """The fit questions as tensors of one sample each, for the peers."""
    tensors = {}
    for number, batch in enumerate(bench.encoder.batches(bench.judge.answered(bench.data.fit), 1)):
        tensors |= {f"{number}.{k}": v.contiguous() for k, v in batch.items() if k != "labels"}
    save_file(tensors, path)


def ours(bench: svlm.Workbench, steps: Steps, bits: int, group: int, out: Path) -> str:
    view = svlm.load_view("demo")
    for name, settings in steps:
        kind = {"bits": bits, "group": group} if name.startswith("quantize.") else {}
        step = svlm.find(name).from_settings(kind | {"where": ["language"]} | settings)
        svlm.apply_pass(step, view, bench.context(view))
    before = dict(bench.original.model.named_parameters())
    changed = {n: p.detach().clone() for n, p in view.model.named_parameters() if not torch.equal(p, before[n])}
    save_file(changed, out)  # norms too: scales may have moved into them
    return ""


def theirs(peer: str, python: str, batches: Path, bits: int, group: int, out: Path) -> str:
    """ "" or, where the peer fails, its last words."""
    command = [python, str(Path(__file__).resolve().with_name("peers.py")), peer, "--model", str(DEMO)]
    command += ["--batches", str(batches), "--bits", str(bits), "--group", str(group), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out.parent)  # logs of its own
    return "" if out.is_file() else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]


def cells(o: argparse.Namespace, pythons: dict[str, str]) -> Iterator[tuple[str, str, int, str]]:
    names = [*OURS, *(peer for peer in PEERS if peer in pythons)]
    for seed, label, name in itertools.product(o.seeds, SETTINGS, names):
        if (not o.only or name in o.only) and (seed == 0 or name not in WITHOUT_DATA):
            yield label, name, seed, key_of(label, name, seed)


def key_of(label: str, name: str, seed: int) -> str:
    return f"{label} | {name} | seed {0 if name in WITHOUT_DATA else seed}"


def file_of(work: Path, key: str) -> Path:
    """The weights; what judged them lies beside them."""
    return work / (key.replace(" | ", "--").replace(" ", "_") + ".safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help="interpreter of a peer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fit", type=int, default=128)
    parser.add_argument("--fresh", type=int, default=8192, help="questions that judge")
    parser.add_argument("--only", action="append", default=[], metavar="TOOL", help="these rows alone")
    parser.add_argument("--weights-only", action="store_true", help="judge later")
    parser.add_argument("--work", type=Path, required=True, help="where weights and judgements are kept")
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    o.work = o.work.resolve()
    o.work.mkdir(parents=True, exist_ok=True)
    pythons = dict(item.partition("=")[::2] for item in o.python)
    rows: dict[str, Any] = json.loads(o.json.read_text()) if o.json.is_file() else {}
    benches: dict[int, svlm.Workbench] = {}
    fresh = None if o.weights_only else Fresh(o.fresh, o.work / f"reference-{o.fresh}.safetensors")
    for label, name, seed, key in cells(o, pythons):
        if seed not in benches:
            data = svlm.CalibrationSet.load("demo", fit=o.fit, check=16, seed=seed)
            benches[seed] = svlm.Workbench(svlm.load_view("demo"), data, latency=False)
        bench, batches = benches[seed], o.work / f"batches-{o.fit}-{seed}.safetensors"
        if not batches.is_file():
            calibration(bench, batches)
        out = file_of(o.work, key)
        if not out.is_file() and not isinstance(rows.get(key), str):
            torch.manual_seed(seed)
            kind = SETTINGS[label]
            failed = (
                ours(bench, OURS[name], *kind, out)
                if name in OURS
                else theirs(name, pythons[name], batches, *kind, out)
            )
            if failed:
                rows[key] = failed
            print(key, failed or "made", file=sys.stderr, flush=True)
        if fresh is None or isinstance(rows.get(key), str) or (key in rows and out.with_suffix(".npy").is_file()):
            continue
        view = svlm.load_view("demo")
        weights = load_file(out)
        parameters = dict(view.model.named_parameters())
        for name, weight in weights.items():  # peers name linears, svlm parameters
            parameters[name if name in parameters else f"{name}.weight"].data.copy_(weight)
        kl = fresh.judge(view, all(name.startswith(view.decoder_path + ".") for name in weights))
        np.save(out.with_suffix(".npy"), kl)
        error = float((kl[:, 0] - mean(kl) * kl[:, 1]).std() * len(kl) ** 0.5 / kl[:, 1].sum())
        rows[key] = {"kl": mean(kl), "kl_error": error, "exact_match": float(kl[:, 2].mean()), **change(kl)}
        write_json(o.json, rows)
        print(key, rows[key], file=sys.stderr, flush=True)
    if fresh is not None:
        print(table(rows, o))


def table(rows: dict[str, Any], o: argparse.Namespace) -> str:
    """Markdown: KL of every seed, its ratio to the best peer of that seed and of all, and the change of exact match."""
    titles = (
        "setting",
        "tool",
        "KL (1e-3), seed by seed",
        "over the best peer's [95 %]",
        "all seeds",
        "exact match, points gained",
    )
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for label in SETTINGS:
        best = {seed: _best_peer(rows, label, [seed]) for seed in o.seeds}
        of_all = _best_peer(rows, label, o.seeds)
        for name in [*OURS, *PEERS]:
            seeds = [0] if name in WITHOUT_DATA else o.seeds
            found = [rows.get(key_of(label, name, seed)) for seed in seeds]
            if failed := [f for f in found if isinstance(f, str)]:
                lines.append(f"| {label} | {name} | does not run: {failed[0]} | | | |")
            elif all(found):
                kl = ", ".join(f"{1e3 * f['kl']:.2f} ± {1e3 * f['kl_error']:.2f}" for f in found)
                match = ", ".join(f"{100 * f['change']:+.2f} ± {100 * f['change_95']:.2f}" for f in found)
                compared = name in OURS and of_all and "everywhere" not in name
                over = [_over(o, label, name, best[seed], [seed]) for seed in o.seeds] if compared else []
                every = _over(o, label, name, of_all, o.seeds) if compared else ""
                lines.append(f"| {label} | {name} | {kl} | {', '.join(over)} | {every} | {match} |")
    return "\n".join(lines)


def _over(o: argparse.Namespace, label: str, name: str, peer: str, seeds: list[int]) -> str:
    """KL of one over that of a peer, both summed over `seeds` question by question, with its interval."""
    a, b = (sum(_kl(o, label, who, seed) for seed in seeds) for who in (name, peer))
    return "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(np.asarray(a), np.asarray(b)))


def _best_peer(rows: dict[str, Any], label: str, seeds: list[int]) -> str:
    """The peer with the lowest mean KL over `seeds`; "" if there is none."""
    found = {peer: [rows.get(key_of(label, peer, seed)) for seed in seeds] for peer in PEERS}
    known = {p: sum(row["kl"] for row in kept) for p, kept in found.items() if all(isinstance(r, dict) for r in kept)}
    return min(known, key=lambda p: known[p]) if known else ""


def _kl(o: argparse.Namespace, label: str, name: str, seed: int) -> np.ndarray:
    return np.load(file_of(o.work, key_of(label, name, seed)).with_suffix(".npy"))


if __name__ == "__main__":
    main()
