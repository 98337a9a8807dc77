"""`svlm report A B C`: several runs beside each other, and question by question where their answers are there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ..calib.metrics.paired import compared
from ..compress.base import Json
from ..compress.errors import DataError, UsageError
from ..compress.report.compare import run_facts
from ..compress.report.files import read, read_answers


def compare_runs(folders: Sequence[str | Path], *, other_data: bool = False) -> dict[str, Json]:
    """What `svlm report A B C` shows.

    Args:
        folders: OUT of at least two runs.
        other_data: compare runs that were judged on different questions all the same; the result says so.

    Returns:
        `compress.report.compare.run_facts` of the runs, and `pairs`: for each two whose answers to the same questions
        are there, a and b (names), delta (exact match of b less that of a), ci95 (paired, over pictures), mcnemar_p,
        and n.

    Raises:
        UsageError: fewer than two runs, or the same one twice. OutputError: no run lies there.
        DataError: the runs were judged on different questions, and `other_data` does not say that this is known.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths) or len(paths) < 2:
        raise UsageError("a comparison is of two different runs or more", found=", ".join(map(str, folders)))
    reports, answers = [read(path) for path in paths], [read_answers(path) for path in paths]
    prints = [(found or {}).get("questions") for found in answers]
    if not all(prints):  # a run of an earlier svlm: both splits together have to be the same
        prints = [(report.get("data") or {}).get("fingerprint") for report in reports]
    same = len(set(prints)) == 1 and prints[0] is not None
    if not same and not other_data:
        raise DataError(
            "the runs were judged on different questions",
            where=", ".join(map(str, paths)),
            found="; ".join(f"{path.name}: {_data(report)}" for path, report in zip(paths, reports)),
            change="run them on the same data, check count and seed, or say --other-data: the page will warn",
        )
    facts = run_facts(paths, reports, same)
    found = [(name, kept["items"]) for name, kept in zip(facts["names"], answers) if kept is not None]
    facts["pairs"] = [
        {"a": a, "b": b, "n": len(before), **compared(before, after)}
        for (a, before), (b, after) in combinations(found, 2)
        if same and [item["id"] for item in before] == [item["id"] for item in after]
    ]
    return facts


def _data(report: dict[str, Any]) -> str:
    data = report.get("data") or {}
    return f"{data.get('check', '?')} of {data.get('source') or data.get('name')}, {str(data.get('fingerprint'))[:12]}"


__all__ = ["compare_runs"]
