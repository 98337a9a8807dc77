"""Several runs beside each other: figures, the settings in which they differ, table, page and Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..disk import make_folder
from . import rows as r
from .files import write_texts
from .page import markup, render
from .plots import paths_svg
from .terminal import print_table
from .words import NOTHING, amount, number, percent, points, settings_text

COLUMNS: tuple[r.Column, ...] = (
    r.Column("run", "run", lambda row: row["run"], numeric=False),
    r.Column("passes", "passes", lambda row: " → ".join(row["passes"]) or "none", numeric=False),
    r.Column("main", "accuracy", lambda row: percent(row["main"]["value"])),
    r.Column("change", "change, points [95\u00a0%]", lambda row: r.change(row)),
    *(column for column in r.COLUMNS if column.key in ("kl", "flips", "bytes", "visual_tokens", "latency")),
)


def run_facts(folders: Sequence[Path], reports: Sequence[Mapping[str, Any]], same: bool) -> dict[str, Any]:
    """Runs as plain values.

    Args:
        same: whether all were judged on the same questions.

    Returns:
        names; rows: of each run the figures of the stage that OUT holds, with run, passes, front (no other run is both
        smaller and better); stages: all rows by run; settings: in which they differ, a value for each run; says:
        sentences, the first of them the verdict; warnings.
    """
    names = _names(folders)
    rows = []
    for name, report in zip(names, reports):
        stages = [row for row in r.stage_rows(report) if row["in_effect"] and row["index"]]
        rows.append(r.last_good(report) | {"run": name, "passes": [row["pass"] for row in stages]})
    for row in rows:
        row["front"] = not any(_beats(other, row) for other in rows)
    warnings = [] if same else ["The runs were judged on different questions: their accuracies do not compare."]
    originals = {str((report.get("model") or {}).get("fingerprint")) for report in reports}
    if len(originals) > 1:
        warnings.append("The runs started from different originals: changes are each against its own.")
    machines = {str((report.get("environment") or {}).get("cpu")) for report in reports}
    if len(machines) > 1:
        warnings.append("The runs were made on different machines: their milliseconds do not compare.")
    return {
        "names": names,
        "rows": rows,
        "stages": {name: r.stage_rows(report) for name, report in zip(names, reports)},
        "settings": _differences([_settings(report) for report in reports]),
        "says": _says(rows, same),
        "warnings": warnings,
        "pairs": [],
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last names, or whole paths where these are not unique."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _beats(a: r.Row, b: r.Row) -> bool:
    """Whether `a` is at least as small and as accurate as `b`, and better in one."""
    mine, yours = ((row["bytes"], row["main"]["value"]) for row in (a, b))
    if None in (*mine, *yours):
        return False
    return mine[0] <= yours[0] and mine[1] >= yours[1] and mine != yours


def _says(rows: Sequence[r.Row], same: bool) -> list[str]:
    sized = [row for row in rows if row["bytes"] is not None]
    said = []
    if sized:
        small = min(sized, key=lambda row: row["bytes"])
        said.append(f"{small['run']} is the smallest, {_short(small)}.")
    judged = [row for row in sized if row["main"]["value"] is not None]
    if judged and same:
        best = max(judged, key=lambda row: (row["main"]["value"], -row["bytes"]))
        both = " as well" if best is small else ""
        said.append(
            f"{best['run']} has the highest {best['main']['name']}{both}" + (f", {_short(best)}." if not both else ".")
        )
        beaten = [row["run"] for row in rows if not row["front"]]
        if beaten:
            said.append(f"Another run is both smaller and no worse than {', '.join(beaten)}.")
    return said


def _short(row: r.Row) -> str:
    main = row["main"]
    return f"{r.size_and_ratio(row)} at {percent(main['value'])} ({points(main['delta'])} points)"


def _settings(report: Mapping[str, Any]) -> dict[str, str]:
    """All that was chosen for a run, as texts by name; of a pass that occurs twice, the second has a number."""
    found: dict[str, str] = {"passes": " → ".join(_passes(report)) or "none"}
    calibration = (report.get("recipe") or {}).get("calibration") or {}
    found |= {f"questions: {key}": str(value) for key, value in calibration.items()}
    count: Counter[str] = Counter()
    for row in r.stage_rows(report):
        if not row["index"]:
            continue
        count[row["pass"]] += 1
        name = row["pass"] + (f" {count[row['pass']]}" if count[row["pass"]] > 1 else "")
        found |= {f"{name}: {key}": settings_text({key: v})[len(key) + 1 :] for key, v in row["settings"].items()}
    for section, keys in (("model", ("source",)), ("environment", ("svlm", "torch", "transformers", "cpu", "threads"))):
        values = report.get(section) or {}
        found |= {f"{section}: {key}": str(values[key]) for key in keys if values.get(key) is not None}
    return found


def _passes(report: Mapping[str, Any]) -> list[str]:
    rows = [row for row in r.stage_rows(report) if row["index"]]
    return [row["pass"] + ("" if row["in_effect"] else " ✕") for row in rows]


def _differences(runs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Name -> a value for each run, of the settings that are not the same in all."""
    names = dict.fromkeys(name for run in runs for name in run)
    table = {name: [run.get(name, NOTHING) or NOTHING for run in runs] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


# ------------------------------------------------------------------------------------------------------------ how shown


def pair_texts(pair: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """One paired comparison in words: who, change in points with its interval, McNemar's p, what that says."""
    low, high = pair["ci95"]
    clear = low > 0 or high < 0
    verdict = ("better" if low > 0 else "worse") if clear else "cannot tell"
    change = f"{points(pair['delta'])} [{points(low)}, {points(high)}]"
    return f"{pair['b']} less {pair['a']}", change, number(pair["mcnemar_p"], ".3g"), verdict


def print_runs(facts: Mapping[str, Any]) -> None:
    """The tables on the terminal."""
    columns = [c for c in COLUMNS if any(c.text(row) not in (NOTHING, "") for row in facts["rows"])]
    for warning in facts["warnings"]:
        print(f"WARNING: {warning}")
    print_table(
        [c.title for c in columns],
        [[c.text(row) for c in columns] for row in facts["rows"]],
        right=[c.numeric for c in columns],
    )
    if facts["pairs"]:
        cells = [list(pair_texts(pair)) for pair in facts["pairs"]]
        print_table(
            ["same questions", "points [95\u00a0%]", "McNemar p", "that is"], cells, right=[False, True, True, False]
        )
    if facts["settings"]:
        print_table(["differs", *facts["names"]], [[name, *values] for name, values in facts["settings"].items()])
    for sentence in facts["says"]:
        print(sentence)


def comparison_html(facts: Mapping[str, Any]) -> str:
    """The same as a page, with accuracy against bytes and milliseconds."""
    columns = [c for c in COLUMNS if any(c.text(row) not in (NOTHING, "") for row in facts["rows"])]
    main = facts["rows"][0]["main"]["name"]
    return render(
        "compare.html",
        f"{len(facts['names'])} runs",
        facts=facts,
        columns=columns,
        main=main,
        by_bytes=markup(paths_svg(facts["stages"], "bytes", "megabytes on disk", 1e-6)),
        by_ms=markup(paths_svg(facts["stages"], "latency_ms", "milliseconds to the first token")),
        pairs=[pair_texts(pair) for pair in facts["pairs"]],
        n=amount(facts["pairs"][0]["n"]) if facts["pairs"] else NOTHING,
    )


def write_comparison(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the page to `path`; its folder is made where it is not there.

    Raises:
        OutputError: it cannot be written.
    """
    make_folder(path.parent)
    write_texts(path.parent, {path.name: comparison_html(facts)})
