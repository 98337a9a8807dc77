"""The plots of the stages: accuracy by stage, accuracy on its way down in bytes and milliseconds, and which part
takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .rows import Row
from .svg import BAD, CARD, GOOD, GREEN, LINE, MUTED, OCHRE, PURPLE, SERIES, apart, by_line, empty, label, legend, svg
from .words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = {  # of a model: how its share is drawn
    "vision": (GOOD, ""), "connector": (OCHRE, "xxxx"), "language": (GREEN, "////"), "prefill": (GREEN, "////"),
    "embeddings": (PURPLE, "...."), "head": (PURPLE, "...."),
}  # fmt: skip
NAMES = {"prefill": "language"}
LOG = 6  # an axis whose ends are further apart than this many times is logarithmic


def accuracy_svg(rows: Sequence[Row]) -> str:
    """The score of each stage with the paired 95 % interval around it; a dashed line marks the original."""
    measured = [row for row in rows if row["main"]["value"] is not None]
    figure, axes = by_line([_name(row) for row in measured])
    left, right = _limits(measured)
    axes.set_xlim(left, right)
    for y, row in enumerate(measured):
        colour, value = (GOOD if row["in_effect"] else BAD), 100 * row["main"]["value"]
        marker = "o" if row["in_effect"] else "X"
        if value < left:
            value, marker = left + 0.015 * (right - left), "<"
        elif row["index"] and row["main"]["low"] is not None:
            axes.plot(_interval(row), [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot([value], [y], marker=marker, color=colour, markersize=6.5)
        ha, xytext = ("left", (6, -3)) if marker == "<" else ("center", (0, 6))
        label(axes, percent(row["main"]["value"]), value, y, ha=ha, xytext=xytext)
        if row["max_drop"] is not None:
            axes.plot([100 * (row["main"]["reference"] - row["max_drop"])], [y], marker="|", color=MUTED, markersize=11)
    if measured:
        axes.axvline(100 * measured[0]["main"]["value"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    return svg(figure, "accuracy", "accuracy by stage")


def path_svg(rows: Sequence[Row], key: str, unit: str, scale: float = 1.0) -> str:
    """Accuracy against what a stage costs (`key` of a row times `scale`), from the original to the result.

    Dots are the stages in effect, joined in their order; crosses were rolled back. "" where fewer than two stages
    have both figures.
    """
    return paths_svg({"": rows}, key, unit, scale)


def paths_svg(runs: Mapping[str, Sequence[Row]], key: str, unit: str, scale: float = 1.0) -> str:
    """The same of several runs, each with its own mark, line and colour; the last stage of each bears its name."""
    kept = {name: [r for r in rows if r["main"]["value"] is not None and r[key]] for name, rows in runs.items()}
    every = [row for rows in kept.values() for row in rows]
    if len(every) < 2:
        return ""
    figure, (axes,) = empty(2.9 if len(runs) == 1 else 3.3)
    low, high = _limits(every)
    low -= 0.06 * (high - low)
    axes.set_ylim(low, high)
    costs = [scale * row[key] for row in every]
    _cost_axis(axes, min(costs), max(costs), unit)
    axes.set_ylabel(f"{every[0]['main']['name']}, %", color=MUTED, fontsize=8)
    axes.grid(color=LINE, linewidth=0.7)
    marks: list[tuple[float, float]] = []
    texts: list[str] = []
    for (name, rows), (colour, marker, dashes) in zip(kept.items(), (*SERIES, *SERIES)):
        line = [(scale * r[key], 100 * r["main"]["value"]) for r in rows if r["in_effect"]]
        axes.plot(*zip(*line), color=colour, linewidth=1.1, linestyle=dashes, alpha=0.75)
        for row in rows:
            x, y = scale * row[key], 100 * row["main"]["value"]
            own = (colour, marker) if row["in_effect"] else (BAD, "X")
            if y < low:
                y, own = low + 0.02 * (high - low), (BAD, "v")
            elif row["index"] and row["main"]["low"] is not None:
                axes.plot([x, x], _interval(row), color=own[0], linewidth=1.6, alpha=0.55, solid_capstyle="round")
            axes.plot([x], [y], marker=own[1], color=own[0], markersize=6)
            marks.append((x, y))
            texts.append(str(row["index"]) if not name else name if row is rows[-1] else "")
    apart(figure, axes, marks, texts)
    return svg(figure, f"path-{key}", f"accuracy against {unit}")


def _cost_axis(axes: Axes, least: float, most: float, unit: str) -> None:
    """The x axis: logarithmic where it spans much; with room on both sides."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if most > LOG * least:
        axes.set_xscale("log")
        axes.set_xlim(least / 1.35, most * 1.35)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.1 * (most - least) or 0.1 * most
        axes.set_xlim(least - room, most + room)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(unit, color=MUTED, fontsize=8)


def parts_svg(rows: Sequence[Row], key: str, unit: str, scale: float, parts: Sequence[str]) -> str:
    """What each part takes of a stage's bytes or milliseconds (`row[key]`, by part, times `scale`), as stacked bars.

    "" where no stage says it by part.
    """
    measured = [row for row in rows if row["in_effect"] and any((row[key] or {}).get(p) for p in parts)]
    if not measured:
        return ""
    from matplotlib.patches import Patch

    shown = [p for p in parts if any(row[key].get(p) for row in measured)]
    figure, axes = by_line([_name(row) for row in measured], pitch=0.38, room=0.9)
    widest = max(scale * sum(row[key].get(p) or 0 for p in parts) for row in measured)
    for y, row in enumerate(measured):
        start = 0.0
        for part in shown:
            width = scale * (row[key].get(part) or 0)
            colour, hatch = PARTS[part]
            axes.barh(y, width, left=start, height=0.62, color=colour, hatch=hatch, edgecolor=CARD, linewidth=0.8)
            start += width
        label(axes, f"{start:.3g}", start, y, ha="left", xytext=(4, -3))
    handles = [Patch(facecolor=PARTS[p][0], hatch=PARTS[p][1], edgecolor=CARD, label=NAMES.get(p, p)) for p in shown]
    legend(figure, handles, columns=2)
    axes.set_xlim(0, 1.17 * widest)
    axes.set_xlabel(unit, color=MUTED, fontsize=8)
    return svg(figure, f"parts-{key}", f"{unit} by part and stage")


def _name(row: Row) -> str:
    return f"{row['index']} {row['pass']}" + ("" if row["in_effect"] else " ✕")


def _interval(row: Row) -> list[float]:
    """The paired interval around the original's score, percent: what of it a score can be."""
    main = row["main"]
    most = max(1.0, main["reference"], main["value"])
    return [100 * min(max(main["reference"] + main[end], 0.0), most) for end in ("low", "high")]


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Of an axis of accuracy: what lies further down was rolled back; an arrow says so, the rest keeps its scale."""

    def ends(row: Row) -> list[float]:
        return [100 * row["main"]["value"], *(_interval(row) if row["main"]["low"] is not None else [])]

    least = min((min(ends(row)) for row in rows if row["in_effect"]), default=0.0)
    most = max((max(ends(row)) for row in rows), default=100.0)
    room = max(most - least, 1.0)
    return least - 0.3 * room, most + 0.15 * room
