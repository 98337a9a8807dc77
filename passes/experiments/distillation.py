"""`svlm experiment distillation`: the teacher, the student before distillation, and the student after it.

Of a recipe the passes before its first distilling one make the student, that one heals it; what follows is left off.
Everything is measured on the check split against the teacher, in memory and without gates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...compress.base import Json, Pass, Progress, Silent
from ...compress.errors import RecipeError
from ...compress.families import Family
from ...compress.recipe import Recipe
from . import _figures as figures

STUDENTS = ("student before", "student after")


def distillation(
    model: str | Path,
    recipe: Recipe,
    data: str | Path,
    folder: Path,
    *,
    steps: int | None = None,
    batch_size: int = 32,
    rows: Sequence[Family] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Json]:
    """Prune, measure, distil, measure again.

    Args:
        steps: of the distilling pass; None: the recipe's.

    Returns:
        students: name -> quality (as in report.json) and alignment (calib/alignment.py); distilled: the pass's settings
        and notes; rows: figure, teacher, before, after; says: sentences. Also in `folder`.

    Raises:
        RecipeError: the recipe has no distilling pass, or nothing before it.
    """
    from ...compress.pipeline import apply_pass
    from ..api import environment
    from ._pair import pair

    told, c = progress or Silent(), recipe.calibration
    making, healing = _split(recipe, steps)
    bench, student = pair(
        model, data, c, batch_size=batch_size, rows=rows, trust_remote_code=trust_remote_code, progress=told
    )
    students: dict[str, dict[str, Json]] = {}
    notes: Mapping[str, Json] = {}
    for name, passes in zip(STUDENTS, (making, [healing])):
        for step in passes:
            notes = apply_pass(step, student, bench.context(student, seed=c.seed, progress=told)).numbers
        quality, _ = bench.measure(student, told)
        students[name] = {"quality": quality, "alignment": bench.alignment(student, told)}
    made: dict[str, Json] = {
        "experiment": "distillation",
        "model": str(bench.original.source),
        "made": [{"pass": step.name, "settings": step.settings()} for step in making],
        "distilled": {"pass": healing.name, "settings": healing.settings(), "notes": notes},
        "data": bench.info,
        "environment": environment(),
        "students": students,
        "rows": list(_rows(students)),
    }
    made["says"] = _says(made)
    figures.leave(made, folder, distillation=_figure(made))
    return made


def _split(recipe: Recipe, steps: int | None) -> tuple[list[Pass], Pass]:
    passes = [s.step for s in recipe.steps]
    place = next((i for i, step in enumerate(passes) if step.name.startswith("distill.")), 0)
    if not place:
        raise RecipeError(
            "the experiment wants a recipe that makes a student and then distils it",
            where=f"recipe {recipe.name}",
            found=", ".join(step.name for step in passes),
            change="a recipe with a distill pass after at least one other, for example prune-distil-quantize",
        )
    healing = passes[place]
    return passes[:place], healing if steps is None else dataclasses.replace(healing, steps=steps)  # type: ignore[call-arg]


def _rows(students: Mapping[str, Any]) -> Iterator[dict[str, Json]]:
    """figure, unit, teacher, before, after."""
    first, last = (students[name]["quality"] for name in STUDENTS)

    def row(figure: str, unit: str, teacher: Any, before: Any, after: Any) -> dict[str, Json]:
        return {"figure": figure, "unit": unit, "teacher": teacher, "before": before, "after": after}

    match = [quality["exact_match"] for quality in (first, last)]
    yield row("exact match", "share", match[0]["reference"], *(m["value"] for m in match))
    for tag, values in last["by_tag"].items():
        for value, now in values.items():
            was = first["by_tag"][tag][value]
            yield row(f"{tag}: {value}", "tag", now["reference"], was["value"], now["value"])
    yield row("KL", "nats", 0.0, first["kl"], last["kl"])
    yield row("agreement", "share", 1.0, first["agreement"], last["agreement"])
    yield row("flips", "share", 0.0, first["flips"], last["flips"])
    for key, now in (last.get("bias") or {}).items():
        was = (first.get("bias") or {}).get(key)
        if isinstance(now, Mapping) and isinstance(was, Mapping) and now.get("value") is not None:
            yield row(f"bias: {key.replace('_', ' ')}", "bias", 0.0, was.get("value"), now["value"])
    before, after = (students[name]["alignment"] for name in STUDENTS)
    for key, title in (("cka", "CKA with the teacher"), ("mutual_knn", "shared neighbours")):
        yield row(title, "share", 1.0, before[key], after[key])
    yield row("MIR", "log10", after["reference_mir"], before["mir"], after["mir"])


def _says(made: Mapping[str, Any]) -> list[str]:
    by_name = {row["figure"]: row for row in made["rows"]}
    match, kl = by_name["exact match"], by_name["KL"]
    done = f"{made['distilled']['settings']['steps']} steps of {made['distilled']['pass']}"
    said = [
        f"Exact match: teacher {100 * match['teacher']:.1f} %, student {100 * match['before']:.1f} % before and "
        f"{100 * match['after']:.1f} % after {done}; KL {kl['before']:.4f} and {kl['after']:.4f}."
    ]
    tags = [row for row in made["rows"] if row["unit"] == "tag"]
    if tags:
        worst = max(tags, key=lambda row: row["teacher"] - row["after"])
        said.append(
            f"What is still missing most: {worst['figure']}, {100 * (worst['teacher'] - worst['after']):.1f} points."
        )
    return said + list(made["distilled"]["notes"].get("remarks", []))


def table(made: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells: a figure a row."""

    def text(row: Mapping[str, Any], key: str) -> str:
        value = row[key]
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if row["unit"] in ("tag", "share") else f"{value:.4f}"

    keys = ("teacher", "before", "after")
    cells = [[row["figure"], *(text(row, key) for key in keys)] for row in made["rows"]]
    return ["figure", "teacher", *STUDENTS], cells


