"""The sections of a page beside the stage table: what of report.json each shows. None or empty: leave it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .rows import IN_EFFECT, Row, last_good, stage_rows
from .words import NOTHING, amount, number, percent, points

SHOWN_VALUES = 24  # values of one tag in the heat map: those that changed most
SCALE = 0.05  # a change of this many points or more has the full colour, less where nothing changed that much
PARTS = ("vision", "connector", "language", "embeddings", "head")


def last_stage(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry of the stage that OUT holds."""
    index = last_good(report)["index"]
    return next(stage for stage in report["stages"] if stage["index"] == index)


def last_quality(report: Mapping[str, Any]) -> Mapping[str, Any]:
    return last_stage(report).get("quality") or {}


def tiles(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The result in a few figures: each with what it is."""
    rows = stage_rows(report)
    first, last = rows[0], last_good(report)
    main = last["main"]
    if not last["index"]:
        return []
    found = []
    if last["ratio"]:
        found.append((f"÷{last['ratio']:.2f}", "bytes on disk"))
    if main["delta"] is not None:
        between = "" if main["low"] is None else f" [{points(main['low'])}, {points(main['high'])}]"
        found.append((points(main["delta"]), f"points of {main['name']}{between}"))
    if last["latency_ms"] and first["latency_ms"]:
        times = last["latency_ms"] / first["latency_ms"]
        found.append((f"{last['latency_ms']:.1f} ms", f"to the first token, {times:.2f} of the original's"))
    if last["visual_tokens"] is not None and last["visual_tokens"] != first["visual_tokens"]:
        found.append((amount(last["visual_tokens"]), f"visual tokens an image, of {amount(first['visual_tokens'])}"))
    if last["kl"] is not None:
        found.append((f"{last['kl']:.4f}", "KL, nats an answer token"))
    if last["agreement"] is not None:
        found.append((percent(last["agreement"]), "of answer tokens agree"))
    return found


# ------------------------------------------------------------------------------------------------------- by tag, answer


def heat(report: Mapping[str, Any], key: str = "by_tag") -> Row | None:
    """Change of accuracy by tag and stage.

    Args:
        key: ``by_tag``; ``by_answer``, which has one level less.

    Returns:
        stages (index, pass), scale (the change that has the full colour), groups: tag and rows, each with name, n,
        reference and cells: None, or delta, low, high, p_holm, mark (▼ and ▲: lost and gained, Holm-adjusted p below
        0.05) and tone, -1 to 1.
    """
    stages = [s for s in report["stages"] if s["index"] and (s.get("quality") or {}).get(key)]
    if not stages:
        return None
    tables: list[Mapping[str, Any]] = [
        s["quality"][key] if key == "by_tag" else {"answer": s["quality"][key]} for s in stages
    ]
    cells = [cell for table in tables for values in table.values() for cell in values.values()]
    scale = max([SCALE, *(abs(c["delta"]) for c in cells if c.get("delta") is not None)])
    groups = []
    for tag in dict.fromkeys(tag for table in tables for tag in table):
        names = dict.fromkeys(name for table in tables for name in table.get(tag, {}))
        rows = [_heat_row(name, [table.get(tag, {}).get(name) for table in tables], scale) for name in names]
        shown = rows
        if len(rows) > SHOWN_VALUES:
            most = sorted(rows, key=lambda row: row["most"], reverse=True)[:SHOWN_VALUES]
            shown = [row for row in rows if row in most]
        groups.append({"tag": tag, "rows": shown, "left": len(rows) - len(shown)})
    heads = [{"index": s["index"], "pass": s["pass"], "out": s["verdict"] not in IN_EFFECT} for s in stages]
    adjusted = any(cell.get("p_holm") is not None for cell in cells)
    return {"stages": heads, "scale": scale, "groups": groups, "adjusted": adjusted}


def _heat_row(name: str, found: Sequence[Mapping[str, Any] | None], scale: float) -> Row:
    cells = [None if cell is None or cell.get("delta") is None else _cell(cell, scale) for cell in found]
    first = next(cell for cell in found if cell is not None)
    most = max((abs(cell["delta"]) for cell in cells if cell), default=0.0)
    return {"name": name, "n": first.get("n"), "reference": first.get("reference"), "cells": cells, "most": most}


def _cell(cell: Mapping[str, Any], scale: float) -> Row:
    low, high = cell.get("ci95") or (None, None)
    p, delta = cell.get("p_holm"), cell["delta"]
    mark = "" if p is None or p >= 0.05 else "▼" if delta < 0 else "▲"
    return {"delta": delta, "low": low, "high": high, "p_holm": p, "mark": mark, "tone": round(delta / scale, 3)}


# ------------------------------------------------------------------------------------------------------ more of quality


YES_NO = {
    "yes_rate": "says yes", "accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1",
}  # fmt: skip


def checks(report: Mapping[str, Any]) -> list[Row]:
    """Yes/no questions, calibration and the blank-image control as small tables: title, note, rows of three texts."""
    quality = last_quality(report)
    found = []
    if yes_no := quality.get("yes_no"):
        was = yes_no.get("reference") or {}
        there = {key: word for key, word in YES_NO.items() if key in yes_no}
        rows = [(word, percent(was.get(key)), percent(yes_no.get(key))) for key, word in there.items()]
        found.append({"title": "Yes or no", "note": f"{yes_no['n']:,} questions that yes or no answers", "rows": rows})
    if calibration := quality.get("calibration"):
        rows = [
            ("expected calibration error", percent(calibration.get("reference_ece")), percent(calibration.get("ece")))
        ]
        note = "how far the confidence in an answer is from how often it is right; 0 is best"
        found.append({"title": "Confidence", "note": note, "rows": rows})
    if blank := quality.get("blank"):
        rows = [
            (word, number(blank.get("reference_" + key), ".3f"), number(blank.get(key), ".3f"))
            for key, word in (("seeing_perplexity", "with the picture"), ("perplexity", "with a blank one"))
        ]
        note = f"perplexity of the right answers, {blank['n']:,} questions: no more with a blank one, and none was used"
        found.append({"title": "Without the picture", "note": note, "rows": rows})
    return found


BIAS = {
    "amplification": "amplification: answers moved to those that are given too often anyway",
    "answer_prior": "answer prior: leans on the most frequent answers",
    "yes_rate": "yes rate: says yes more often",
    "position": "position: prefers the place of an option",
    "tag_gap": "tag gap: from the best value of a tag to its worst",
}


def bias_rows(report: Mapping[str, Any]) -> list[Row]:
    """Bias of the result less that of the original: key, words, value, low, high, shown (the interval is off zero)."""
    rows = []
    for key, figure in (last_quality(report).get("bias") or {}).items():
        nested = figure if isinstance(figure, Mapping) and "value" not in figure else {"": figure}
        for name, entry in (nested or {}).items():
            if not isinstance(entry, Mapping) or entry.get("value") is None:
                continue
            low, high = entry.get("ci95") or (None, None)
            clear = low is not None and high is not None and (low > 0 or high < 0)
            label = key.replace("_", " ") + (f": {name}" if name else "")
            words = BIAS.get(key, label) + (f", {name}" if name else "")
            row = {"key": label, "words": words, "value": entry["value"], "low": low, "high": high}
            rows.append(row | {"shown": clear, "n": entry.get("n")})
    return rows


# ----------------------------------------------------------------------------------------------------------------- time


def times(report: Mapping[str, Any]) -> Row | None:
    """What of the run's time was validation: rows (name, working, measuring, share), and the same of the whole run."""
    rows = []
    for stage in report["stages"]:
        entries = [*(stage.get("tries") or []), stage]
        measuring = [e["seconds_measuring"] for e in entries if e.get("seconds_measuring") is not None]
        if not measuring:
            continue
        working = sum(e.get("seconds") or 0.0 for e in entries)
        name = f"{stage['index']} {stage['pass'] or 'original'}"
        rows.append({"name": name, "working": working, "measuring": sum(measuring)})
    if not rows:
        return None
    for row in rows:
        row["share"] = row["measuring"] / max(row["working"] + row["measuring"], 1e-9)
    working, measuring = (sum(row[key] for row in rows) for key in ("working", "measuring"))
    total = working + measuring
    return {"rows": rows, "total": total, "share": measuring / max(total, 1e-9)}


# ------------------------------------------------------------------------------------------------------------- analysis


def analysis(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """One of the analyses (alignment, robustness, attribution), empty where it was not made."""
    return (report.get("analysis") or {}).get(name) or {}


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Model, data and environment, one line each."""
    found = []
    for section in ("model", "data", "environment", "reload"):
        for key, value in (report.get(section) or {}).items():
            if value is not None and key != "description" and not isinstance(value, (dict, list)):
                found.append((f"{section}: {key.replace('_', ' ')}", _spelled(value)))
    return found


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value) or NOTHING
