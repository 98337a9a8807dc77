"""What `svlm verify` found as a page: it takes the shape of a run with one stage, so the sections are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..disk import make_folder
from .files import as_json, write_texts
from .page import html

FILES = ("verify.json", "verify.html")


def write_verified(folder: str | Path, result: Mapping[str, Any], gallery: Sequence[Mapping[str, Any]] = ()) -> None:
    """Put verify.json (`result` as it is) and verify.html into `folder`, which is made where it is not there.

    Raises:
        OutputError: the folder cannot be written.
    """
    make_folder(Path(folder))
    write_texts(Path(folder), dict(zip(FILES, (as_json(result), html(as_report(result), gallery)))))


def as_report(result: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of report.json: the original as stage 0, what was compared with it as stage 1."""
    quality = result["quality"]
    same: dict[str, Any] = {"kl": 0.0, "agreement": 1.0}
    for key in ("exact_match", "score"):
        if quality.get(key):
            reference = quality[key]["reference"]
            same[key] = {**quality[key], "value": reference, "delta": 0.0, "ci95": [0.0, 0.0]}
            same[key] |= {"right_to_wrong": 0, "wrong_to_right": 0} if key == "exact_match" else {}
    gate, passed = result.get("gate"), result["passed"]
    stages = [
        {"index": 0, "pass": None, "verdict": "baseline", "quality": same},
        {
            "index": 1, "pass": Path(str(result["model"])).name, "verdict": "verified" if passed else "refused",
            "gate": gate, "gate_says": result["says"], "quality": quality, "cost": result.get("cost"),
        },
    ]  # fmt: skip
    return {
        "title": f"verify · {result['model']} against {result['against']}",
        "model": {"source": str(result["against"]), "compared": str(result["model"])},
        "badge": {"good": passed, "text": "no gate was asked for" if not gate else f"gate {_word(passed)}"},
        "data": result.get("data"),
        "environment": result.get("environment"),
        "analysis": result.get("analysis"),
        "recipe": None,
        "stages": stages,
    }


def _word(passed: bool) -> str:
    return "holds" if passed else "fails"
