"""The commands of `svlm experiment`: parse, call, print."""

from __future__ import annotations

from typing import Any

import click

from ...compress.options import (
    Assignments,
    Commands,
    data_option,
    debug,
    distil_option,
    loading,
    plots_option,
    printing,
    recipe_option,
    set_option,
    speed,
    threads_option,
)
from ..given import data_of, print_json, recipe_of, rows_of


@click.group(cls=Commands)
@debug
def experiment() -> None:
    """One question about one model, answered with a table, a plot and its figures as JSON.

    \b
    Examples:
      svlm experiment attention demo -o plots
      svlm experiment distillation demo -o plots --steps 100
      svlm experiment alignment demo -r default -p distill.logits:steps=25 -o plots
    """


@experiment.command()
@click.argument("model")
@plots_option
@click.option("--longest", type=click.IntRange(128), default=2048, show_default=True, help="Tokens, at the most.")
@loading
@threads_option
@printing
def attention(model: str, **options: Any) -> None:
    """Time and memory of MODEL's attention variants on this device over sequence length, with random weights."""
    _experiment("attention", options, model)


@experiment.command()
@click.argument("model")
@distil_option
@data_option
@plots_option
@click.option("--steps", type=click.IntRange(1), help="Of the distilling pass, instead of the recipe's.")
@loading
@speed
@printing
def distillation(model: str, recipe: str, data: str | None, **options: Any) -> None:
    """Teacher, student before and student after distillation: accuracy by tag, KL, bias, alignment."""
    _experiment("distillation", options, model, recipe_of(recipe, [], None), data_of(data, model))


@experiment.command()
@click.argument("model")
@recipe_option
@set_option
@data_option
@plots_option
@loading
@speed
@printing
def alignment(model: str, recipe: str, assignments: Assignments, data: str | None, **options: Any) -> None:
    """Visual and language embeddings before and after each pass of RECIPE; gates are not asked, nothing is saved."""
    _experiment("alignment", options, model, recipe_of(recipe, assignments, None), data_of(data, model))


def _experiment(name: str, options: dict[str, Any], *arguments: Any) -> None:
    from ...compress.report.terminal import progress
    from . import run, show

    as_json, rows = options.pop("as_json"), rows_of(options.pop("anatomy"))
    with progress() as told:
        made = run(name, *arguments, **options, rows=rows, progress=told)
    print_json(made) if as_json else show(made)
