"""The demo: a small vision-language model that svlm trained itself and ships, and endless questions to ask it.

    MODEL                        folder of the model; loads with stock `transformers`
    rows(split, images, ...)     dataset rows of a split: "fit", "check", "shifted", "recovery" (and "train", "val")
    scene(split, index)          one picture with all its questions
    easy_vqa_rows(split)         the public easy-VQA set, which the model has learnt, too (needs the package easy-vqa)

`scenes.py` makes the data, `build.py` the model and its processor, `train.py` trains it (`layout.py`, `stream.py`,
`muon.py`, `outliers.py` are its parts), `build_atlas.py` drew the pictures. CREDITS.md names those who drew them first.
"""

from __future__ import annotations

from pathlib import Path

from .easy import easy_vqa_rows
from .scenes import KINDS, SHIFTED_STYLES, SPLITS, Question, Scene, rows, scene

MODEL = Path(__file__).parent / "model"

__all__ = ["KINDS", "MODEL", "SHIFTED_STYLES", "SPLITS", "Question", "Scene", "easy_vqa_rows", "rows", "scene"]
