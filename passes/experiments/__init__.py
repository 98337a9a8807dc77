"""Experiments on one model, each with a table, a plot and its figures as JSON: attention, distillation, alignment."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def run(name: str, *arguments: Any, **options: Any) -> dict[str, Any]:
    """The experiment of that name; see the function of the same name in its module."""
    return getattr(import_module(f".{name}", __package__), name)(*arguments, **options)


def show(made: Mapping[str, Any]) -> None:
    """Print what an experiment found: table, sentences, where the plots are."""
    from ...compress.report.terminal import print_table

    titles, cells = import_module(f".{made['experiment']}", __package__).table(made)
    print_table(titles, cells, right=[False, *[True] * (len(titles) - 1)])
    for sentence in made["says"]:
        print(sentence)
    for path in made["files"]:
        print(f"plot: {path}")
