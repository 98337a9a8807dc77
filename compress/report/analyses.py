"""Alignment, robustness and attribution as sections of a page, and the plots of bias and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .curves import Found, Line, Panel, forest_svg, lines_svg
from .sections import analysis, bias_rows, last_quality
from .words import NOTHING, number, percent, signed

MEASURES = {"cka": "CKA", "mutual_knn": "mutual k-NN"}  # of alignment, both from 0 (unlike) to 1 (alike)
COLUMNS = {  # of the table of alignment
    "cka": "CKA", "cka_text": "CKA, text", "cka_visual": "CKA, visual", "mutual_knn": "mutual k-NN",
    "reference_between_knn": "visual–text k-NN, original", "between_knn": "now",
    "reference_mir": "MIR, original", "mir": "now",
}  # fmt: skip
BINS_LEAST = 1  # answers in a bin of the calibration plot


def sections(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The analyses that were made, in the order of the page.

    Returns:
        Each with id, title, sentences, note, plots (SVG, caption, note), titles and rows of its table.
    """
    made = (("alignment", _alignment), ("robustness", _robustness), ("attribution", _attribution))
    return [section for name, make in made if (found := analysis(report, name)) and (section := make(found))]


def _alignment(found: Mapping[str, Any]) -> dict[str, Any] | None:
    blocks = [row for row in found.get("blocks") or [] if any(row.get(key) is not None for key in (*MEASURES, "mir"))]
    if not blocks:
        return None
    parts = list(dict.fromkeys(str(row.get("part", "blocks")) for row in blocks))
    by_part = {part: [row for row in blocks if str(row.get("part", "blocks")) == part] for part in parts}
    drawn = {part: rows for part, rows in by_part.items() if len(rows) > 1} or by_part
    panels = [
        Panel(
            part,
            [_tick(row.get("block"), i) for i, row in enumerate(rows)],
            [Line(word, [row.get(key) for row in rows]) for key, word in MEASURES.items() if _any(rows, key)],
        )
        for part, rows in drawn.items()
        if any(_any(rows, key) for key in MEASURES)
    ]
    plots = []
    if panels:
        plot = lines_svg("alignment", "alignment by block", panels, x="block", y="1: alike", top=1.03)
        plots.append((plot, "Result against original, block by block", "The same pictures and questions through both."))
    mir = {part: rows for part, rows in drawn.items() if _any(rows, "mir")}
    if mir:
        panels = [
            Panel(
                part,
                [_tick(row.get("block"), i) for i, row in enumerate(rows)],
                [
                    Line(word, [row.get(key) for row in rows])
                    for key, word in (("reference_mir", "original"), ("mir", "result"))
                    if _any(rows, key)
                ],
            )
            for part, rows in mir.items()
        ]
        plot = lines_svg("mir", "modality gap by block", panels, x="block", y="distance of modalities")
        plots.append((plot, "Visual against text tokens", "Modality integration by block: lower is better."))
    keys = [key for key in COLUMNS if _any(blocks, key)]
    return {
        "id": "alignment",
        "title": "Alignment by block",
        "sentences": _sentences(found),
        "note": "How alike the inner states of result and original are. It explains a loss; the answers judge it.",
        "plots": plots,
        "titles": ["block", *(COLUMNS[key] for key in keys)],
        "rows": [
            [str(row.get("name") or _part(row)), *(number(row.get(key), ".4f") for key in keys)] for row in blocks
        ],
    }


