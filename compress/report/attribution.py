"""The tables of `svlm verify --attribute`: what each part brings back, what it costs alone, and single blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import words as w
from .terminal import print_table

Facts = Mapping[str, Any]
UNCHANGED = "as in the original"


def share(fact: Facts) -> str:
    """``87 % [80, 92]``: of the KL, with its 95 % interval."""
    low, high = (100 * bound for bound in fact["ci95"])
    return f"{100 * fact['share']:.0f} % [{low:.0f}, {high:.0f}]"


def _match(fact: Facts) -> str:
    """``90.2 % (+3.1 [+1.2, +5.0])``: exact match, and its change in points."""
    match = fact["exact_match"]
    low, high = map(w.points, match["ci95"])
    return f"{w.percent(match['value'])} ({w.points(match['delta'])} [{low}, {high}])"


def part_cells(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table of parts."""
    titles = ["part", "KL with it restored", "comes back [95\u00a0%]", "exact match (points)"]
    titles += ["KL of it alone", "it costs [95\u00a0%]", "exact match (points)"]
    cells = []
    for row in facts["parts"]:
        if "restored" in row:
            sides = [[f"{row[k]['kl']:.4f}", share(row[k]), _match(row[k])] for k in ("restored", "alone")]
            cells.append([row["part"], *sides[0], *sides[1]])
        else:
            cells.append([row["part"], UNCHANGED if row["unchanged"] else "cannot be put back", *[w.NOTHING] * 5])
    return titles, cells


def block_cells(found: list[Facts]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table of one part's blocks."""
    cells = []
    for row in found:
        name = row["block"] + (f" (was {row['was']})" if "was" in row else "")
        if "share" in row:
            cells.append([name, f"{row['kl']:.4f}", share(row)])
        else:
            cells.append([name, w.NOTHING, UNCHANGED if row.get("unchanged") else row["why"]])
    return ["block", "KL with it restored", "comes back [95\u00a0%]"], cells


def print_attribution(facts: Facts) -> None:
    """What `calib.attribution.attribute` found."""
    loss = facts["loss"]
    match = loss["exact_match"]
    print(
        f"attribution over {facts['questions']} questions about {facts['images']} pictures: "
        f"KL {loss['kl']:.4f}, exact match {w.percent(match['reference'])} to {w.percent(match['value'])}"
    )
    titles, cells = part_cells(facts)
    print_table(titles, cells, right=[False, *[True] * (len(titles) - 1)])
    for found in facts["blocks"].values():
        print_table(*block_cells(found), right=[False, True, True])
    for sentence in facts["says"]:
        print(sentence)
