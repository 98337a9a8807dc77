"""Whether bias that is planted is reported, and none where there is none: students of a fair and of a biased teacher.

    python benchmarks/bias.py --json benchmarks/results/bias.json

The fair teacher is the demo model. The biased one is the same model with a bias on the logit of one answer: the row of
that token in the head is moved along the mean state behind which count questions are answered. Two students start from
the same pruned demo model and take the same steps of distill.logits, each from its teacher. Reported are the students
and the biased teacher, each beside the model that it is compared with.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import svlm
from svlm.calib.metrics.answers import exact_match
from svlm.calib.metrics.bias import bias
from svlm.compress.anatomy import ModelView
from svlm.compress.base import evaluating
from svlm.compress.disk import write_json
from svlm.compress.pipeline import apply_pass
from svlm.passes import find

KIND, ANSWER = "count", "3"


def biased(amount: float, bench: Any) -> ModelView:
    """The demo model with about `amount` more on the logit of `ANSWER` where it answers a count question."""
    view = svlm.load_view("demo")
    samples = [s for s in bench.data.fit if s.tags["kind"] == KIND]
    batch = bench.encoder.encode(samples)
    token = bench.encoder.tokenizer(ANSWER, add_special_tokens=False)["input_ids"][-1]
    seen: list[torch.Tensor] = []
    head = view.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with evaluating(view.model):
        view.model(**batch)
    handle.remove()
    first = (batch["labels"] != -100).float().argmax(1) - 1
    mean = seen[0][torch.arange(len(first)), first].mean(0)
    with torch.no_grad():
        head.weight[token] += amount * mean / mean.square().sum()
    return view


def student(teacher: ModelView, o: argparse.Namespace, data: svlm.CalibrationSet) -> ModelView:
    """The pruned demo model, distilled from `teacher`."""
    bench = svlm.Workbench(teacher, data, latency=False)
    view = svlm.load_view("demo")
    prune = find("prune.structured")(ratio=o.ratio)  # type: ignore[call-arg]
    apply_pass(prune, view, bench.context(view, seed=o.seed))
    trained = {"steps": o.steps, "lr": o.lr, "batch_size": o.batch_size, "train": o.train}
    apply_pass(find("distill.logits")(**trained), view, bench.context(view, seed=o.seed))  # type: ignore[arg-type]
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amount", type=float, default=8.0, help="on the logit")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--train", default="full")
    parser.add_argument("--fit", type=int, default=128)
    parser.add_argument("--check", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table here")
    o = parser.parse_args()
    began = time.perf_counter()
    data = svlm.CalibrationSet.load("demo", fit=o.fit, check=o.check, seed=o.seed)
    fair = svlm.load_view("demo")
    bench = svlm.Workbench(fair, data, latency=False)
    teacher = biased(o.amount, bench)
    samples = bench.judge.samples
    asked = [i for i, s in enumerate(samples) if s.tags["kind"] == KIND]
    said: dict[str, list[str]] = {"fair teacher": bench.judge.answers(fair, samples)}
    rows: dict[str, Any] = {}

    def compare(name: str, reference: str) -> None:
        right = sum(exact_match(a, s.answers) for a, s in zip(said[name], samples)) / len(samples)
        often = sum(said[name][i] == ANSWER for i in asked) / len(asked)
        found = bias(samples, said[reference], said[name])
        rows[f"{name} beside the {reference}"] = {
            "exact_match": right, "share_of_the_answer": often, "n": len(samples), "n_asked": len(asked),
            "amplification": {k: v for k, v in found["amplification"].items() if k != "by_tag"},
            "answer_prior": {k: found["answer_prior"][k] for k in ("value", "ci95", "distance", "gained")},
            "says": found["says"],
        }  # fmt: skip
        if o.json:  # after every pair: the script takes a while
            settings = {k: v for k, v in vars(o).items() if k != "json"}
            write_json(o.json, {"settings": settings, "pairs": rows})
        low, high = (100 * end for end in found["amplification"]["ci95"])
        print(
            f"{name} beside the {reference}: exact match {100 * right:.1f} %, '{ANSWER}' in {100 * often:.1f} % of "
            f"{len(asked)} {KIND} questions, amplification {100 * found['amplification']['value']:+.1f} points "
            f"[{low:+.1f}, {high:+.1f}], {time.perf_counter() - began:.0f} s",
            *found["says"], sep="\n  ", flush=True,
        )  # fmt: skip

    said["biased teacher"] = bench.judge.answers(teacher, samples)
    compare("biased teacher", "fair teacher")
    said["student of the biased teacher"] = bench.judge.answers(student(teacher, o, data), samples)
    compare("student of the biased teacher", "fair teacher")
    compare("student of the biased teacher", "biased teacher")
    said["student of the fair teacher"] = bench.judge.answers(student(fair, o, data), samples)
    compare("student of the fair teacher", "fair teacher")


if __name__ == "__main__":
    main()
