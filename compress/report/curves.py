"""Plots of what is found out about the result: curves over blocks or strengths, and figures with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .svg import BAD, GOOD, INK, LINE, MUTED, SERIES, by_line, empty, label, legend, svg


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend, its figures (None: not measured)."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Panel:
    """One small plot: title, ticks of the x axis (numbers, or names that stand in even steps), curves."""

    title: str
    x: Sequence[float | str]
    lines: Sequence[Line] = field(default_factory=tuple)


def lines_svg(
    name: str, says: str, panels: Sequence[Panel], *, x: str = "", y: str = "", top: float | None = None,
    diagonal: bool = False,
) -> str:  # fmt: skip
    """Small plots of the same scale side by side, two in a row where there are several.

    Args:
        x, y: names of the axes. top: upper end of the y axis. diagonal: draw the line on which both axes agree.
    """
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure, every = empty(2.3 if rows == columns == 1 else 0.35 + 1.55 * rows, columns=columns, rows=rows)
    ends = [v for p in panels for line in p.lines for v in line.values if v is not None]
    least, most = min(ends, default=0.0), max(ends, default=1.0)
    room = 0.06 * (most - least) or 0.1 * abs(most) or 0.1
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    for i, (panel, axes) in enumerate(zip(panels, every)):
        named = any(isinstance(tick, str) for tick in panel.x)
        xs = list(range(len(panel.x))) if named else [float(tick) for tick in panel.x]
        if named:
            axes.set_xticks(xs, [str(tick) for tick in panel.x], rotation=30, ha="right")
        elif len(xs) <= 6:
            axes.set_xticks(xs, [f"{tick:g}" for tick in xs])
        if diagonal:
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for line, (colour, marker, dashes) in zip(panel.lines, SERIES):
            dots = [(at, value) for at, value in zip(xs, line.values) if value is not None]
            axes.plot(
                [at for at, _ in dots], [value for _, value in dots], color=colour, marker=marker, linestyle=dashes,
                linewidth=1.4, markersize=3.6, label=line.name,
            )  # fmt: skip
        axes.set_ylim(min(least - room, 0.0) if diagonal else least - room, top if top is not None else most + room)
        axes.set_title(panel.title, color=INK, fontsize=8.5, loc="left")
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        if i % columns == 0 and y:
            axes.set_ylabel(y, color=MUTED, fontsize=8)
        if i >= len(panels) - columns and x:
            axes.set_xlabel(x, color=MUTED, fontsize=8)
    handles = every[0].get_legend_handles_labels()[0]
    if len(handles) > 1:
        legend(figure, handles, columns=3)
    return svg(figure, name, says)


@dataclass(frozen=True)
class Found:
    """A figure with the ends of its 95 % interval, and how it is spelled."""

    name: str
    value: float
    low: float | None
    high: float | None
    text: str
    bad: bool = False


def forest_svg(name: str, says: str, rows: Sequence[Found], *, unit: str = "", zero: bool = True) -> str:
    """Figures below each other with their intervals around a line at zero: a dot, or a square where it is bad."""
    figure, axes = by_line([row.name for row in rows], pitch=0.36)
    if zero:
        axes.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    for y, row in enumerate(rows):
        colour, marker = (BAD, "s") if row.bad else (GOOD, "o")
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot([row.value], [y], marker=marker, color=colour, markersize=6)
        label(axes, row.text, row.value, y, ha="center", xytext=(0, 6))
    axes.margins(x=0.14)
    axes.set_xlabel(unit, color=MUTED, fontsize=8)
    return svg(figure, name, says)
