"""What every plot stands on: an empty figure, the palette, labels that keep apart, SVG for pages and files.

Colours are the page's CSS variables, so that plots follow light and dark; what a colour says is also said by a shape, a
hatch or a word. The hues are those of Okabe and Ito's palette, darker on white and lighter on black, told apart by
colour-blind readers.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# drawn in these, replaced by the page's variables afterwards
INK, MUTED, GOOD, BAD, LINE = "#010101", "#020202", "#030303", "#040404", "#050505"
GREEN, OCHRE, PURPLE, CARD = "#060606", "#070707", "#080808", "#090909"
VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", GOOD: "var(--blue)", BAD: "var(--orange)", LINE: "var(--line)",
    GREEN: "var(--green)", OCHRE: "var(--ochre)", PURPLE: "var(--purple)", CARD: "var(--card)",
}  # fmt: skip
# of several series, each: colour, marker, dashes
SERIES = (
    (GOOD, "o", "-"), (BAD, "s", (0, (5, 2))), (GREEN, "D", (0, (2, 1.4))), (PURPLE, "^", (0, (7, 2, 2, 2))),
    (OCHRE, "v", (0, (1, 1))), (INK, "P", (0, (9, 3))),
)  # fmt: skip
WIDTH = 3.4  # inches: narrow enough for a phone at its own size
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
# where a label may stand beside its mark, in points: the first that is free and nearest to its own mark is taken
PLACES = [(r * x, r * y) for r in (8, 13, 20, 30) for x, y in SIDES]
CHARACTER = 5.2  # points: the width of a letter, about
NEAR = 2 * len(SIDES)  # places beyond these get a line to their mark


def empty(height: float, *, columns: int = 1, rows: int = 1, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` axes without frame, in the page's colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    every = [axes for line in grid for axes in line]
    for axes in every:
        axes.tick_params(axis="both", color=LINE, labelcolor=MUTED, labelsize=8, length=3)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure, every


def by_line(names: Sequence[str], *, pitch: float = 0.34, room: float = 0.5) -> tuple[Figure, Axes]:
    """A figure with a line of its own for each name, from top to bottom, and the scale below."""
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = empty(room + pitch * max(1, len(names)))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.75)
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def label(axes: Axes, text: str, x: float, y: float, *, ha: str, xytext: tuple[float, float], color: str = INK) -> None:
    axes.annotate(text, (x, y), xytext, textcoords="offset points", ha=ha, color=color, fontsize=8)


def legend(figure: Figure, handles: Sequence[Artist], *, columns: int) -> None:
    """What the marks of a figure mean, above it."""
    figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=8,
        handlelength=2.6,
    )  # fmt: skip


def apart(figure: Figure, axes: Axes, marks: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Write `texts` beside `marks` (data coordinates), none over another or over a mark; far ones get a thin line.

    An empty text leaves its mark without one. Call it when limits and scales are final.
    """
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    centres = [tuple(scale * float(v) for v in axes.transData.transform(mark)) for mark in marks]
    left, bottom, right, top = (scale * v for v in axes.bbox.extents)
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in centres]
    for mark, text, (x, y) in zip(marks, texts, centres):
        if not text:
            continue
        width = CHARACTER * len(text)
        boxes = []
        for dx, dy in PLACES:
            start = x + dx - (0 if dx > 0 else width if dx < 0 else width / 2)
            boxes.append((start, y + dy - 4.5, start + width, y + dy + 4.5))
        inside = [
            i for i, box in enumerate(boxes)
            if box[0] >= left and box[2] <= right and box[1] >= bottom and box[3] <= top + 8
            and not any(_overlap(box, other) for other in taken)
        ]  # fmt: skip
        own = [i for i in inside if all(_gap(boxes[i], (x, y)) <= _gap(boxes[i], c) for c in centres)]
        place = (own or inside or [0])[0]
        taken.append(boxes[place])
        dx, dy = PLACES[place]
        axes.annotate(
            text, mark, (dx, dy), textcoords="offset points", color=INK, fontsize=8, va="center",
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6} if place >= NEAR else None,
        )  # fmt: skip


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _gap(box: tuple[float, ...], point: tuple[float, ...]) -> float:
    """How far a point is from a box."""
    aside = max(box[0] - point[0], 0, point[0] - box[2])
    above = max(box[1] - point[1], 0, point[1] - box[3])
    return float((aside**2 + above**2) ** 0.5)


def svg(figure: Figure, name: str, says: str) -> str:
    """The figure as an `<svg>` element that scales with the page and takes its colours and font.

    Args:
        name: tells its inner ids apart from those of other figures on the page.
        says: what a screen reader reads.
    """
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", _drawn(figure, name), count=2)
    return text.replace("<svg", f'<svg role="img" class="plot" aria-label="{html.escape(says)}"', 1)


def svg_file(figure: Figure, name: str) -> str:
    """The figure as a file of its own, with the page's palette in it: light or dark by the reader's choice."""
    blocks = re.findall(r":root \{([^}]*)\}", files(__package__).joinpath("style.css").read_text("utf-8"))
    light, dark = (" ".join(block.split()) for block in blocks[:2])
    style = (
        f"<style>svg{{{light} font-family:system-ui,sans-serif}}"
        f"@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    )
    return re.sub(r"(<svg[^>]*>)", lambda found: found[1] + style, _drawn(figure, name, facecolor=CARD), count=1)


def _drawn(figure: Figure, name: str, **options: Any) -> str:
    """The figure's `<svg>` with variables for colours, without matplotlib's fonts and most of its ids."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"svlm-{name}", "hatch.linewidth": 0.8}):
        figure.savefig(buffer, format="svg", metadata=nothing, **options)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for sentinel, variable in VARIABLES.items():
        text = text.replace(sentinel, variable)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r' id="[A-Za-z0-9]+_[0-9]+"', "", text)
    return re.sub(r"\n\s*", "\n", text)
