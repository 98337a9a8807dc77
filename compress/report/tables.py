"""The tables of the other commands: menu, one pass, anatomy, plan, comparison. First the facts, then their print."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import rows as r
from . import words as w
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
        print(f"✓ {check}")


def _gate_text(step: Mapping[str, Any]) -> str:
    gate = step["gate"]
    if not gate:
        return "none: measured, never stopped"
    if "max_drop" in gate:
        bound = f"{gate['metric']} may lose {100 * gate['max_drop']:g} points"
    else:
        bound = f"{gate['metric']} at most {gate['max']:g}"
    ladder = f" ({len(step['ladder'])} milder settings)" if step["ladder"] else ""
    return f"{bound}, else {gate['on_fail']}{ladder}"


def print_comparison(result: Mapping[str, Any]) -> None:
    """What `svlm verify` found: one row, and the gate's verdict."""
    row = r.quality_row(result["quality"])
    cells = [
        w.percent(row["reference"]), w.percent(row["exact_match"]), r.change(row), r.flips(row),
        w.number(row["mcnemar_p"], ".3g"), w.number(row["kl"], ".4f"), w.percent(row["agreement"]),
    ]  # fmt: skip
    titles = ["original", "this", "change, points [95\u00a0%]", "flips", "McNemar p", "KL", "agree"]
    print_table(titles, [cells], right=[True] * len(titles))
    if result["gate"]:
        print(f"gate {'holds' if result['passed'] else 'FAILS'}: {result['says']}")


def print_kernels(facts: Mapping[str, Any]) -> None:
    """What `passes.bench.kernel_table` found."""
    from ..runtime.kernels.use import rows

    titles, cells = rows(facts)
    print_table(titles, cells, right=[False, *[True] * (len(titles) - 1)])
    for sentence in facts["says"]:
        print(sentence)
