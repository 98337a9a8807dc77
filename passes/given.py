"""What a command was given, as the verbs want it: a recipe, data, rows of families; and JSON as its answer.

torch is imported by nobody here, so that what is wrong with a command line is said at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..compress.errors import DataError
from ..compress.options import Assignments

if TYPE_CHECKING:
    from ..compress.families import Family
    from ..compress.recipe import Recipe

DEMO = "demo"


def recipe_of(source: str, assignments: Assignments, gate: str | None) -> Recipe:
    """The recipe of that name or file, with settings overridden and one gate for all where it is given."""
    from ..compress.gate import Gate
    from ..compress.recipe import read_recipe
    from ..recipes import SHIPPED
    from . import find

    made = read_recipe(source, find, SHIPPED).override(assignments)
    return made if gate is None else made.with_gate(Gate.parse(gate))


def data_of(data: str | None, model: str) -> str:
    """The data that judge; of the demo model its own where none are named.

    Raises:
        DataError: another model and no data.
    """
    if data is None and model != DEMO:
        raise DataError("say which data shall judge the passes", change="-d questions.jsonl; 'svlm --help' says more")
    return data or DEMO


def rows_of(path: Path | None) -> tuple[Family, ...]:
    """The family that a file describes."""
    if path is None:
        return ()
    from ..compress.families import Family

    return (Family.from_yaml(path),)


def print_json(value: Any) -> None:
    """`value` on the standard output."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))
