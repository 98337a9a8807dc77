"""What the plots of experiments share: an empty figure, the palette, and the file that is readable in light and dark.

Hues are those of Okabe and Ito, darker on white and lighter on black; every series has a marker and dashes of its own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compress.disk import write_json, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# drawn in these, replaced by variables afterwards: (light, dark)
PALETTE = {
    "#010101": ("ink", "#1b1b1b", "#ececec"),
    "#020202": ("muted", "#5c5c5c", "#a8a8a8"),
    "#030303": ("line", "#dddddd", "#3a3a3a"),
    "#040404": ("paper", "#ffffff", "#14161a"),
    "#050505": ("blue", "#0072b2", "#56b4e9"),
    "#060606": ("vermillion", "#d55e00", "#ff8a3d"),
    "#070707": ("green", "#00805d", "#2fcf9f"),
    "#080808": ("purple", "#a8558a", "#e7a3cb"),
    "#090909": ("yellow", "#8a6d00", "#f0c94a"),
}
INK, MUTED, LINE, PAPER, *HUES = PALETTE
DASHES = ("-", (0, (5, 2)), (0, (2, 1.4)), (0, (7, 2, 2, 2)), (0, (1, 1)), (0, (9, 3)))
SERIES = tuple(zip((*HUES, INK), ("o", "s", "D", "^", "v", "P"), DASHES))  # colour, marker, dashes


def empty(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` axes, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every:
        axes.set_facecolor(PAPER)
        axes.tick_params(axis="both", which="both", color=LINE, labelcolor=MUTED, labelsize=8)
        axes.grid(color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(LINE)
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
        write_whole(folder / f"{name}.svg", svg(figure, name))
    write_json(folder / f"{made['experiment']}.json", made)


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG file whose colours follow the reader's choice of light or dark."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"svlm-{name}"}):
        figure.savefig(buffer, format="svg", metadata=nothing, facecolor=PAPER)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for drawn, (variable, _, _) in PALETTE.items():
        text = text.replace(drawn, f"var(--{variable})")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    light, dark = ("".join(f"--{row[0]}:{row[i]};" for row in PALETTE.values()) for i in (1, 2))
    style = (
        f"<style>svg{{{light}font-family:system-ui,sans-serif}}"
        f"@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    )
    return re.sub(r"(<svg[^>]*>)", lambda found: found[1] + style, text, count=1)
