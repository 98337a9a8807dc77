"""What two public packages give on made-up inputs: the figures that tests/calib/test_bias_peers.py compares with.

    pip install bias-amplification corrupt-tta
    python benchmarks/bias_peers.py tests/calib/bias_peers.json

bias-amplification has directional bias amplification (class DBA); corrupt-tta has ImageNet-C's corruptions. Both bring
packages that the tests do without (scikit-learn, OpenCV, scikit-image), so their figures are kept instead.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHARED = {"blur": "gaussian_blur", "jpeg": "jpeg_compression", "brightness": "brightness", "contrast": "contrast"}
SIDE = 224  # of the picture
PLACES = [(0, 0), (3, 221), (50, 60), (111, 112), (112, 111), (150, 20), (200, 223), (223, 0)]  # pixels that are kept


def answers(case: int) -> tuple[list[int], list[int], list[int]]:
    """Attribute, right answer and what is said of some hundred samples, by arithmetic alone."""
    attribute = [(i * i + case) % 7 % 3 for i in range(211 + case)]
    truth = [(a * (i % 4) + i * i // 5 + case) % 4 for i, a in enumerate(attribute)]
    said = [(t + (i % (5 + case) == 0) * (1 + i % 3)) % 4 for i, t in enumerate(truth)]
    return attribute, truth, said


def picture() -> Any:
    """Uint8 [SIDE, SIDE, 3]: slopes, waves and edges, with black and white."""
    y, x = np.mgrid[:SIDE, :SIDE]
    red = (x * 255) // (SIDE - 1)
    green = (x // 16 + y // 16) % 2 * 255
    blue = (y * y // 50 + x) % 256
    made = np.stack([red, green, blue], axis=2).astype(np.uint8)
    made[100:130, 40:90] = 0
    made[20:60, 150:210] = 255
    return made


def main(out: Path) -> None:
    import torch
    from bias_amplification.metrics.CoOccurMetrics import DBA
    from corrupt_tta import corrupt

    amplified = []
    for case in range(4):
        one_hot = [torch.nn.functional.one_hot(torch.tensor(codes)).float() for codes in answers(case)]
        amplified.append(float(DBA().computeBiasAmp(*one_hot)[0]))
    pixels: dict[str, Any] = {}
    for name, theirs in SHARED.items():
        for strength in range(1, 6):
            made = np.asarray(corrupt(picture(), strength, theirs), dtype=np.float64)
            pixels[f"{name} {strength}"] = {
                "mean": made.mean().round(4),
                "deviation": made.std().round(4),
                "pixels": [[round(float(c), 3) for c in made[place]] for place in PLACES],
            }
    noisy = np.asarray(corrupt(np.full((SIDE, SIDE, 3), 127, np.uint8), 1, "gaussian_noise"), dtype=np.float64)
    pixels["noise 1 of grey"] = {"mean": noisy.mean().round(4), "deviation": noisy.std().round(4)}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in pixels.items())
    text = f'{{\n "directional": {json.dumps(amplified)},\n "corruptions": {{\n{rows}\n }}\n}}\n'
    out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
