"""A report like one that a run of four stages leaves, and a gallery, for the tests of what is made from them."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

REFERENCE = 0.9140625
LOOSE = {"metric": "exact_match", "max_drop": 0.05, "on_fail": "stop"}
GATE = {"metric": "exact_match", "max_drop": 0.02, "on_fail": "retry"}
TAGS = {"what": (0.93, 0.92, 180), "exists": (0.88, 0.84, 172), "count": (0.97, 0.97, 160)}
PARTS = {"vision": 0.45, "connector": 0.05, "language": 0.42, "embeddings": 0.08}


def quality(delta: float, low: float, high: float, worse: int, better: int, kl: float) -> dict[str, Any]:
    by_tag = {name: {"n": n, "value": b, "reference": a, "delta": b - a} for name, (a, b, n) in TAGS.items()}
    return {
        "kl": kl,
        "agreement": 1 - kl,
        "perplexity": 1.2 + kl,
        "exact_match": {
            "value": REFERENCE + delta, "reference": REFERENCE, "delta": delta, "ci95": [low, high], "mcnemar_p": 0.24,
            "right_to_wrong": worse, "wrong_to_right": better,
        },
        "by_tag": {"kind": by_tag},
    }  # fmt: skip


def cost(stored: int, parameters: int, tokens: int = 64) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "bytes": stored,
        "bytes_by_part": {part: int(share * stored) for part, share in PARTS.items()},
        "visual_tokens": tokens,
        "flops": {"vision": 190e6, "prefill": 4e6 * tokens, "decode": 5e6},
        "latency_ms": {"vision": 3.1, "prefill": 0.06 * tokens, "decode_per_token": 1.9},
    }


def stage(index: int, name: str | None, verdict: str, **more: Any) -> dict[str, Any]:
    entry = {
        "index": index, "pass": name, "settings": {}, "verdict": verdict, "gate": None, "gate_passed": True,
        "gate_says": "no gate", "seconds": 12.0 + index, "peak_rss_bytes": 9 * 10**8, "promises": [],
        "broken_promise": None, "notes": {}, "tries": [],
    }  # fmt: skip
    return entry | more


def report(*, stopped: bool = False) -> dict[str, Any]:
    """Three passes that hold their gates, the last at its second try; with `stopped` a fourth that fails."""
    three_bits = stage(
        3, "quantize.gptq", "failed", settings={"bits": 3, "group": 64}, gate_says="exact match lost 4.10 points",
        quality=quality(-0.041, -0.0586, -0.0234, 27, 6, 0.121), cost=cost(1_350_000, 3_440_000),
    )  # fmt: skip
    stages = [
        stage(0, None, "baseline", quality=quality(0.0, 0.0, 0.0, 0, 0, 0.0), cost=cost(7_816_000, 3_900_000)),
        stage(
            1, "prune.structured", "passed", settings={"ratio": 0.33, "where": "language", "what": ["mlp"]}, gate=LOOSE,
            gate_says="exact match lost 2.15 points, allowed 5.00 points", promises=["prune.structured"],
            quality=quality(-0.0215, -0.0371, -0.0078, 17, 6, 0.0812), cost=cost(6_900_000, 3_440_000),
        ),
        stage(
            2, "distill.logits", "passed", settings={"steps": 400, "lr": 1e-4}, gate=GATE,
            gate_says="exact match lost 0.20 points, allowed 2.00 points", promises=["prune.structured"],
            quality=quality(-0.002, -0.0137, 0.0098, 6, 5, 0.0161), cost=cost(6_900_000, 3_440_000),
        ),
        stage(
            3, "quantize.gptq", "retried", settings={"bits": 4, "group": 64}, gate=GATE, tries=[three_bits],
            gate_says="exact match lost 1.17 points, allowed 2.00 points",
            promises=["prune.structured", "quantize.gptq"],
            quality=quality(-0.0117, -0.0254, 0.002, 12, 6, 0.0302), cost=cost(1_742_000, 3_440_000),
        ),
    ]  # fmt: skip
    if stopped:
        stages.append(stage(
            4, "tokens.random", "failed", settings={"keep": 0.1}, gate=GATE, gate_passed=False,
            gate_says="exact match lost 40.20 points, allowed 2.00 points",
            quality=quality(-0.402, -0.452, -0.349, 214, 8, 1.31), cost=cost(1_742_000, 3_440_000, tokens=6),
        ))  # fmt: skip
    return {
        "schema": 1,
        "recipe": {"name": "default", "calibration": {"fit": 256, "check": 512, "seed": 0}, "passes": []},
        "stages": stages,
        "model": {"source": "demo", "family": "llava", "parameters": 3_900_000, "fingerprint": "9f2c" * 16},
        "data": {"name": "demo", "fit": 256, "check": 512, "fingerprint": "ab12" * 16},
        "environment": {"svlm": "0.1.0", "torch": "2.13.0", "cpu": "a <processor> & more", "threads": 2},
        "error": None,
        "reload": {"checked": True, "max_abs_diff": 0.0},
    }


def rich(*, stopped: bool = False) -> dict[str, Any]:
    """The same with everything that a report may hold besides: intervals by tag, checks, bias, time, analyses."""
    made = report(stopped=stopped)
    for entry in made["stages"]:
        entry["seconds_measuring"] = 3.0
        for name, cell in entry["quality"]["by_tag"]["kind"].items():
            lost = name == "exists" and entry["index"] > 0
            cell |= {"ci95": [cell["delta"] - 0.03, cell["delta"] + 0.03], "p": 0.1, "p_holm": 0.012 if lost else 1.0}
        entry["quality"]["by_answer"] = {"violin": dict(entry["quality"]["by_tag"]["kind"]["what"])}
    rates = {"yes_rate": 0.52, "accuracy": 0.91, "precision": 0.9, "recall": 0.93, "f1": 0.915}
    bins = [{"confidence": c / 10, "accuracy": c / 10 - 0.02, "n": 20} for c in range(3, 10)]
    made["stages"][3]["quality"] |= {
        "yes_no": {"n": 172, **rates, "reference": rates | {"accuracy": 0.94}},
        "calibration": {"ece": 0.042, "reference_ece": 0.021, "bins": bins},
        "blank": {"n": 512, "perplexity": 7.125, "reference_perplexity": 7.5, "seeing_perplexity": 1.25,
                  "reference_seeing_perplexity": 1.125},
        "bias": {"amplification": {"value": 0.021, "ci95": [0.004, 0.04]}, "position": None,
                 "yes_rate": {"value": -0.013, "ci95": [-0.05, 0.03]}},
        "detectable": 0.023,
    }  # fmt: skip
    blocks = [
        {"part": part, "block": i, "cka": 0.99 - 0.03 * i, "mutual_knn": 0.9 - 0.08 * i}
        for part in ("vision", "language") for i in range(4)
    ]  # fmt: skip
    changes = [
        {"change": change, "strength": i, "reference_loss": 0.02 * i, "loss": 0.03 * i, "difference": 0.01 * i,
         "ci95": [0.01 * i - 0.02, 0.01 * i + 0.02]}
        for change in ("noise", "blur", "jpeg") for i in range(1, 6)
    ]  # fmt: skip
    parts = [
        {"part": "vision", "kl": 0.01, "share": 0.71, "ci95": [0.6, 0.8], "exact_match": 0.91},
        {"part": "connector", "kl": 0.028, "share": 0.04, "ci95": [-0.02, 0.1], "exact_match": 0.9},
    ]
    made["analysis"] = {
        "alignment": {"blocks": blocks},
        "robustness": {"rows": changes},
        "attribution": {"parts": parts, "sentence": "Most of it was lost in the vision tower."},
    }
    made["reload"]["stock"] = {"works": False, "says": "it loads another model: logits differ by up to 3.1"}
    return made


def answers(wrong: tuple[int, ...] = (), count: int = 60) -> list[dict[str, Any]]:
    """Answers to questions, two about each picture; those of these numbers are wrong, the original's is number 0."""
    return [
        {"id": f"q{i}", "image_id": f"i{i // 2}", "answer": "no" if i in wrong else "yes", "correct": i not in wrong,
         "reference_answer": "yes", "reference_correct": i != 0}
        for i in range(count)
    ]  # fmt: skip


def gallery(count: int = 10) -> list[dict[str, Any]]:
    flips = ("same", "right_to_wrong", "wrong_to_right", "changed")
    rows = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (96, 96), (20 * i, 200 - 15 * i, 120)).save(buffer, "PNG")
        rows.append({
            "image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), "flip": flips[i % 4],
            "question": f"what is left of the <b>cake</b> {i}?", "reference": "violin", "before": "violin",
            "after": "saxophone" if flips[i % 4] == "right_to_wrong" else "violin", "tags": {"kind": "relation"},
        })  # fmt: skip
    return rows
