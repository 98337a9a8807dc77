"""report.html, self-contained, and the same verdict and stage table as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from . import rows as r
from . import sections as s
from . import words as w
from .use import how_to_load

FLIPS = {
    "right_to_wrong": "right → wrong",
    "wrong_to_right": "wrong → right",
    "changed": "another answer, neither better nor worse",
    "same": "same answer",
}
# of `rows.COLUMNS`, what the stage table of the page leaves to the table of all figures
LESS = ("settings", "agreement", "parameters", "flops", "measuring")


def render(template: str, title: str, **values: Any) -> str:
    """One of the folder's templates as a whole page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": w.size, "amount": w.amount, "percent": w.percent, "points": w.points, "number": w.number,
        "settings": w.settings_text, "change": r.change, "signed": w.signed, "whole": w.whole,
    }  # fmt: skip
    return environment.get_template(template).render(title=title, version=__version__, **values)


def html(report: Mapping[str, Any], gallery: Sequence[Mapping[str, Any]] = ()) -> str:
    """The whole page as one text: no script, nothing loaded from elsewhere, light and dark by the reader's choice.

    Args:
        report: report.json as a mapping, schema 1; `compress.report.verified` makes one of what `svlm verify` found.
        gallery: pictures with answers: image (a data URI), question, reference, before, after, tags, flip.
    """
    from . import analyses as a
    from . import plots

    rows = r.stage_rows(report)
    order = list(FLIPS)
    values: dict[str, Any] = {
        "description": (report.get("data") or {}).get("description"),
        "recipe": report.get("recipe"),
        "over": _over(report),
        "sentences": r.headline(report),
        "rows": rows,
        "marks": {"good": ("passed", "retried", "verified"), "bad": ("failed", "skipped", "kept", "refused")},
        "badge": report.get("badge") or _badge(rows),
        "tiles": s.tiles(report),
        "main": rows[0]["main"]["name"],
        "timed": any(row["latency_ms"] for row in rows),
        "columns": _columns(rows),
        "every_column": [c for c in r.COLUMNS if _said(c, rows)],
        "accuracy": markup(plots.accuracy_svg(rows)),
        "by_bytes": markup(plots.path_svg(rows, "bytes", "megabytes on disk", 1e-6)),
        "by_ms": markup(plots.path_svg(rows, "latency_ms", "milliseconds to the first token")),
        "heat": s.heat(report),
        "answers": s.heat(report, "by_answer"),
        "bytes_by_part": markup(plots.parts_svg(rows, "bytes_by_part", "megabytes", 1e-6, s.PARTS)),
        "ms_by_part": markup(plots.parts_svg(rows, "ms_by_part", "milliseconds", 1.0, tuple(r.FIRST))),
        "gallery": sorted(gallery, key=lambda picture: order.index(picture["flip"])),
        "flip_words": FLIPS,
        "checks": s.checks(report),
        "reliability": markup(a.reliability_svg(report)),
        "bias": s.bias_rows(report),
        "bias_says": (s.last_quality(report).get("bias") or {}).get("says") or [],
        "bias_plot": markup(a.bias_svg(report)),
        "analyses": [_marked(section) for section in a.sections(report)],
        "tries": r.try_rows(report),
        "promises": [stage for stage in report["stages"] if stage.get("promises") or stage.get("broken_promise")],
        "times": s.times(report),
        "use": how_to_load(report),
        "facts": s.facts(report),
    }
    values["contents"] = _contents(values)
    return render("report.html", r.model_name(report), **values)


def markup(text: str) -> Any:
    """`text` as HTML that needs no escaping."""
    from markupsafe import Markup

    return Markup(text)


def _marked(section: Mapping[str, Any]) -> dict[str, Any]:
    return {**section, "plots": [(markup(svg), caption, note) for svg, caption, note in section["plots"]]}


def _over(report: Mapping[str, Any]) -> str:
    """The line above the verdict: which model, which recipe."""
    recipe = (report.get("recipe") or {}).get("name")
    return str(report.get("title") or r.model_name(report)) + (f" · recipe {recipe}" if recipe else "")


def _columns(rows: Sequence[r.Row]) -> list[r.Column]:
    return [c for c in r.COLUMNS if c.key not in LESS and _said(c, rows)]


def _said(column: r.Column, rows: Sequence[r.Row]) -> bool:
    """Whether any stage says something in this column."""
    return any(column.text(row) not in (w.NOTHING, "") for row in rows)


def _contents(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Anchors and titles of the sections that are there."""
    every = [
        ("stages", "Stages", True), ("accuracy", "Accuracy and cost", True), ("tags", "By tag", values["heat"]),
        ("parts", "Bytes and milliseconds", values["bytes_by_part"] or values["ms_by_part"]),
        ("gallery", "Pictures", values["gallery"]),
        ("checks", "What averages hide", values["checks"] or values["bias"]),
        *((section["id"], section["title"], True) for section in values["analyses"]),
        ("tries", "Rolled back", values["tries"]), ("time", "Time", values["times"]), ("use", "Use it", values["use"]),
        ("facts", "Data", True),
    ]  # fmt: skip
    return [(id, title) for id, title, there in every if there]


def _badge(rows: Sequence[r.Row]) -> dict[str, Any]:
    """The run in three words, and whether every gate held."""
    verdicts = [row["verdict"] for row in rows]
    for verdict, text in (
        ("failed", "stopped at a gate"),
        ("kept", "a failed gate was kept"),
        ("skipped", "a stage was skipped"),
    ):
        if verdict in verdicts:
            return {"good": False, "text": text}
    return {"good": True, "text": "all gates hold"}


def markdown(report: Mapping[str, Any]) -> str:
    """The verdict and the stage table as GitHub-flavoured Markdown."""
    lines = [" ".join(r.headline(report)), "", *stage_table(report, r.COLUMNS)]
    tags = r.tag_rows(report)
    if tags:
        lines += ["", "| tag | questions | before | after | change, points |", "|---|---:|---:|---:|---:|"]
        for row in tags:
            figures = (w.percent(row["reference"]), w.percent(row["value"]), w.points(row["delta"]))
            lines.append(_line((f"{row['tag']}: {row['name']}", str(row["n"]), *figures)))
    return "\n".join(lines) + "\n"


def stage_table(report: Mapping[str, Any], columns: Sequence[r.Column]) -> list[str]:
    """The lines of the stage table as Markdown."""
    head = [_line([c.title for c in columns]), "|" + "|".join("---:" if c.numeric else "---" for c in columns) + "|"]
    return head + [_line([c.text(row) for c in columns]) for row in r.stage_rows(report)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
