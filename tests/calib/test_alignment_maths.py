"""Alignment against definitions written as loops, against the papers' own programs, and against what it should tell."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from svlm.calib.metrics import alignment as maths
from tests.oracles import alignment as oracle

# what benchmarks/alignment_peers.py prints: `metrics.py` of github.com/minyoungg/platonic-rep at dcd76ba, `mir_util.py`
# of github.com/shikiw/Modality-Integration-Rate at 07070b9 (float32, scipy's sqrtm)
PUBLIC = {
    "cka": 0.5121860693327008,
    "mutual_knn": 0.39500001072883606,
    "mir_layer": [4.177812576293945, 5.260577201843262],
    "mir": 0.9748979084804155,
}


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "alignment_peers.py"
    spec = importlib.util.spec_from_file_location("alignment_peers", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.inputs()


def rows(seed: int, n: int, width: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_papers_own_programs_say_the_same(given: dict[str, torch.Tensor]) -> None:
    x, y = given["x"], given["y"]
    layers = [maths.mir_layer(given[f"visual{i}"], given[f"text{i}"]) for i in (0, 1)]
    assert maths.cka(x, y) == pytest.approx(PUBLIC["cka"], rel=1e-6)
    assert maths.mutual_knn(x, y) == pytest.approx(PUBLIC["mutual_knn"], abs=1e-6)
    assert layers == pytest.approx(PUBLIC["mir_layer"], rel=1e-4)
    assert maths.mir(layers) == pytest.approx(PUBLIC["mir"], rel=1e-4)


def test_definitions_as_loops_say_the_same(given: dict[str, torch.Tensor]) -> None:
    x, y = rows(0, 9, 5), rows(0, 9, 7)[:, :6] + 0.3
    y[:, :5] += x
    assert maths.hsic(x, y) == pytest.approx(oracle.hsic(x.numpy(), y.numpy()), rel=1e-10)
    assert maths.cka(x, y) == pytest.approx(oracle.cka(x.numpy(), y.numpy()), rel=1e-10)
    assert maths.mutual_knn(x, y, 3) == pytest.approx(oracle.mutual_knn(x.numpy(), y.numpy(), 3))
    z = rows(2, 4, 5) - 0.2
    assert maths.mean_cosine(x, z) == pytest.approx(oracle.mean_cosine(x.numpy(), z.numpy()))
    visual, text = given["visual0"], given["text0"]
    assert maths.frechet(visual, text) == pytest.approx(oracle.frechet(visual.numpy(), text.numpy()))
    layer = oracle.mir_layer(visual.numpy(), text.numpy())
    assert maths.mir_layer(visual, text) == pytest.approx(layer)
    assert layer != pytest.approx(oracle.frechet(visual.numpy(), text.numpy()), rel=0.1)  # the outliers matter here


def test_cka_sees_through_rotation_scale_and_shift_and_is_unbiased() -> None:
    x = rows(0, 50, 20)
    turn = torch.linalg.qr(rows(1, 20, 20)).Q
    assert maths.cka(x, 3 * x @ turn + 5) == pytest.approx(1.0, abs=1e-9)
    found = [maths.cka(rows(2 * i, 40, 60), rows(2 * i + 1, 40, 60)) for i in range(200)]
    values = np.array([value for value in found if value is not None])
    assert len(values) == 200
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(200)  # the plain estimate would be about 0.6 here
    assert maths.cka(x, torch.ones(50, 3)) is None


def test_neighbours_of_the_same_and_of_unrelated_rows() -> None:
    x = rows(0, 80, 10)
    assert maths.mutual_knn(x, 2 * x) == 1.0
    chance = np.mean([maths.mutual_knn(x, rows(i, 80, 10)) for i in range(1, 21)])
    assert chance == pytest.approx(10 / 79, abs=0.01)


def test_mir_grows_with_the_gap_and_not_with_the_scale() -> None:
    visual, text = rows(0, 300, 8), rows(1, 200, 8)
    near, far = maths.mir_layer(visual, text), maths.mir_layer(visual + 3, text)
    assert near < 0.05 < 1 < far
    assert maths.mir_layer(7 * (visual + 3), 7 * text) == pytest.approx(far)
    assert maths.mir([near, far]) == pytest.approx(math.log10(near + far))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: maths.hsic(torch.ones(3, 2), torch.ones(3, 2)), "at least 4: 3 and 3"),
        (lambda: maths.cka(torch.ones(5, 2), torch.ones(6, 2)), "5 and 6"),
        (lambda: maths.mutual_knn(torch.ones(11, 2), torch.ones(11, 2)), "at least 12: 11"),
        (lambda: maths.mir_layer(torch.ones(50, 8), torch.ones(8, 8)), "8 channels want more rows than that: 50 and 8"),
    ],
)
def test_too_little_data_is_refused(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=words):
        call()
