"""The command line: exit codes, messages, what is left untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from svlm import passes
from svlm.compress.errors import GateFailed, PromiseBroken, WorkFailed
from svlm.compress.recipe import read_recipe
from svlm.compress.report import write
from svlm.passes import api
from svlm.recipes import SHIPPED
from tests import reports, zoo
from tests.commands import Run

COMMANDS = ("passes", "inspect", "plan", "compress", "verify", "report", "export", "ask", "bench", "experiment")


def test_help_teaches_with_examples_in_the_order_of_use(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "svlm compress demo -r default -o runs/demo" in out
    assert "Exit codes: 0 all gates hold" in out
    lines = out.partition("Commands:")[2].splitlines()
    assert tuple(line.split()[0] for line in lines if line[:2] == "  " and line[2] != " ") == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"  svlm {command} " in out.partition("Example")[2]
    assert "--debug" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compres", "demo"], "No such command 'compres'"),
        (["compress", "demo", "-r", "int4"], "Missing option '-o'"),
        (["compress", "demo", "-r", "int4", "-o", "x", "--threads", "0"], "--threads"),
        (["compress", "--bits", "4"], "No such option"),
        (["ask", "demo"], "Missing argument"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Run, arguments: list[str], words: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_passes_lists_the_menu(run: Run) -> None:
    code, out, _ = run("passes")
    assert code == 0
    assert all(name in out for name in passes.MENU)
    code, out, _ = run("passes", "--json")
    rows = json.loads(out)
    assert [r["name"] for r in rows][: len(passes.MENU)] == list(passes.MENU)
    assert all(r["summary"] for r in rows)


@pytest.mark.parametrize("name", passes.MENU)
def test_one_pass_shows_its_settings_and_defaults(run: Run, name: str) -> None:
    code, out, _ = run("passes", name, "--json")
    facts = json.loads(out)
    defaults = {s["setting"]: s["default"] for s in facts["settings"]}
    assert code == 0
    assert defaults.keys() == passes.find(name)().settings().keys()
    code, out, _ = run("passes", name)
    assert code == 0
    assert all(setting in out for setting in defaults)


def test_an_unknown_pass_is_answered_with_the_nearest(run: Run) -> None:
    code, _, err = run("passes", "quantize.gptk")
    assert code == 2
    assert "did you mean 'quantize.gptq'" in err


@pytest.mark.parametrize("name", ["default", "int4", "tokens-half", "tiny"])
def test_the_shipped_recipes_are_recipes(name: str) -> None:
    made = read_recipe(name, passes.find, SHIPPED)
    assert made.name == name
    assert made.steps
    assert made.calibration.check >= 512
    assert any(step.gate for step in made.steps)
    text = SHIPPED[name].read_text()
    assert text.startswith("# ")  # says what it is for
    assert {"calibration", "gate", "passes"} == set(yaml.safe_load(text))


def test_exactly_these_recipes_ship() -> None:
    orders = ["prune-distil-quantize", "quantize-prune-distil"]
    assert sorted(SHIPPED) == sorted(["default", "int4", "small", "tiny", "tokens-half", *orders])


WRONG = [
    ({"pases": []}, "unknown key 'pases'", "did you mean 'passes'"),
    ({"passes": [{"quantize.gpqt": {}}]}, "there is no pass 'quantize.gpqt'", "did you mean 'quantize.gptq'"),
    ({"passes": [{"quantize.gptq": {"bit": 4}}]}, "has no setting 'bit'", "did you mean 'bits'"),
    ({"passes": [{"quantize.gptq": {"bits": "four"}}]}, "wrong kind", "passes[0]"),
    ({"passes": [{"quantize.rtn": {}, "gate": {"metric": "exactmatch"}}]}, "unknown metric", "exact_match"),
    ("passes: [", "not YAML", "recipe.yaml"),
]


@pytest.mark.parametrize(("value", "what", "hint"), WRONG, ids=[w[1] for w in WRONG])
@pytest.mark.parametrize("command", ["compress", "plan"])
def test_a_wrong_recipe_touches_nothing(
    run: Run, recipe: Callable[[Any], Path], tmp_path: Path, command: str, value: Any, what: str, hint: str
) -> None:
    out = tmp_path / "out"
    more = ["-o", out] if command == "compress" else []
    code, _, err = run(command, "demo", "-r", recipe(value), *more)
    assert code == 2
    assert what in err
    assert hint in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["-p", "quantize.gptq.bits=3"], "-p wants PASS:KEY=VALUE"),
        (["-p", "quantize.gptq:bitz=3"], "did you mean 'bits'"),
        (["-p", "prune.structured:ratio=0.3"], "the recipe has no pass 'prune.structured'"),
        (["--gate", "exact_match"], "max_drop"),
        (["--gate", "exact_match max_drop=0.1 on_fail=panic"], "unknown on_fail"),
    ],
)
def test_wrong_overrides_are_usage_errors(run: Run, tmp_path: Path, more: list[str], words: str) -> None:
    code, _, err = run("compress", "demo", "-r", "int4", "-o", tmp_path / "out", *more)
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


def test_data_is_asked_for_unless_the_model_is_the_demo(run: Run, tmp_path: Path) -> None:
    code, _, err = run("compress", "./my-vlm", "-r", "int4", "-o", tmp_path / "out")
    assert code == 2
    assert "say which data" in err
    assert not (tmp_path / "out").exists()


def _stub(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, *, leaves_report: bool = True) -> list[Any]:
    """Put a run in the place of `compress_model` that leaves a report and ends with `error`."""
    calls: list[Any] = []

    def compress_model(*arguments: Any) -> None:
        calls.append(arguments)
        if leaves_report:
            arguments[3].mkdir()
            write(arguments[3], reports.report(stopped=error is not None), [])
        if error is not None:
            raise error

    monkeypatch.setattr(api, "compress_model", compress_model)
    return calls


def test_options_reach_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _stub(monkeypatch, None)
    code, out, _ = run(
        "compress", "demo", "-r", "int4", "-o", tmp_path / "out", "-p", "quantize.gptq:bits=3",
        "-p", "quantize.gptq:group=32", "--gate", "kl max=0.5 on_fail=keep", "--overwrite", "--batch-size", 7,
        "--trust-remote-code",
    )  # fmt: skip
    assert code == 0
    model, steps, data, where, options = calls[0]
    assert (model, data, where) == ("demo", "demo", tmp_path / "out")
    assert (steps.steps[0].step.bits, steps.steps[0].step.group) == (3, 32)
    assert steps.steps[0].gate.to_json() == {"metric": "kl", "max": 0.5, "on_fail": "keep"}
    assert (options.overwrite, options.resume, options.batch_size, options.trust_remote_code) == (True, False, 7, True)
    assert "4.49 times smaller" in out
    assert f"report: {tmp_path / 'out' / 'report.html'}" in out


@pytest.mark.parametrize("error", [GateFailed("the gate of dpp failed"), PromiseBroken("it broke a promise")])
def test_a_failed_gate_is_exit_code_1_and_still_shows_the_table(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _stub(monkeypatch, error)
    code, out, err = run("compress", "demo", "-r", "int4", "-o", tmp_path / "out")
    assert code == 1
    assert "4 tokens.random" in out
    assert str(error) in err


def test_json_stays_json_when_a_gate_fails(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stub(monkeypatch, GateFailed("the gate failed"))
    code, out, _ = run("compress", "demo", "-r", "int4", "-o", tmp_path / "out", "--json")
    assert code == 1
    assert json.loads(out) == reports.report(stopped=True)


@pytest.mark.parametrize("error", [WorkFailed("the disk is full"), RuntimeError("a bug")])
def test_failed_work_is_exit_code_3_and_debug_shows_where(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _stub(monkeypatch, error, leaves_report=False)
    arguments = ("compress", "demo", "-r", "int4", "-o", tmp_path / "out")
    code, _, err = run(*arguments)
    assert code == 3
    assert str(error) in err
    assert "Traceback" not in err
    code, _, err = run(*arguments, "--debug")
    assert code == 3
    assert "Traceback" in err
    assert "compress_model" in err


def test_an_interrupt_is_exit_code_130_and_says_how_to_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stub(monkeypatch, KeyboardInterrupt(), leaves_report=False)
    code, _, err = run("compress", "demo", "-r", "int4", "-o", tmp_path / "out")
    assert code == 130
    assert "interrupted" in err
    assert "--resume" in err
    assert str(tmp_path / "out") in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    code = "import sys; from svlm.cli import main; sys.exit(main(['passes']))"
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    child = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    errors = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait() == 141
    assert errors == ""


def test_report_prints_table_markdown_or_json(run: Run, tmp_path: Path) -> None:
    write(tmp_path, reports.report(), [])
    code, out, _ = run("report", tmp_path)
    assert code == 0
    assert "3 quantize.gptq" in out
    assert out.rstrip().endswith("report.html")
    code, out, _ = run("report", tmp_path, "--markdown")
    assert code == 0
    assert "| 3 quantize.gptq |" in out
    code, out, _ = run("report", tmp_path, "--json")
    assert code == 0
    assert json.loads(out) == reports.report()


def test_report_refuses_what_it_cannot_do(run: Run, tmp_path: Path) -> None:
    code, _, err = run("report", tmp_path)
    assert code == 2
    assert "no report here" in err
    assert run("report", tmp_path, "--json", "--markdown")[0] == 2


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_inspect_shows_the_anatomy_of_a_folder(run: Run, tmp_path: Path, family: str) -> None:
    model, _ = zoo.build(family)
    model.save_pretrained(tmp_path / "model")
    code, out, err = run("inspect", tmp_path / "model")
    assert code == 0, err
    assert all(word in out for word in ("vision", "language", "total", "visual tokens an image"))
    code, out, _ = run("inspect", tmp_path / "model", "--json")
    facts = json.loads(out)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["passes"] == []


def test_inspect_says_what_is_wrong_with_a_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    code, _, err = run("inspect", tmp_path / "model")
    assert code == 2
    assert "model" in err
    assert "Traceback" not in err
    (tmp_path / "row.yaml").write_text("nmae: mine\n")
    code, _, err = run("inspect", "demo", "--anatomy", tmp_path / "row.yaml")
    assert code == 2
    assert "did you mean 'name'" in err
