"""The command line: parses, calls, prints, exits. Commands import what they need, so that --help is instant.

Exit codes: 0 all gates hold; 1 a gate failed or a promise was broken; 2 usage, recipe, model or data error; 3 the work
itself failed; 130 interrupted; 141 the reader of the output went away.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from .compress import __version__
from .compress.errors import GateFailed, PromiseBroken, SvlmError
from .compress.export.table import FORMATS, format_table
from .compress.options import (
    Assignments,
    Commands,
    PipeClosed,
    State,
    analysing,
    comparing,
    debug,
    lazy_option,
    lmms_option,
    loading,
    printing,
    speed,
    threads_option,
    trust_option,
    work,
)
from .passes.experiments.commands import experiment
from .passes.given import DEMO, data_of, print_json, recipe_of, rows_of


def main(arguments: list[str] | None = None) -> int:
    """Run the command line on `arguments` (sys.argv); returns the exit code, raises nothing."""
    state = State()
    try:
        return int(cli.main(arguments, prog_name="svlm", standalone_mode=False, obj=state) or 0)
    except click.Abort:
        _say(f"interrupted{state.interrupted and '; ' + state.interrupted}")
        return 130
    except PipeClosed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except click.ClickException as error:
        error.show()
        return 2
    except Exception as error:
        if state.debug:
            traceback.print_exc()
        if isinstance(error, SvlmError):
            _say(f"{'gate' if error.exit_code == 1 else 'error'}: {error}")
            return error.exit_code
        _say(f"error: {type(error).__name__}: {error}\n  try: run it again with --debug to see where")
        return 3


def _say(text: str) -> None:
    click.echo(f"svlm: {text}", err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="svlm")
def cli() -> None:
    """Turn a full vision-language model into a small one, verified after every pass.

    \b
    Try it on the model that ships, about two minutes on a laptop:
      svlm compress demo -r default -o runs/demo
      svlm report runs/demo

    \b
    Your own model and questions:
      svlm inspect ./my-vlm
      svlm plan ./my-vlm -r int4 -d questions.jsonl
      svlm compress ./my-vlm -r int4 -d questions.jsonl -o runs/int4
      svlm ask runs/int4 photo.jpg "how many dogs are there"

    \b
    MODEL   a Hugging Face model folder, a hub id, or demo
    DATA    a JSONL file, one question a line:
            {"image": "a.png", "question": "how many dogs?", "answer": "2"}
    RECIPE  a YAML file, or default, small, int4, tokens-half, tiny, ...

    Exit codes: 0 all gates hold, 1 a gate failed, 2 usage or data error, 3 the work itself failed.
    """


@cli.command()
@click.argument("name", required=False)
@printing
def passes(name: str | None, as_json: bool) -> None:
    """The menu of passes; with NAME, its settings, defaults and paper.

    \b
    Examples:
      svlm passes
      svlm passes quantize.gptq
    """
    from .compress.report.tables import menu_facts, pass_facts, print_menu, print_pass
    from .passes import find, names

    if name is None:
        facts = menu_facts(find(n) for n in names())
        print_json(facts) if as_json else print_menu(facts)
    else:
        kind = find(name)
        print_json(pass_facts(kind)) if as_json else print_pass(kind)


@cli.command()
@click.argument("model")
@loading
@printing
def inspect(model: str, anatomy: Path | None, trust_remote_code: bool, as_json: bool) -> None:
    """The anatomy of MODEL: parts, blocks, linears, parameters, bytes, visual tokens an image.

    \b
    Examples:
      svlm inspect demo
      svlm inspect ./my-vlm --anatomy row.yaml
    """
    from .compress.inspect import inspect_table
    from .compress.report.tables import print_anatomy
    from .passes.api import load_view

    view = load_view(model, rows=rows_of(anatomy), trust_remote_code=trust_remote_code)
    facts = inspect_table(view) | {"passes": [entry.name for entry in view.ledger]}
    print_json(facts) if as_json else print_anatomy(facts)


@cli.command()
@click.argument("model")
@work
@loading
@speed
@printing
def plan(
    model: str, recipe: str, data: str | None, assignments: Assignments, gate: str | None, anatomy: Path | None,
    trust_remote_code: bool, batch_size: int, as_json: bool,
) -> None:  # fmt: skip
    """What RECIPE would do to MODEL, in order, with the checks. Touches nothing.

    With DATA, every pass is rehearsed on two samples of a shrunken copy, saved and loaded back.

    \b
    Examples:
      svlm plan demo -r default
      svlm plan ./my-vlm -r recipe.yaml -d questions.jsonl
    """
    steps = recipe_of(recipe, assignments, gate)
    source = data or (DEMO if model == DEMO else None)
    from .compress.pipeline import describe_steps
    from .compress.report.tables import print_plan
    from .passes.plan import checks as make_checks

    described = describe_steps(steps)
    checks = make_checks(model, steps, source, batch_size, rows=rows_of(anatomy), trust_remote_code=trust_remote_code)
    if as_json:
        print_json({"recipe": steps.to_json(), "steps": described, "checks": checks})
    else:
        print_plan(steps, described, checks)


@cli.command()
@click.argument("model")
@work
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="Folder for the result.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier svlm run in OUT.")
@lazy_option
@loading
@speed
@printing
@click.pass_obj
def compress(
    state: State, model: str, recipe: str, data: str | None, out: Path, assignments: Assignments, gate: str | None,
    resume: bool, overwrite: bool, lazy: bool | None, anatomy: Path | None, trust_remote_code: bool, batch_size: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Run RECIPE over MODEL, verify every pass on DATA, leave the small model and its report in OUT.

    \b
    Examples:
      svlm compress demo -r default -o runs/demo
      svlm compress ./my-vlm -r int4 -d questions.jsonl -o runs/int4
      svlm compress ./my-vlm -r int4 -d questions.jsonl -o runs/int3 -p quantize.gptq:bits=3 \\
          --gate "exact_match max_drop=0.01 on_fail=retry"

    Killed or interrupted: the same command with --resume goes on at the last finished block.
    """
    steps = recipe_of(recipe, assignments, gate)
    samples = data_of(data, model)
    rows = rows_of(anatomy)
    from .compress.report.terminal import progress, stage_line
    from .passes.api import Options, compress_model

    state.interrupted = f"finished stages are kept in {out}, the same command with --resume goes on from there"
    try:
        with progress() as told:
            options = Options(
                resume=resume, overwrite=overwrite, lazy=lazy, batch_size=batch_size, rows=rows, progress=told,
                trust_remote_code=trust_remote_code, on_stage=lambda stage: told.say(stage_line(stage)),
            )  # fmt: skip
            compress_model(model, steps, samples, out, options)
    except (GateFailed, PromiseBroken):
        _show_run(out, as_json)
        raise
    _show_run(out, as_json)


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--against", required=True, metavar="MODEL", help="The original.")
@click.option("-o", "--output", "folder", type=click.Path(path_type=Path), help="Folder for verify.json, verify.html.")
@comparing
@analysing
@lmms_option
@trust_option
@speed
@printing
def verify(
    out: Path, against: str, data: str | None, gate: str | None, score: str | None, benchmarks: list[str],
    anatomy: Path | None, as_json: bool, **asked: Any,
) -> int:  # fmt: skip
    """Compare OUT with the original from disk: the paired difference on the check split.

    \b
    Examples:
      svlm verify runs/demo --against demo --attribute
      svlm verify runs/int4 --against ./my-vlm -d questions.jsonl --gate "exact_match max_drop=0.02" -o checked
      svlm verify runs/demo --against demo --alignment
      svlm verify runs/demo --against demo --robustness
      svlm verify runs/int4 --against ./my-vlm -d docvqa.jsonl --score anls
      svlm verify runs/int4 --against ./my-vlm --lmms-eval pope,mme
    """
    from .compress.gate import Gate

    limit = None if gate is None else Gate.parse(gate)
    alone = benchmarks and not (data or gate or asked["analyses"] or asked["folder"])
    samples = None if alone else data_of(data, against)
    from .compress.report.tables import print_comparison
    from .compress.report.terminal import progress
    from .passes.lmms import verify as compare

    options: dict[str, Any] = {"score": score, "rows": rows_of(anatomy), **asked}
    with progress() as told:
        result = compare(out, against, samples, benchmarks, gate=limit, progress=told, **options)
    print_json(result) if as_json else print_comparison(result)
    return 0 if result["passed"] else 1