def _robustness(found: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = [row for row in found.get("rows") or [] if row.get("loss") is not None]
    if not rows:
        return None
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        curves.setdefault(str(row["change"]), []).append(row)
    panels = [
        Panel(
            name.replace("_", " "),
            [_tick(row.get("strength"), i) for i, row in enumerate(points)],
            [
                Line("original", [_times(row.get("reference_loss"), 100) for row in points]),
                Line("result", [_times(row.get("loss"), 100) for row in points]),
            ],
        )
        for name, points in curves.items()
        if len(points) > 1
    ]
    plots = []
    if panels:
        plot = lines_svg("robustness", "loss under corruptions", panels, x="strength", y="points lost")
        plots.append(
            (plot, "Points lost as pictures get worse", "Of each model against its own answers to clean pictures.")
        )
    every = found.get("by_change") or {name: points[-1] for name, points in curves.items()}
    forest = [
        Found(
            name.replace("_", " "), 100 * row["difference"], *_ends(row, 100),
            signed(100 * row["difference"], "+.1f"), bool(row.get("clear", _clear(row) > 0)),
        )
        for name, row in every.items()
        if row.get("difference") is not None
    ]  # fmt: skip
    if forest:
        plot = forest_svg("robust-difference", "difference in loss", forest, unit="points")
        where = "Over all strengths" if found.get("by_change") else "At the greatest strength"
        note = f"{where}, with 95 % intervals. ■, right of the line: the result loses more."
        plots.append((plot, "What the result loses more than the original", note))
    return {
        "id": "robustness",
        "title": "Robustness",
        "sentences": _sentences(found) + [f"Left out: {k} ({v})." for k, v in (found.get("left_out") or {}).items()],
        "note": "What each model loses when pictures or prompts change, on the same questions"
        + (f", by {found['score']}." if found.get("score") else "."),
        "plots": plots,
        "titles": ["change", "strength", "original loses", "result loses", "difference, points [95 %]"],
        "rows": [
            [
                str(row["change"]).replace("_", " "), str(_tick(row.get("strength"), 0)),
                percent(row.get("reference_loss")), percent(row.get("loss")), _between(row, "difference", 100, "+.1f"),
            ]
            for row in rows
        ],
    }  # fmt: skip


def _attribution(found: Mapping[str, Any]) -> dict[str, Any] | None:
    inner = found.get("blocks") or []
    blocks = [row for rows in inner.values() for row in rows] if isinstance(inner, Mapping) else list(inner)
    rows = [{**row, **(row.get("restored") or {})} for row in (*(found.get("parts") or []), *blocks)]
    rows = [row for row in rows if row.get("share") is not None or row.get("kl") is not None]
    if not rows:
        return None
    shares = [row for row in rows if row.get("share") is not None]
    worst = max((row["share"] for row in shares), default=None)
    forest = [
        Found(
            _part(row), 100 * row["share"], *_ends(row, 100), percent(row["share"]), row["share"] == worst and worst > 0
        )
        for row in shares
    ]
    note = "With 95 % intervals. ■: the largest."
    plot = forest_svg("attribution", "share of the loss by part", forest, unit="% of the KL that restoring it undoes")
    return {
        "id": "attribution",
        "title": "Which part lost it",
        "sentences": _sentences(found),
        "note": "One part after another is put back to the original and everything is measured again.",
        "plots": [(plot, "Share of the loss that a part explains", note)] if forest else [],
        "titles": ["restored", "KL left", "share of the loss [95 %]", "exact match"],
        "rows": [
            [_part(row), number(row.get("kl"), ".4f"), _between(row, "share", 100, ".0f", " %"), _match(row)]
            for row in rows
        ],
    }


def bias_svg(report: Mapping[str, Any]) -> str:
    """Every figure of bias, result less original, with its interval; "" where there is none."""
    rows = [
        Found(row["key"], row["value"], row["low"], row["high"], signed(row["value"]), row["shown"])
        for row in bias_rows(report)
    ]
    return forest_svg("bias", "change of bias", rows) if rows else ""


def reliability_svg(report: Mapping[str, Any]) -> str:
    """How often answers are right, by how sure the model was of them; "" where it was not measured."""
    calibration = last_quality(report).get("calibration") or {}
    bins = [row for row in calibration.get("bins") or [] if (row.get("n") or 0) >= BINS_LEAST]
    if not bins:
        return ""
    was = [row for row in calibration.get("reference_bins") or [] if (row.get("n") or 0) >= BINS_LEAST]
    lines = [("result", bins), *([("original", was)] if was else [])]
    xs = sorted({row["confidence"] for _, rows in lines for row in rows})
    drawn = [
        Line(name, [next((row["accuracy"] for row in rows if row["confidence"] == x), None) for x in xs])
        for name, rows in lines
    ]
    return lines_svg(
        "reliability", "accuracy by confidence", [Panel("", xs, drawn)], x="confidence", y="share right", top=1.05,
        diagonal=True,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- private


def _sentences(found: Mapping[str, Any]) -> list[str]:
    said = found.get("sentences") or found.get("says") or found.get("sentence") or []
    return [said] if isinstance(said, str) else [str(sentence) for sentence in said]


def _any(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _tick(value: Any, position: int) -> float | str:
    if value is None:
        return float(position)
    return value if isinstance(value, (int, float)) else str(value)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _ends(row: Mapping[str, Any], factor: float) -> tuple[float | None, float | None]:
    low, high = row.get("ci95") or (None, None)
    return _times(low, factor), _times(high, factor)


def _clear(row: Mapping[str, Any]) -> int:
    """1 or -1 where the whole interval lies above or below zero."""
    low, high = row.get("ci95") or (None, None)
    return 0 if low is None or high is None else int(low > 0) - int(high < 0)


def _between(row: Mapping[str, Any], key: str, factor: float, form: str, unit: str = "") -> str:
    if row.get(key) is None:
        return NOTHING
    low, high = _ends(row, factor)
    text = format(factor * row[key], form) + unit
    return text if low is None or high is None else f"{text} [{low:{form}}, {high:{form}}]"


def _part(row: Mapping[str, Any]) -> str:
    if isinstance(row.get("block"), str):
        return str(row["block"])  # its whole name: ``vision.blocks[2]``
    return " ".join(str(row[key]) for key in ("part", "block") if row.get(key) is not None)


def _match(row: Mapping[str, Any]) -> str:
    match = row.get("exact_match")
    return percent(match.get("value") if isinstance(match, Mapping) else match)
