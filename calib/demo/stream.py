"""What the trainer is fed: batch number `step` of a phase is a pure function of (seed, phase, step).

That is all it takes to resume: no sampler has a state. A batch is scenes and, one in five by default, pictures
of easy-VQA's training split, half of them mirrored (its questions name no directions, and its triangles stand upright).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import build, easy, layout, scenes

MIX = {"name": 1.5, "exists": 2.0, "count": 0.5, "colour": 0.35, "place": 1.0, "relation": 2.5}
SHAPES = ("circle", "rectangle", "triangle")
HUES = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
CENTRES = np.arange(build.IMAGE // build.PATCH) * build.PATCH + build.PATCH // 2


@dataclass(frozen=True)
class Batch:
    """Pictures with their questions, and what the auxiliary loss wants of each of the P = 64 patches."""

    pixels: Tensor  # [B, 3, 96, 96]
    layout: layout.Layout | None
    words: Tensor  # [B, P, 2] two ids that share the target of a patch (mostly twice the same)
    beside: Tensor  # [B, P] the thing left or right of the patch's thing; <pad> for none; IGNORED outside things
    across: Tensor  # [B, P] the thing above or below it
    place: Tensor  # [B, P] which of the four cells a patch is in


@functools.cache
def word_ids() -> dict[str, int]:
    """Vocabulary: word to id."""
    return {word: i for i, word in enumerate(build.words())}


def _easy_vqa(split: str) -> tuple[np.ndarray, list[list[tuple[str, str]]]]:
    """Pictures uint8 [N, 96, 96, 3] and the questions of each."""
    pictures, questions = [], []
    for path, pairs in easy.read(split).values():
        with Image.open(path) as picture:
            size = (build.IMAGE, build.IMAGE)
            pictures.append(np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)))
        questions.append(pairs)
    return np.stack(pictures), questions


@functools.cache
def easy_vqa_data(split: str) -> tuple[np.ndarray, list[list[tuple[str, str]]], np.ndarray]:
    """Pictures, questions, and the ids of (shape, colour) of each picture [N, 2] (-1 where no question tells)."""
    pictures, questions = _easy_vqa(split)
    told = np.full((len(questions), 2), -1)
    for i, pairs in enumerate(questions):
        for question, answer in pairs:
            if answer in ("yes", "no"):
                continue
            for word in [*question.strip("?").split(), answer]:
                for column, known in enumerate((SHAPES, HUES)):
                    if word in known:
                        told[i, column] = word_ids()[word]
    return pictures, questions, told


def _patches(made: scenes.Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The dense targets of one scene, each int64 [64]: word, beside, across, place."""
    ids = word_ids()
    side = len(CENTRES)
    word = np.full((side, side), ids[made.colour])
    beside, across = (np.full((side, side), layout.IGNORED) for _ in range(2))
    corners = iter(made.corners)
    for where, thing in enumerate(made.cells):
        if not thing:
            continue
        x, y = next(corners)
        inside = np.ix_((y <= CENTRES) & (y + scenes.SPRITE > CENTRES), (x <= CENTRES) & (x + scenes.SPRITE > CENTRES))
        word[inside] = ids[thing]
        beside[inside] = ids.get(made.cells[where ^ 1], 0)
        across[inside] = ids.get(made.cells[where ^ 2], 0)
    cell = (CENTRES >= scenes.CELL).astype(np.int64)
    place = cell[None, :] + 2 * cell[:, None]
    return word.ravel(), beside.ravel(), across.ravel(), place.ravel()


def _choose(rng: np.random.Generator, questions: list[scenes.Question], count: int, mix: dict[str, float]) -> list:
    """`count` questions, drawn by the weight of their kind without repetition."""
    weight = np.array([mix[q.kind] for q in questions])
    order = np.argsort(np.log(rng.random(len(questions))) / weight)[::-1]
    return [(questions[i].question, questions[i].answer) for i in order[:count]]


def batch(
    phase: str,
    step: int,
    size: int,
    questions: int,
    seed: int = 0,
    mix: dict[str, float] | None = None,
    share: float = 0.2,
) -> Batch:
    """Batch number `step` of a phase ("vision" has no questions); `share` of it are easy-VQA pictures."""
    rng = np.random.default_rng([seed, len(phase), step])
    shapes = int(size * share)
    pictures, asked, targets = [], [], []
    for i in range(size - shapes):
        made = scenes.scene("train", step * (size - shapes) + i, seed + 10 * (phase == "vision"))
        pictures.append(np.asarray(made.image))
        words, beside, across, place = _patches(made)
        targets.append((np.stack([words, words], 1), beside, across, place))
        if phase != "vision":
            asked.append(_choose(rng, made.questions, questions, {**MIX, **(mix or {})}))
    shapes_only, pairs, told = easy_vqa_data("train")
    for i in rng.integers(len(shapes_only), size=shapes):
        pictures.append(shapes_only[i][:, ::-1] if rng.integers(2) else shapes_only[i])
        word = np.where(told[i] < 0, told[i].max(), told[i])
        word = np.broadcast_to(np.where(word < 0, layout.IGNORED, word), (build.VISUAL_TOKENS, 2))
        nothing = np.full(build.VISUAL_TOKENS, layout.IGNORED)
        targets.append((word, nothing, nothing, nothing))
        if phase != "vision":
            asked.append([pairs[i][j] for j in rng.permutation(len(pairs[i]))[:questions]])
    dense = [torch.from_numpy(np.stack(column)) for column in zip(*targets)]
    packed = layout.pack(asked) if asked else None
    return Batch(layout.pixels(np.stack(pictures)), packed, *dense)