@cli.command()
@click.argument("outs", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", "page", type=click.Path(path_type=Path), help="Of several runs: a file for the page.")
@click.option("--other-data", is_flag=True, help="Compare runs that were judged on different questions; it says so.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown; of one run.")
@printing
def report(outs: tuple[Path, ...], page: Path | None, other_data: bool, as_markdown: bool, as_json: bool) -> None:
    """The stage table of a run, and where its HTML report lies; several runs beside each other.

    \b
    Examples:
      svlm report runs/demo
      svlm report runs/demo --markdown >> NOTES.md
      svlm report runs/int4 runs/small runs/tiny -o compare.html
    """
    from .compress.report import markdown, read

    out, *more = outs
    if as_json and as_markdown:
        raise click.UsageError("give --json or --markdown, not both")
    if more and as_markdown:
        raise click.UsageError("--markdown is about one run")
    if not more and (page or other_data):
        raise click.UsageError("--output and --other-data are about several runs")
    if more:
        from .compress.report.compare import print_runs, write_comparison
        from .passes.compare import compare_runs

        facts = compare_runs(outs, other_data=other_data)
        if page:
            write_comparison(page, facts)
        print_json(facts) if as_json else print_runs(facts)
    elif as_markdown:
        click.echo(markdown(read(out)), nl=False)
    else:
        _show_run(out, as_json)


@cli.command(
    epilog=f"\b\nFormats (bits; group sizes; packed = stays packed in memory while it runs):\n{format_table()}"
)
@click.argument("out")
@click.option("--format", "name", required=True, type=click.Choice(sorted(FORMATS)), help="See the table below.")
@click.option("-o", "--output", "folder", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option("--dense", is_flag=True, help="Write what the format cannot hold in 16 bits instead of refusing.")
@loading
@printing
def export(
    out: str, name: str, folder: Path, dense: bool, anatomy: Path | None, trust_remote_code: bool, as_json: bool
) -> None:  # fmt: skip
    """Write OUT as other projects read it. Integers and scales are re-packed, never quantized again.

    \b
    Examples:
      svlm export runs/int4 --format gptq -o int4-gptq
      svlm export runs/int4 --format awq --dense -o int4-awq
      svlm export runs/nf4 --format bnb -o nf4-bnb
    """
    from .passes.api import export_model

    facts = export_model(out, name, folder, dense=dense, rows=rows_of(anatomy), trust_remote_code=trust_remote_code)
    if as_json:
        print_json(facts)
    else:
        click.echo(f"{folder}: {facts['format']}, {facts['bytes'] / 1e6:.1f} MB, {facts['packed']} linears packed")
        for sentence in facts["notes"]:
            click.echo(f"note: {sentence}")


@cli.command()
@click.argument("out")
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("question")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@trust_option
@threads_option
@debug
def ask(out: str, image: Path, question: str, max_new_tokens: int, trust_remote_code: bool) -> None:
    """Ask a model (a run's OUT, or an original) a question about a picture.

    \b
    Example:
      svlm ask runs/demo photo.png "how many dogs are there"
    """
    from .calib.ask import ask as answer
    from .passes.api import load_view

    view = load_view(out, trust_remote_code=trust_remote_code)
    click.echo(answer(view, image, question, max_new_tokens=max_new_tokens))


@cli.command()
@click.argument("out")
@click.option("--against", metavar="MODEL", help="The original, timed in eager transformers.")
@click.option("--kernels", is_flag=True, help="What the torch runtime measured for the linears of OUT, and chose.")
@click.option("--runtime", type=click.Choice(["torch", "openvino"]), default="torch", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@printing
def bench(
    out: str, against: str | None, kernels: bool, runtime: str, threads: int | None, as_json: bool
) -> None:  # fmt: skip
    """Time OUT against the original, interleaved: vision, prefill, each token, a whole answer; memory and bytes.

    \b
    Examples:
      svlm bench runs/demo --against demo
      svlm bench runs/int4 --against ./my-vlm --runtime openvino --threads 2
      svlm bench runs/int4 --kernels
    """
    if kernels == bool(against):
        raise click.UsageError("give --against MODEL, or --kernels alone")
    from .passes.bench import bench as measure
    from .passes.bench import kernel_table, lines

    if against:
        made = measure(out, against, runtime=runtime, threads=threads)
        print_json(made) if as_json else click.echo("\n".join(lines(made)))
        return
    if runtime != "torch":
        raise click.UsageError("--kernels is about the torch runtime")
    from .compress.report.tables import print_kernels

    facts = kernel_table(out, threads=threads)
    print_json(facts) if as_json else print_kernels(facts)


cli.add_command(experiment)


def _show_run(out: Path, as_json: bool) -> None:
    from .compress.report import read
    from .compress.report.terminal import print_stages

    made = read(out)
    if as_json:
        print_json(made)
    else:
        print_stages(made)
        click.echo(f"report: {out / 'report.html'}")
