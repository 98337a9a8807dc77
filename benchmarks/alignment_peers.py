"""Alignment by the papers' own programs, on the inputs of tests/calib/test_alignment_maths.py; prints its `PUBLIC`.

    python benchmarks/alignment_peers.py PLATONIC MIR

PLATONIC: `metrics.py` of github.com/minyoungg/platonic-rep (arXiv 2405.07987), commit dcd76ba.
MIR: `mir_util.py` of github.com/shikiw/Modality-Integration-Rate (arXiv 2410.07167), commit 07070b9; it wants scipy.
"""

from __future__ import annotations

import math
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent


def loaded(path: str) -> ModuleType:
    spec = spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs() -> dict[str, torch.Tensor]:
    """Two related sets of 60 rows, and visual and text tokens of two layers with outliers; a frozen generator's."""
    draw = np.random.RandomState(7)
    x = draw.standard_normal((60, 12))
    y = x @ draw.standard_normal((12, 9)) + 2 * draw.standard_normal((60, 9))
    made = {"x": x, "y": y}
    for layer in (0, 1):
        visual = 3 * draw.standard_normal((200, 16)) @ draw.standard_normal((16, 16)) + 1
        text = draw.standard_normal((90, 16)) @ draw.standard_normal((16, 16))
        visual[5] *= 40
        text[11] *= 25
        made |= {f"visual{layer}": visual, f"text{layer}": text}
    return {name: torch.tensor(value) for name, value in made.items()}


def main() -> None:
    for name in ("torchaudio", "torchaudio.functional", "sklearn", "sklearn.cross_decomposition"):
        stand_in: Any = ModuleType(name)  # imported by metrics.py for other metrics than ours
        stand_in.CCA = stand_in.functional = None
        sys.modules.setdefault(name, stand_in)
    platonic, rate = loaded(sys.argv[1]).AlignmentMetrics, loaded(sys.argv[2])
    given = inputs()
    unit = {name: torch.nn.functional.normalize(given[name], dim=1) for name in ("x", "y")}
    layers = []
    for layer in (0, 1):
        visual, text = (given[f"{kind}{layer}"].float() for kind in ("visual", "text"))
        scale = 1 / text.norm(p=2, dim=-1).mean(0)
        clean = [rate.replace_outliers_with_median_l2(scale * rows) for rows in (visual, text)]
        layers.append(float(rate.calculate_fid(*clean)))
    print("PUBLIC = {")
    print(f'    "cka": {platonic.unbiased_cka(given["x"], given["y"])!r},')
    print(f'    "mutual_knn": {platonic.mutual_knn(unit["x"], unit["y"], topk=10)!r},')
    print(f'    "mir_layer": {layers!r},')
    print(f'    "mir": {math.log(sum(layers), 10)!r},')
    print("}")


if __name__ == "__main__":
    main()
