"""What every test needs: one thread (the suite is parallel), a fixed seed, quiet transformers; commands and recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.utils import logging

from svlm import cli
from tests.commands import Run

torch.set_num_threads(1)
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit code, stdout, stderr."""

    def runs(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return runs


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[Any], Path]:
    def writes(value: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
        return path

    return writes
