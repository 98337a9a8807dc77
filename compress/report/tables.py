"""The tables of the other commands: menu, one pass, anatomy, plan, comparison. First the facts, then their print."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import rows as r
from . import words as w
from .attribution import print_attribution
from .facts import facts
from .terminal import print_table

if TYPE_CHECKING:
    from ..base import Pass
    from ..recipe import Recipe


def menu_facts(kinds: Iterable[type[Pass]]) -> list[dict[str, Any]]:
    """The menu as plain values."""
    return [{"name": k.name, "summary": k.summary, "paper": k.paper, "needs_data": k.needs_data} for k in kinds]


def print_menu(facts: list[dict[str, Any]]) -> None:
    print_table(["pass", "what it does", "source"], [[f["name"], f["summary"], f["paper"]] for f in facts])
    print("svlm passes NAME shows the settings of one.")


def pass_facts(kind: type[Pass]) -> dict[str, Any]:
    """One pass with its settings as plain values."""
    settings = [
        {"setting": f.name, "type": str(f.type), "default": None if f.default is dataclasses.MISSING else f.default}
        for f in dataclasses.fields(kind)
    ]
    about = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return {"name": kind.name, "summary": kind.summary, "about": about, "paper": kind.paper, "settings": settings}


def print_pass(kind: type[Pass]) -> None:
    facts = pass_facts(kind)
    print(f"{facts['name']}: {facts['summary']}\n")
    print(_docstring(kind))
    cells = [[s["setting"], s["type"], json.dumps(s["default"])] for s in facts["settings"]]
    print_table(["setting", "type", "default"], cells)
    if facts["paper"]:
        print(f"source: {facts['paper']}")


def _docstring(kind: type[Pass]) -> str:
    import inspect

    return inspect.getdoc(kind) or ""


def print_anatomy(facts: Mapping[str, Any]) -> None:
    """What `compress.inspect.inspect_table` found."""
    print(f"{facts['source']}: {facts['class']}, family {facts['family']}, stored in {facts['dtype']}")
    titles = ["part", "blocks", "block", "heads", "linears", "parameters", "bytes"]
    cells = [
        [name, str(p["blocks"]), p["block"], p["heads"], str(p["linears"]), *_weight(p)]
        for name, p in facts["parts"].items()
    ]
    cells.append(["total", "", "", "", "", *_weight(facts)])
    print_table(titles, cells, right=[False, True, False, False, True, True, True])
    tokens = facts["visual_tokens"]
    print(f"visual tokens an image: {'as many as its size asks for' if tokens is None else tokens}")
    print(f"input embedding and head: {'one tensor (tied)' if facts['tied_embeddings'] else 'two tensors'}")
    for pattern, why in facts["ignored"].items():
        print(f"left alone: {pattern} ({why})")
    if facts["passes"]:
        print("passes applied: " + ", ".join(facts["passes"]))


def _weight(facts: Mapping[str, Any]) -> tuple[str, str]:
    return w.amount(facts["parameters"]), w.size(facts["bytes"])


def print_plan(recipe: Recipe, steps: list[dict[str, Any]], checks: list[str]) -> None:
    """The steps of a recipe (`compress.pipeline.describe_steps`) and the checks that were made."""
    c = recipe.calibration
    print(f"recipe {recipe.name}: passes look at {c.fit} questions, {c.check} others judge every stage, seed {c.seed}")
    cells = [[str(s["index"]), s["pass"], w.settings_text(s["settings"]), _gate_text(s)] for s in steps]
    print_table(["#", "pass", "settings", "gate"], cells)
    for check in checks:
        print(f"{'!' if check.startswith('careful') else '✓'} {check}")


def _gate_text(step: Mapping[str, Any]) -> str:
    gate = step["gate"]
    if not gate:
        return "none: measured, never stopped"
    if "max_drop" in gate:
        bound = f"{gate['metric']} may lose {100 * gate['max_drop']:g} points"
    else:
        bound = f"{gate['metric']} at most {gate['max']:g}"
    if gate.get("confidence"):
        bound += f", at {100 * gate['confidence']:g} % confidence"
    ladder = f" ({len(step['ladder'])} milder settings)" if step["ladder"] else ""
    return f"{bound}, else {gate['on_fail']}{ladder}"


def print_comparison(result: Mapping[str, Any]) -> None:
    """What `svlm verify` found: one row and the gate's verdict, benchmarks."""
    if "quality" in result:
        _print_quality(result)
    if "lmms_eval" in result:
        print_benchmarks(result["lmms_eval"])


