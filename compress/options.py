"""What the commands share: the click group, what the error handler knows of the command that runs, the common options.

Imports click and nothing else that takes time, so that --help is instant.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .errors import RecipeError

Assignments = list[tuple[str, str, str]]  # pass, key, value


@dataclasses.dataclass
class State:
    """What the error handler has to know of the command that is running."""

    debug: bool = False
    interrupted: str = ""


class PipeClosed(Exception):
    """The reader of our output went away (`svlm passes | head -1`)."""


class Commands(click.Group):
    """Commands in the order in which they are used, and a closed pipe told apart from other I/O errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
            return code
        except BrokenPipeError as error:
            raise PipeClosed from error
        except SystemExit as error:  # rich turns a closed pipe into exit code 1
            if isinstance(error.__context__, BrokenPipeError):
                raise PipeClosed from error
            raise


def _debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_object(State).debug = True  # type: ignore[union-attr]


def _threads(_: click.Context, __: click.Parameter, value: int | None) -> None:
    if value:
        os.environ["OMP_NUM_THREADS"] = str(value)  # before torch is imported


def _assignments(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> Assignments:
    """`PASS:KEY=VALUE` as (pass, key, value)."""
    found = []
    for text in texts:
        name, colon, rest = text.partition(":")
        key, equals, value = rest.partition("=")
        if not (name and colon and key and equals):
            raise RecipeError("-p wants PASS:KEY=VALUE", found=text, change="for example -p quantize.gptq:bits=3")
        found.append((name, key, value))
    return found


def _analysis(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    """Each flag adds its name to the parameter `analyses`."""
    ctx.params["analyses"] = (*ctx.params.get("analyses", ()), *([str(option.name)] if asked else []))


def _names(_: click.Context, __: click.Parameter, text: str | None) -> list[str]:
    if text is not None and not text.strip(" ,"):
        raise click.BadParameter("name at least one, such as pope")
    return [name.strip() for name in (text or "").split(",") if name.strip()]


debug = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_debug, help="Show the traceback of an error."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
recipe_option = click.option(
    "-r", "--recipe", required=True, metavar="RECIPE", help="A YAML file, or: default, small, int4, tokens-half, tiny."
)
set_option = click.option(
    "-p", "--set", "assignments", multiple=True, callback=_assignments, metavar="PASS:KEY=VALUE",
    help="Override a setting; may be repeated.",
)  # fmt: skip
gate_option = click.option("--gate", metavar="TEXT", help='One gate for all: "exact_match max_drop=0.01 on_fail=skip".')
score_option = click.option(
    "--score", metavar="NAME", help="How the data rate answers: exact_match, vqa, anls, relaxed, cider, bleu."
)
anatomy_option = click.option(
    "--anatomy", type=click.Path(path_type=Path), metavar="ROW.YAML", help="Where the parts of an unknown family live."
)
lazy_option = click.option(
    "--lazy/--eager", default=None, help="Weights read from a temporary file piece by piece, or all in memory. "
    "[default: lazy where they would take a quarter of the free memory]",
)  # fmt: skip
lmms_option = click.option(
    "--lmms-eval", "benchmarks", metavar="NAMES", callback=_names,
    help="Benchmarks of lmms-eval by name, or task files: pope,mme,my-task.yaml. Without -d only these.",
)  # fmt: skip
trust_option = click.option("--trust-remote-code", is_flag=True, help="Run the Python code that a checkpoint brings.")
threads_option = click.option(
    "--threads", type=click.IntRange(1), callback=_threads, expose_value=False, help="CPU threads."
)
batch_option = click.option("--batch-size", type=click.IntRange(1), default=32, help="Questions in a batch; 32.")
data_option = click.option(
    "-d", "--data", metavar="DATA", help="JSONL, LLaVA JSON, folder, hub id, or demo (the default where MODEL is demo)."
)


plots_option = click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path), required=True, help="Folder for plots and figures."
)
distil_option = click.option(
    "-r", "--recipe", default="prune-distil-quantize", show_default=True, metavar="RECIPE",
    help="Its passes up to the first distilling one make the student.",
)  # fmt: skip


def together(*options: Any) -> Callable[[Any], Any]:
    """Several options as one decorator, shown in this order."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


work = together(recipe_option, data_option, set_option, gate_option)
comparing = together(data_option, gate_option, score_option, anatomy_option)
analysing = together(
    *(
        click.option(flag, name, is_flag=True, callback=_analysis, expose_value=False, help=says)
        for flag, name, says in (
            ("--attribute", "attribution", "Which part lost it: parts of the original are put back one by one."),
            ("--alignment", "alignment", "Compare hidden states block by block, and visual tokens with text."),
            ("--robustness", "robustness", "Ask 128 questions again with worse pictures, longer prompts, more turns."),
        )
    )
)
printing = together(as_json, debug)
loading = together(anatomy_option, trust_option)
speed = together(batch_option, threads_option)