def _figure(made: Mapping[str, Any]) -> Any:
    """Accuracy by tag, KL and bias, alignment by block."""
    figure, (left, middle, right) = figures.empty(1, 3, 11, 4.2)
    shown = [row for row in made["rows"] if row["unit"] == "tag" or row["figure"] == "exact match"]
    for place, row in enumerate(shown):
        values = [100 * row[key] for key in ("teacher", "before", "after")]
        left.plot([min(values), max(values)], [place, place], color=figures.LINE, linewidth=2.5, zorder=1)
    for number, (key, name) in enumerate((("teacher", "teacher"), ("before", STUDENTS[0]), ("after", STUDENTS[1]))):
        colour, marker, _ = figures.SERIES[number]
        places = range(len(shown))
        left.scatter([100 * row[key] for row in shown], places, s=34, color=colour, marker=marker, label=name, zorder=2)
    left.set_yticks(range(len(shown)), [row["figure"] for row in shown])
    left.tick_params(axis="y", labelcolor=figures.INK)
    left.invert_yaxis()
    figures.titled(left, "exact match, %")
    figures.legend(left, below=True)
    others = [row for row in made["rows"] if row["unit"] in ("nats", "bias") and row["before"] is not None]
    for place, row in enumerate(others):
        for number, key in enumerate(("before", "after"), start=1):
            colour, _, _ = figures.SERIES[number]
            where = place + (-0.2 if number == 1 else 0.2)
            hatch = "" if number == 1 else "////"
            middle.barh(where, row[key], height=0.36, color=colour, hatch=hatch, edgecolor=figures.CARD)
            middle.annotate(
                f"{row[key]:.3f}", (row[key], where), (4, -3), textcoords="offset points", fontsize=8, color=figures.INK
            )
    middle.set_yticks(range(len(others)), [row["figure"] for row in others])
    middle.tick_params(axis="y", labelcolor=figures.INK)
    middle.margins(x=0.25)
    middle.set_ylim(max(len(others), 4) - 0.5, -0.5)
    figures.titled(middle, "student against teacher")
    for number, name in enumerate(STUDENTS, start=1):
        blocks = made["students"][name]["alignment"]["blocks"]
        figures.curve(right, number, range(len(blocks)), [row["cka"] for row in blocks], name)
    names = [row["name"].replace("blocks[", "").replace("]", "").replace(".", " ") for row in blocks]
    right.set_xticks(range(len(names)), names, rotation=35, ha="right")
    figures.titled(right, "CKA with the teacher, by block")
    figures.legend(right)
    return figure