def _print_quality(result: Mapping[str, Any]) -> None:
    row = r.quality_row(result["quality"])
    cells = [
        w.percent(row["reference"]), w.percent(row["exact_match"]), r.change(row), r.flips(row),
        w.number(row["p"], ".3g"), w.number(row["kl"], ".4f"), w.percent(row["agreement"]),
    ]  # fmt: skip
    titles = ["original", "this", "change, points [95\u00a0%]", "flips", "p", "KL", "agree"]
    print_table(titles, [cells], right=[True] * len(titles))
    borrowed = (result.get("data") or {}).get("answers_from_original")
    if borrowed:
        print(f"{borrowed:,} questions had no answer: what the original says to them counts as right.")
    for sentence in facts(result["quality"]):
        print(sentence)
    if result["gate"]:
        print(f"gate {'holds' if result['passed'] else 'FAILS'}: {result['says']}")
    for sentence in (result["quality"].get("bias") or {}).get("says", []):
        print(f"bias: {sentence}")
    found = result.get("analysis") or {}
    if found.get("alignment"):
        print_alignment(found["alignment"])
    if "robustness" in found:
        print_robustness(found["robustness"])
    if "attribution" in found:
        print_attribution(found["attribution"])


def print_robustness(found: Mapping[str, Any]) -> None:
    """What `calib.robustness` found: a row a change and strength, and its sentences."""
    if found.get("score"):
        print(f"answers rated by {found['score']}")
    cells = [
        [
            row["change"].replace("_", " "), "" if row["strength"] is None else str(row["strength"]), f"{row['n']:,}",
            w.percent(row["reference"]), w.percent(row["value"]),
            w.points(row["reference_loss"]), w.points(row["loss"]),
            w.points(row["difference"]) + (" [{}, {}]".format(*map(w.points, row["ci95"])) if row["ci95"] else ""),
        ]
        for row in found["rows"]
    ]  # fmt: skip
    titles = ["change", "strength", "n", "original", "this", "original loses", "this loses", "difference [95\u00a0%]"]
    print_table(titles, cells, right=[False, *[True] * (len(titles) - 1)])
    for sentence in found["says"]:
        print(sentence)
    for name, reason in found["left_out"].items():
        print(f"left out: {name} ({reason})")


def print_alignment(found: Mapping[str, Any]) -> None:
    """What `calib.alignment.alignment` found, block by block."""
    columns = {
        "cka_text": "CKA text", "cka_visual": "visual", "mutual_knn_text": "k-NN text", "mutual_knn_visual": "visual",
        "between_knn": "visual–text", "reference_between_knn": "original", "mir": "MIR", "reference_mir": "original",
    }  # fmt: skip
    cells = [[row["name"], *(w.number(row[key], ".3f") for key in columns)] for row in found["blocks"]]
    print_table(["alignment", *columns.values()], cells, right=[False, *[True] * len(columns)])
    for sentence in found["says"]:
        print(sentence)


def print_benchmarks(result: Mapping[str, Any]) -> None:
    """What `passes.lmms.run` found: a row for each metric of each task."""
    titles = ["benchmark", "metric", "items", "original", "this", "change [95\u00a0%]", "items [95\u00a0%]", "flips"]
    cells, notes = [], []
    for task, row in result["tasks"].items():
        notes += [f"{task}: {note}" for note in row["notes"]]
        for metric, m in row["metrics"].items():
            items = m["items"]
            own = w.number(m["delta"], "+.4f") + (_interval(m["ci95"]) if m["ci95"] else "")
            cells.append(
                [task, metric, str(items["n"] if items else row["n"]), w.number(m["reference"], ".4f"),
                 w.number(m["value"], ".4f"), own,
                 f"{items['delta']:+.4f}{_interval(items['ci95'])}" if items and not m["ci95"] else "",
                 f"−{items['fell']} +{items['rose']}" if items else w.NOTHING]
            )  # fmt: skip
    print_table(titles, cells, right=[False, False, *[True] * 6])
    for note in dict.fromkeys(notes):
        print(f"note: {note}")


def _interval(bounds: Iterable[float]) -> str:
    return " [{:+.4f}, {:+.4f}]".format(*bounds)


def print_kernels(facts: Mapping[str, Any]) -> None:
    """What `passes.bench.kernel_table` found."""
    from ..runtime.kernels.use import rows

    titles, cells = rows(facts)
    print_table(titles, cells, right=[False, *[True] * (len(titles) - 1)])
    for sentence in facts["says"]:
        print(sentence)
