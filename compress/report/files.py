"""What a run leaves for people, on disk: report.json, report.html and answers.json, each in one rename."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..disk import write_whole
from ..errors import OutputError, SvlmError
from .page import html

REPORT, PAGE, ANSWERS = "report.json", "report.html", "answers.json"
ITEM = {"id", "image_id", "correct"}  # what every answer says, at least
STAGE = ("index", "pass", "settings", "verdict", "quality", "cost")  # what every stage says


def write(out_dir: str | Path, report: Mapping[str, Any], gallery: Sequence[Mapping[str, Any]] = ()) -> None:
    """Put report.json and report.html into `out_dir`, each written aside, fsynced and renamed.

    Args:
        out_dir: an existing folder.
        report: report.json as a mapping, schema 1.
        gallery: pictures with answers, see `page.html`.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_texts(Path(out_dir), {REPORT: as_json(report), PAGE: html(report, gallery)})


def write_run(
    out_dir: str | Path,
    report: Mapping[str, Any],
    gallery: Sequence[Mapping[str, Any]],
    answers: Mapping[str, Any],
    original: Path | None,
) -> None:
    """All that a finished run leaves: what `write` does, answers.json, and the model card (see card.py).

    Args:
        answers: questions (sha256 of the check split), stage (whose answers), items: what the original and the result
            say to each of them, as `calib.judge.Measurement.items`.
        original: folder of the original, where it is on this disk.

    Raises:
        OutputError: the folder cannot be written.
    """
    from .card import card_files

    out = Path(out_dir)
    write(out, report, gallery)
    write_texts(out, {ANSWERS: as_json(answers), **card_files(report, out, original)})


def write_texts(out: Path, texts: Mapping[str, str]) -> None:
    """Write files into a folder that exists, each whole or not at all.

    Raises:
        OutputError: it does not, or cannot be written.
    """
    change = "free some space or choose another OUT"
    if not out.is_dir():
        raise OutputError("the report cannot be written", where=str(out), found="no such folder", change=change)
    try:
        for name, text in texts.items():
            write_whole(out / name, text)
    except (OSError, SvlmError) as error:
        raise OutputError("the report cannot be written", where=str(out), found=str(error), change=change) from error


def read(out_dir: str | Path) -> dict[str, Any]:
    """report.json of a run.

    Raises:
        OutputError: there is none, or it is no report.
    """
    change = "give the OUT of a finished 'svlm compress'"
    try:
        report = json.loads((Path(out_dir) / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError("no report here", where=str(out_dir), found=str(error), change=change) from error
    if not isinstance(report, dict) or not isinstance(report.get("stages"), list) or not report["stages"]:
        raise OutputError("report.json is no report of svlm", where=str(out_dir), found="no stages", change=change)
    for number, stage in enumerate(report["stages"]):
        lacks = [key for key in STAGE if not isinstance(stage, dict) or key not in stage]
        if lacks:
            found = f"stage {number} without {', '.join(lacks)}"
            raise OutputError("report.json is damaged", where=str(out_dir), found=found, change=change)
    return report


def read_answers(out_dir: str | Path) -> dict[str, Any] | None:
    """answers.json of a run; None where it has none that is whole, as runs of earlier versions."""
    try:
        answers = json.loads((Path(out_dir) / ANSWERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    items = answers.get("items") if isinstance(answers, dict) else None
    whole = isinstance(items, list) and all(isinstance(row, dict) and set(row) >= ITEM for row in items)
    return answers if items and whole else None


def as_json(value: Any) -> str:
    """`value` as JSON text, NaN and infinities as null, which is all that JSON has for them."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
