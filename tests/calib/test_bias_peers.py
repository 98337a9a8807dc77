"""Directional amplification and corruptions against public packages: bias-amplification 0.2.1 and corrupt-tta 0.1.7.

benchmarks/bias_peers.py runs them and writes bias_peers.json.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from svlm.calib.corruptions import corrupt
from svlm.calib.metrics.bias import directional
from tests.oracles import bias as oracle

ROOT = Path(__file__).parents[2]
THEIRS: dict[str, Any] = json.loads((Path(__file__).parent / "bias_peers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bias_peers", ROOT / "benchmarks" / "bias_peers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_directional_amplification_is_the_package_s_and_the_loop_s(script: ModuleType) -> None:
    for case, theirs in enumerate(THEIRS["directional"]):
        codes = script.answers(case)
        ours = directional(*map(np.array, codes))
        words = [[str(code) for code in row] for row in codes]
        assert ours == pytest.approx(oracle.directional(*words, sorted(set(words[1]))), abs=1e-12)
        assert ours == pytest.approx(theirs, abs=1e-6), "the package computes in single precision"
    assert max(map(abs, THEIRS["directional"])) > 0.01


@pytest.mark.parametrize("name", ["blur", "jpeg", "brightness", "contrast"])
def test_corruptions_are_those_of_imagenet_c(script: ModuleType, name: str) -> None:
    picture = Image.fromarray(script.picture())
    for strength in range(1, 6):
        theirs = THEIRS["corruptions"][f"{name} {strength}"]
        made = np.asarray(corrupt(picture, name, strength), dtype=np.float64)
        tolerance = 3.0 if name == "jpeg" else 0.51  # theirs are not rounded; JPEG libraries round differently
        assert made.mean() == pytest.approx(theirs["mean"], abs=tolerance / 5)
        assert made.std() == pytest.approx(theirs["deviation"], abs=tolerance / 3)
        ours = [made[place] for place in script.PLACES]
        np.testing.assert_allclose(ours, theirs["pixels"], atol=tolerance)


def test_noise_is_as_strong(script: ModuleType) -> None:
    grey = Image.fromarray(np.full((script.SIDE, script.SIDE, 3), 127, np.uint8))
    made = np.asarray(corrupt(grey, "noise", 1), dtype=np.float64)
    theirs = THEIRS["corruptions"]["noise 1 of grey"]
    assert made.mean() == pytest.approx(theirs["mean"], abs=0.3)
    assert made.std() == pytest.approx(theirs["deviation"], rel=0.01)
