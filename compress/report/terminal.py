"""What a terminal shows: the stage table, and how far long work is."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, TextIO

from . import rows as r
from . import words as w
from .facts import last_facts

if TYPE_CHECKING:
    from rich.progress import TaskID

# of `rows.COLUMNS`, what a terminal of at least so many columns shows; all of them are in report.html
SHOWN = {
    0: ("stage", "verdict", "exact_match", "change", "bytes"),
    112: ("stage", "verdict", "exact_match", "change", "kl", "flips", "bytes"),
    160: tuple(c.key for c in r.COLUMNS if c.key not in ("settings", "agreement", "flops", "measuring")),
}


def print_stages(report: Mapping[str, Any], file: TextIO | None = None) -> None:
    """The stage table and the verdict in sentences, on `file` (stdout)."""
    width = _width(file or sys.stdout) or 200
    shown = next(keys for least, keys in reversed(SHOWN.items()) if width >= least)
    columns = [c for c in r.COLUMNS if c.key in shown]
    cells = [[c.text(row) for c in columns] for row in r.stage_rows(report)]
    print_table([c.title for c in columns], cells, right=[c.numeric for c in columns], file=file)
    print(file=file)
    for sentence in [*r.headline(report), *last_facts(report)]:
        print(sentence, file=file)


def stage_line(stage: Mapping[str, Any]) -> str:
    """One finished stage in one line, said while the run goes on."""
    (row,) = r.stage_rows({"stages": [stage]})
    words = [f"stage {row['index']} {row['pass']}: {row['verdict']}", f"exact match {w.percent(row['exact_match'])}"]
    if row["index"]:
        words.append(f"change {r.change(row)}")
    split = r.time_split(stage)
    words += [w.size(row["bytes"]), f"{w.number(row['seconds'], '.0f')} s" + (f" ({split})" if split else "")]
    if row["measuring"] is not None:
        words.append(f"validation {row['measuring']:.0f} s")
    return "; ".join(words) + (f" ({row['says']})" if row["verdict"] not in ("baseline", "passed") else "")


def print_table(
    titles: list[str], cells: list[list[str]], *, right: list[bool] | None = None, file: TextIO | None = None
) -> None:
    """A table by rich: the terminal's width, or as wide as it needs where there is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    stream = file or sys.stdout
    console = Console(file=stream, width=_width(stream) or 200, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(titles):
        numeric = bool(right and right[i])
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(_plain(cell) for cell in row))
    console.print(table)


def _width(stream: TextIO) -> int | None:
    """The terminal's width; None where there is no terminal."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def _plain(cell: str) -> str:
    """`cell` with rich's markup switched off (``[-1.2, 0.3]`` is an interval, not a colour)."""
    from rich.markup import escape

    return escape(cell)


class Bars:
    """Progress for a terminal: what, unit, rate, time left; nested work gets a line of its own below."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("[dim]{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._open: list[TaskID] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bars away, whatever was still open."""
        self._open.clear()
        self._progress.stop()

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

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)


class Lines:
    """Progress where there is no terminal: a line at the start, one now and then, one at the end; nested work speaks
    only if it takes long."""

    def __init__(self, every: float = 10.0, file: TextIO | None = None) -> None:
        self._every, self._file = every, file or sys.stderr
        self._open: list[_Work] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def start(self, what: str, total: int) -> None:
        now = time.monotonic()
        self._open.append(_Work("  " * len(self._open) + what, total, now))
        if len(self._open) == 1:
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
        if not self._open or work.said > work.began:
            self._say(work, f"done in {time.monotonic() - work.began:.1f} s")

    def say(self, text: str) -> None:
        print(text, file=self._file, flush=True)

    def _say(self, work: _Work, text: str) -> None:
        print(f"{work.what}: {text}", file=self._file, flush=True)


class _Work:
    def __init__(self, what: str, total: int, began: float) -> None:
        self.what, self.total, self.began, self.said, self.count = what, total, began, began, 0


def progress() -> Bars | Lines:
    """Bars on a terminal, lines elsewhere."""
    return Bars() if sys.stderr.isatty() else Lines()
