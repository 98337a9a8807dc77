"""One small run of the demo model through every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from svlm import cli
from tests.commands import Run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A small real run on the demo model through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    small = {
        "calibration": {"fit": 4, "check": 24, "seed": 0},
        "gate": {"metric": "exact_match", "max_drop": 1.0},
        "passes": [{"quantize.rtn": {"bits": 4, "group": 64}}],
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(small))
    out = folder / "out"
    return out, cli.main(["compress", "demo", "-r", str(folder / "small.yaml"), "-o", str(out)])


def test_a_run_leaves_a_model_and_its_report(finished: tuple[Path, int]) -> None:
    out, code = finished
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert [s["verdict"] for s in report["stages"]] == ["baseline", "passed"]
    assert report["stages"][1]["cost"]["bytes"] < 0.5 * report["stages"][0]["cost"]["bytes"]
    text = (out / "report.html").read_text()
    assert text.count("<img ") == 6  # four questions a picture
    assert "quantize.rtn" in text
    assert report["reload"]["stock"] == {"works": True, "says": ""}
    assert len(json.loads((out / "answers.json").read_text())["items"]) == report["data"]["check"]
    assert "## How to load it" in (out / "README.md").read_text()


def test_verify_finds_the_figures_of_the_report(run: Run, finished: tuple[Path, int], tmp_path: Path) -> None:
    out, _ = finished
    code, text, err = run("verify", out, "--against", "demo", "--json", "--alignment")
    assert code == 0, err
    result = json.loads(text)
    report = json.loads((out / "report.json").read_text())
    assert result["quality"]["exact_match"] == report["stages"][-1]["quality"]["exact_match"]
    found, kept = (made["analysis"]["alignment"] for made in (result, report))
    assert [row["name"] for row in found["blocks"]] == [row["name"] for row in kept["blocks"]]
    assert found["cka"] == pytest.approx(kept["cka"], abs=1e-3) and 0.5 < found["cka"] < 1
    code, text, _ = run("verify", out, "--against", "demo", "--gate", "kl max=0", "--score", "anls", "-o", tmp_path)
    assert code == 1
    assert "gate fails" in (tmp_path / "verify.html").read_text()
    assert "gate FAILS: kl is" in text
    for fact in ("ANLS: ", "yes/no questions: says yes to", "Confidence is off by", "with a blank picture"):
        assert fact in text, fact


def test_verify_prints_which_part_lost_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    match = {"value": 0.5, "reference": 1.0, "delta": 0.5, "ci95": [0.4, 0.6], "mcnemar_p": 0.1}
    match |= {"right_to_wrong": 4, "wrong_to_right": 0}
    fact = {"kl": 0.01, "share": 0.87, "ci95": [0.8, 0.92], "exact_match": match}
    parts = [
        {"part": "vision", "parts": ["vision"], "unchanged": False, "restored": fact, "alone": fact},
        {"part": "language", "parts": ["language"], "unchanged": True},
        {"part": "head", "parts": ["head"], "unchanged": False, "why": "it does not run"},
    ]
    blocks = {"vision": [{"block": "vision.blocks[0]", "kl": 0.02, "share": 0.5, "ci95": [0.4, 0.6]}]}
    made = {"questions": 8, "images": 2, "loss": {"kl": 0.2, "exact_match": match}, "parts": parts, "blocks": blocks}
    made["says"] = ["most of it was lost in the vision tower"]
    asked: list[Any] = []

    def verify(*_: Any, analyses: Any, **__: Any) -> dict[str, Any]:
        asked.extend(analyses)
        quality = {"exact_match": match, "kl": 0.2, "agreement": 0.5, "flips": 0.1}
        return {"quality": quality, "gate": None, "passed": True, "analysis": {"attribution": made}}

    monkeypatch.setattr("svlm.passes.api.verify", verify)
    code, text, err = run("verify", tmp_path, "--against", "demo", "--attribute")
    assert code == 0, err
    assert asked == ["attribution"]
    for words in ("87 % [80, 92]", "as in the original", "cannot be put back", "vision.blocks[0]", parts[0]["part"]):
        assert words in text
    assert text.rstrip().endswith("most of it was lost in the vision tower")


def test_ask_answers(run: Run, finished: tuple[Path, int], tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), (200, 30, 30)).save(tmp_path / "red.png")
    code, out, err = run("ask", finished[0], tmp_path / "red.png", "what colour is the background")
    assert code == 0, err
    assert out.strip()
    code, _, err = run("ask", finished[0], tmp_path / "nothing.png", "what is this")
    assert code == 2
    assert "nothing.png" in err


def test_inspect_tells_what_was_done_to_a_model(run: Run, finished: tuple[Path, int]) -> None:
    code, out, _ = run("inspect", finished[0])
    assert code == 0
    assert "passes applied: quantize.rtn" in out


def test_an_earlier_run_is_not_overwritten_unasked(run: Run, finished: tuple[Path, int]) -> None:
    out, _ = finished
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    code, _, err = run("compress", "demo", "-r", "int4", "-o", out)
    assert code == 2
    assert "--overwrite" in err
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_plan_rehearses_and_touches_nothing(
    run: Run, recipe: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {"metric": "exact_match", "max_drop": 0.02, "on_fail": "retry"}
    passes = [{"quantize.rtn": {"bits": 3}, "gate": gate}]
    path = recipe({"calibration": {"fit": 4, "check": 8}, "passes": passes})
    monkeypatch.chdir(path.parent)
    before = sorted(path.parent.iterdir())
    code, out, err = run("plan", "demo", "-r", path)
    assert code == 0, err
    assert "quantize.rtn" in out
    assert "may lose 2 points, else retry (2 milder settings)" in out
    assert "✓ every pass ran" in out
    assert sorted(path.parent.iterdir()) == before
