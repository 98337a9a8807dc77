"""The two plots of the report as inline SVG: accuracy with its interval, and size, stage by stage.

Colours are the page's CSS variables, so that the plots follow light and dark; what a colour says is also said by the
mark's shape or by a word. Blue and orange are of the palette of Okabe and Ito, told apart by colour-blind readers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .rows import Row, percent, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# drawn in these, replaced by the page's variables afterwards
INK, MUTED, GOOD, BAD, LINE = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GOOD: "var(--blue)", BAD: "var(--orange)", LINE: "var(--line)"}
WIDTH, TOP, ROW = 4.2, 0.5, 0.34  # inches: narrow enough for a phone at its own size


def accuracy_svg(rows: Sequence[Row]) -> str:
    """Exact match of each stage with the paired 95 % interval around it; a dashed line marks the original."""
    measured = [row for row in rows if row["exact_match"] is not None]
    figure, axes = _figure(measured)
    least = min((_lowest(row) for row in measured if row["in_effect"]), default=0.0)
    most = max((_highest(row) for row in measured), default=100.0)
    room = max(most - least, 1.0)
    left = least - 0.3 * room  # what lies further down was rolled back: an arrow says so, the rest keeps its scale
    axes.set_xlim(left, most + 0.15 * room)
    for y, row in enumerate(measured):
        colour, value = (GOOD if row["in_effect"] else BAD), 100 * row["exact_match"]
        marker = "o" if row["in_effect"] else "X"
        if value < left:
            value, marker = left + 0.02 * room, "<"
        elif row["index"] and row["low"] is not None:
            axes.plot([_lowest(row), _highest(row)], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot([value], [y], marker=marker, color=colour, markersize=6.5)
        ha, xytext = ("left", (6, -3)) if marker == "<" else ("center", (0, 6))
        _label(axes, percent(row["exact_match"]), value, y, ha=ha, xytext=xytext)
        if row["max_drop"] is not None:
            axes.plot([100 * (row["reference"] - row["max_drop"])], [y], marker="|", color=MUTED, markersize=11)
    if measured:
        axes.axvline(100 * measured[0]["exact_match"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    return _svg(figure, "accuracy")


def size_svg(rows: Sequence[Row]) -> str:
    """Bytes on disk of each stage."""
    measured = [row for row in rows if row["bytes"] is not None]
    figure, axes = _figure(measured)
    for y, row in enumerate(measured):
        megabytes = row["bytes"] / 1e6
        colour, hatch = (GOOD, "") if row["in_effect"] else (BAD, "////")
        axes.barh(y, megabytes, height=0.55, color=colour, hatch=hatch, edgecolor=LINE)
        _label(axes, size(row["bytes"]), megabytes, y, ha="left", xytext=(4, -3))
    axes.set_xlim(left=0)
    axes.margins(x=0.22)
    return _svg(figure, "size")


def _label(axes: Axes, text: str, x: float, y: float, *, ha: str, xytext: tuple[float, float]) -> None:
    axes.annotate(text, (x, y), xytext, textcoords="offset points", ha=ha, color=INK, fontsize=8)


def _lowest(row: Row) -> float:
    """The lower end of the interval, percent; the value itself for the original."""
    return 100 * (row["reference"] + row["low"]) if row["low"] is not None else 100 * row["exact_match"]


def _highest(row: Row) -> float:
    return 100 * (row["reference"] + row["high"]) if row["high"] is not None else 100 * row["exact_match"]


def _figure(rows: Sequence[Row]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, TOP + ROW * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['index']} {row['pass']}" + ("" if row["in_effect"] else " ✕") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.75)
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
    axes.tick_params(axis="x", color=LINE, labelcolor=MUTED, labelsize=8)
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element that scales with the page and takes its colours and font."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"svlm-{name}"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for sentinel, variable in VARIABLES.items():
        text = text.replace(sentinel, variable)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r' id="[A-Za-z0-9]+_[0-9]+"', "", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" class="plot" aria-label="{name} by stage"', 1)
