"""What the plots of experiments share: titles, curves, scales, and where figures and plots go.

Palette, empty figures and the SVG itself are those of the report (compress/report/svg.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compress.disk import write_json, write_whole
from ...compress.report import svg as plots
from ...compress.report.svg import CARD, INK, LINE, MUTED, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CARD", "INK", "LINE", "SERIES", "by_ratio", "curve", "doubling", "empty", "leave", "legend", "titled"]


def empty(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` axes, in inches, with both scales."""
    figure, every = plots.empty(height, columns=columns, rows=rows, width=width)
    for axes in every:
        axes.grid(color=LINE, linewidth=0.7)
        axes.spines["left"].set_visible(True)
        axes.spines["left"].set_color(LINE)
    return figure, every


def titled(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, color=INK, fontsize=9, loc="left")
    axes.set_xlabel(x, color=MUTED, fontsize=8)
    axes.set_ylabel(y, color=MUTED, fontsize=8)


def curve(axes: Axes, number: int, xs: Sequence[float], ys: Sequence[float | None], name: str) -> None:
    """Series `number` of a plot; points without a value are left out."""
    colour, marker, dashes = SERIES[number % len(SERIES)]
    there = [(x, y) for x, y in zip(xs, ys) if y is not None]
    if there:
        axes.plot(
            *zip(*there), color=colour, marker=marker, linestyle=dashes, markersize=4.5, linewidth=1.5, label=name
        )


def legend(axes: Axes, below: bool = False) -> None:
    """The names of the series, where they cover the least; or in a line below the axes."""
    if below:
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.09), "ncols": 3}
        axes.legend(frameon=False, labelcolor=INK, fontsize=7.5, **place)
    elif axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, labelcolor=INK, fontsize=7.5, handlelength=3)


def doubling(axes: Axes, ticks: Sequence[int]) -> None:
    """An x axis on which each doubling takes the same room."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(n) for n in ticks])


def by_ratio(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers: 1, 2, 5, 10, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def leave(made: dict[str, Any], folder: Path, **figures: Figure) -> None:
    """Write the figures as SVG and `made` as JSON; its `files` become what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    made["files"] = [str(folder / f"{name}.svg") for name in figures]
    for name, figure in figures.items():
        write_whole(folder / f"{name}.svg", plots.svg_file(figure, name))
    write_json(folder / f"{made['experiment']}.json", made)
