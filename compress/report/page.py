"""report.html, self-contained, and the same verdict and stage table as Markdown."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OutputError
from . import rows as r

FLIPS = {
    "right_to_wrong": "right → wrong",
    "wrong_to_right": "wrong → right",
    "changed": "another answer, neither better nor worse",
    "same": "same answer",
}


def write(out_dir: str | Path, report: Mapping[str, Any], gallery: Sequence[Mapping[str, Any]] = ()) -> None:
    """Put report.json and report.html into `out_dir`, each written aside, fsynced and renamed.

    Args:
        out_dir: an existing folder.
        report: report.json as a mapping, schema 1.
        gallery: pictures with answers: image_png_base64, question, reference, before, after, tags, flip.

    Raises:
        OutputError: the folder cannot be written.
    """
    out = Path(out_dir)
    texts = {
        "report.json": json.dumps(_finite(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": html(report, gallery),
    }
    try:
        for name, text in texts.items():
            _replace(out / name, text)
    except OSError as error:
        change = "free some space or choose another OUT"
        raise OutputError("the report cannot be written", where=str(out), found=str(error), change=change) from error


def read(out_dir: str | Path) -> dict[str, Any]:
    """report.json of a run.

    Raises:
        OutputError: there is none, or it is not JSON.
    """
    change = "give the OUT of a finished 'svlm compress'"
    try:
        report = json.loads((Path(out_dir) / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError("no report here", where=str(out_dir), found=str(error), change=change) from error
    if not isinstance(report, dict) or not isinstance(report.get("stages"), list) or not report["stages"]:
        raise OutputError("report.json is no report of svlm", where=str(out_dir), found="no stages", change=change)
    return report


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as null, which is all that JSON has for them."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def html(report: Mapping[str, Any], gallery: Sequence[Mapping[str, Any]] = ()) -> str:
    """The whole page as one text: no script, nothing loaded from elsewhere, light and dark by the reader's choice."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from .plots import accuracy_svg, size_svg

    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": r.size, "amount": r.amount, "percent": r.percent, "points": r.points, "number": r.number,
        "settings": r.settings_text, "change": r.change,
    }  # fmt: skip
    rows = r.stage_rows(report)
    order = list(FLIPS)
    pictures = sorted(gallery, key=lambda p: order.index(p["flip"]))
    return environment.get_template("report.html").render(
        report=report,
        name=r.model_name(report),
        sentences=r.headline(report),
        rows=rows,
        first=rows[0],
        last=r.last_good(report),
        badge=_badge(rows),
        columns=r.COLUMNS,
        tags=r.tag_rows(report),
        parts=r.part_rows(report),
        tries=r.try_rows(report),
        promises=[s for s in report["stages"] if s.get("promises") or s.get("broken_promise")],
        gallery=pictures,
        flip_words=FLIPS,
        accuracy=Markup(accuracy_svg(rows)),
        sizes=Markup(size_svg(rows)),
        facts=_facts(report),
    )


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


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Data and environment, one line each."""
    facts = []
    for section in ("model", "data", "environment", "reload"):
        for key, value in (report.get(section) or {}).items():
            if value is not None and not isinstance(value, (dict, list)):
                facts.append((f"{section}: {key.replace('_', ' ')}", _spelled(value)))
    return facts


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(report: Mapping[str, Any]) -> str:
    """The verdict and the stage table as GitHub-flavoured Markdown."""
    lines = [" ".join(r.headline(report)), ""]
    lines.append("| " + " | ".join(c.title for c in r.COLUMNS) + " |")
    lines.append("|" + "|".join("---:" if c.numeric else "---" for c in r.COLUMNS) + "|")
    for row in r.stage_rows(report):
        lines.append("| " + " | ".join(c.text(row).replace("|", "\\|") for c in r.COLUMNS) + " |")
    tags = r.tag_rows(report)
    if tags:
        lines += ["", "| tag | questions | before | after | change, points |", "|---|---:|---:|---:|---:|"]
        for row in tags:
            figures = (r.percent(row["reference"]), r.percent(row["value"]), r.points(row["delta"]))
            cells = (f"{row['tag']}: {row['name']}", str(row["n"]), *figures)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
