"""A run killed with SIGKILL goes on with --resume to the very same bits; benchmarks/kill_resume.py does it 20 times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kill_resume import RECIPE, command, run_and_kill, weights


def _pruned(out: Path) -> bool:
    return any((out / ".svlm" / "stages").glob("01-*/applied"))


def _some_blocks_quantized(out: Path) -> bool:
    return len(list((out / ".svlm" / "scratch").glob("*/*/*"))) >= 3


@pytest.mark.slow
def test_killed_twice_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))  # the children run the svlm under test
    recipe, calm, out = tmp_path / "three.yaml", tmp_path / "calm", tmp_path / "out"
    recipe.write_text(RECIPE)
    subprocess.run(command(recipe, calm), check=True, capture_output=True)
    assert run_and_kill(command(recipe, out), lambda: _pruned(out)), "killed after the first pass"
    assert run_and_kill(command(recipe, out, "--resume"), lambda: _some_blocks_quantized(out)), "and inside the third"
    assert not (out / "svlm.json").exists()
    done = subprocess.run(command(recipe, out, "--resume"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert weights(out) == weights(calm)
