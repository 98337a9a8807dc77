"""What a terminal shows: the stage table, and how far long work is."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from . import rows as r

if TYPE_CHECKING:
    from rich.progress import TaskID

# of `rows.COLUMNS`, those that fit a terminal; the rest is in report.html
SHOWN = ("stage", "verdict", "exact_match", "change", "kl", "flips", "bytes", "parameters", "visual_tokens", "latency", "seconds")


def print_stages(report: Mapping[str, Any], file: TextIO | None = None) -> None:
    """The stage table and the verdict in sentences, on `file` (stdout)."""
    columns = [c for c in r.COLUMNS if c.key in SHOWN]
    print_table([c.title for c in columns], [[c.text(row) for c in columns] for row in r.stage_rows(report)],
                right=[c.numeric for c in columns], file=file)  # fmt: skip
    print(file=file)
    for sentence in r.headline(report):
        print(sentence, file=file)


def print_table(titles: list[str], cells: list[list[str]], *, right: list[bool] | None = None, file: TextIO | None = None) -> None:
    """A table by rich: the terminal's width, or as wide as it needs where there is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    stream = file or sys.stdout
    console = Console(file=stream, width=None if stream.isatty() else 200, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(titles):
        numeric = bool(right and right[i])
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(_plain(cell) for cell in row))
    console.print(table)


def _plain(cell: str) -> str:
    """`cell` with rich's markup switched off (``[-1.2, 0.3]`` is an interval, not a colour)."""
    from rich.markup import escape

    return escape(cell)


class Bars:
    """Progress for a terminal: what, unit, rate, time left; nested work gets a line of its own below."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._open: list[TaskID] = []

    def start(self, what: str, total: int) -> None:
        from rich.markup import escape

        if not self._open:
            self._progress.start()
        indent = "  " * len(self._open)
        self._open.append(self._progress.add_task(indent + escape(what), total=total, rate="", note=""))

    def step(self, n: int = 1, note: str = "") -> None:
        from rich.markup import escape

        task = self._open[-1]
        self._progress.advance(task, n)
        speed = self._progress.tasks[self._progress.task_ids.index(task)].speed
        self._progress.update(task, note=escape(note), rate=f"{speed:.1f}/s" if speed else "")

    def done(self) -> None:
        self._progress.remove_task(self._open.pop())
        if not self._open:
            self._progress.stop()


class Lines:
    """Progress where there is no terminal: a line at the start, one now and then, and one at the end."""

    def __init__(self, every: float = 10.0, file: TextIO | None = None) -> None:
        self._every, self._file = every, file or sys.stderr
        self._open: list[_Work] = []

    def start(self, what: str, total: int) -> None:
        now = time.monotonic()
        self._open.append(_Work("  " * len(self._open) + what, total, now))
        self._say(self._open[-1], f"0/{total}")

    def step(self, n: int = 1, note: str = "") -> None:
        work, now = self._open[-1], time.monotonic()
        work.count += n
        if now - work.said < self._every:
            return
        work.said = now
        rate = work.count / max(now - work.began, 1e-9)
        left = (work.total - work.count) / rate if rate else 0.0
        self._say(work, f"{work.count}/{work.total}  {rate:.1f}/s  {left:.0f} s left" + (f"  {note}" if note else ""))

    def done(self) -> None:
        work = self._open.pop()
        self._say(work, f"done in {time.monotonic() - work.began:.1f} s")

    def _say(self, work: _Work, text: str) -> None:
        print(f"{work.what}: {text}", file=self._file, flush=True)


class _Work:
    def __init__(self, what: str, total: int, began: float) -> None:
        self.what, self.total, self.began, self.said, self.count = what, total, began, began, 0


def progress() -> Bars | Lines:
    """Bars on a terminal, lines elsewhere."""
    return Bars() if sys.stderr.isatty() else Lines()
