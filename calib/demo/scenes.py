"""Scenes with questions, made up on the spot: the demo model's data.

A scene is a 96 x 96 picture: a noisy background in one of ten colours and one to four things of the atlas, each in its
own cell of a 2 x 2 grid, shifted by a few pixels and mirrored now and then. Six kinds of question are asked about it:

    name       what is in the top left?                bear
    place      where is the bear?                      top left
    relation   what is to the right of the bear?       guitar      (only where there is one)
    exists     is there a guitar?                      yes | no    (half and half)
    count      how many objects are there?             3
    colour     what colour is the background?          pink

Everything follows from `(split, seed, index)`: the same numbers give the same bytes on every machine. To keep it so,
the draws are remainders of the raw 64-bit words of PCG64 (numpy promises that stream; it does not promise those of
`Generator`'s methods), and the blending is integer arithmetic. The splits have seed spaces of their own, so no scene
of one is ever a scene of another; `shifted` also draws its things in two picture styles that no other split uses.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
CANVAS, CELL, SPRITE = 96, 48, 40
SPLITS = {"train": 1, "val": 2, "fit": 3, "check": 4, "shifted": 5, "recovery": 6}
KINDS = ("name", "exists", "count", "colour", "place", "relation")
SHIFTED_STYLES = ("fluent-emoji-flat", "fxemoji")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COLOURS = {
    "red": (200, 50, 50),
    "green": (60, 150, 70),
    "blue": (50, 90, 200),
    "yellow": (235, 215, 70),
    "orange": (240, 140, 40),
    "purple": (130, 60, 160),
    "pink": (245, 160, 195),
    "brown": (120, 80, 45),
    "gray": (125, 125, 125),
    "white": (235, 235, 235),
}
NAME_WORDINGS = ("what is in the {place}?", "which object is in the {place}?", "name the object in the {place}.")
PLACE_WORDINGS = ("where is the {thing}?", "in which corner is the {thing}?")
COUNT_WORDINGS = ("how many objects are there?", "count the objects.", "how many objects does the image contain?")
COLOUR_WORDINGS = ("what colour is the background?", "what is the colour of the background?")
EXISTS_WORDINGS = ("is there {a} {thing}?", "is {a} {thing} present?", "does the image contain {a} {thing}?")
RELATION_WORDINGS = ("what is {side} the {thing}?", "which object is {side} the {thing}?")
SIDES = {  # what the neighbour is, seen from the thing: wordings; and where it is: a step in (column, row)
    ("left of", "to the left of"): (-1, 0),
    ("right of", "to the right of"): (1, 0),
    ("above", "right above"): (0, -1),
    ("below", "right below"): (0, 1),
}


@dataclass(frozen=True)
class Question:
    """One question, its answer, and its kind (one of `KINDS`)."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and what can be asked about it; `cells` names what is in each of the four places ("" for nothing)."""

    image: Image.Image
    questions: list[Question]
    image_id: str
    style: str
    colour: str
    cells: tuple[str, str, str, str]
    corners: tuple[tuple[int, int], ...]


@functools.cache
def atlas() -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """Styles, names, and sprites as uint8 [styles, names, SPRITE, SPRITE, 4]."""
    index = json.loads((HERE / "atlas.json").read_text(encoding="utf-8"))
    styles, names, size = tuple(index["styles"]), tuple(index["names"]), index["size"]
    with Image.open(HERE / "atlas.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    sprites = pixels.reshape(len(styles), size, len(names), size, 4).transpose(0, 2, 1, 3, 4)
    return styles, names, np.ascontiguousarray(sprites)


class Draws:
    """Random integers as remainders of raw words: the same on every machine and with every numpy."""

    def __init__(self, *key: int) -> None:
        self.bits = np.random.PCG64(np.random.SeedSequence(key))

    def below(self, n: int) -> int:
        """An integer in [0, n); biased by at most n / 2^32, which nobody can see."""
        return int(self.bits.random_raw() >> 32) % n

    def pick(self, items: Any) -> Any:
        """One of `items`."""
        return items[self.below(len(items))]

    def sample(self, items: Any, count: int) -> list[Any]:
        """`count` of `items` without repetition, in random order."""
        pool = list(items)
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def noise(self, count: int) -> np.ndarray:
        """`count` random bytes, uint8; `count` is a multiple of eight."""
        return np.asarray(self.bits.random_raw(count // 8)).astype("<u8").view(np.uint8)


def _paint(draws: Draws, colour: str, placed: list[tuple[np.ndarray, int, int]]) -> Image.Image:
    """The picture, from the background colour and sprites [SPRITE, SPRITE, 4] with their corners (x, y)."""
    base = np.array([c + draws.below(31) - 15 for c in COLOURS[colour]], dtype=np.int32)
    grain = draws.noise(CANVAS * CANVAS * 3).reshape(CANVAS, CANVAS, 3).astype(np.int32)
    canvas = np.clip(base + ((grain * 41) >> 8) - 20, 0, 255)
    for sprite, x, y in placed:
        window = canvas[y : y + SPRITE, x : x + SPRITE]
        rgb, alpha = sprite[..., :3].astype(np.int32), sprite[..., 3:].astype(np.int32)
        window[...] = (rgb * alpha + window * (255 - alpha) + 127) // 255
    return Image.fromarray(canvas.astype(np.uint8), "RGB")


def _article(thing: str) -> str:
    return "an" if thing[0] in "aeiou" else "a"


def _ask(draws: Draws, cells: tuple[str, ...], colour: str) -> list[Question]:
    """All that is asked about a scene: every place, every thing, every neighbour, as many absent as present things."""
    _, names, _ = atlas()
    present = [thing for thing in cells if thing]
    absent = draws.sample([name for name in names if name not in present], len(present))
    out = [
        Question(draws.pick(COUNT_WORDINGS), str(len(present)), "count"),
        Question(draws.pick(COLOUR_WORDINGS), colour, "colour"),
    ]
    for thing, missing in zip(present, absent):
        where = cells.index(thing)
        column, row = where % 2, where // 2
        out.append(Question(draws.pick(NAME_WORDINGS).format(place=PLACES[where]), thing, "name"))
        out.append(Question(draws.pick(PLACE_WORDINGS).format(thing=thing), PLACES[where], "place"))
        for name, answer in ((thing, "yes"), (missing, "no")):
            text = draws.pick(EXISTS_WORDINGS).format(a=_article(name), thing=name)
            out.append(Question(text, answer, "exists"))
        for wordings, (dx, dy) in SIDES.items():
            if 0 <= column + dx < 2 and 0 <= row + dy < 2 and cells[where + dx + 2 * dy]:
                text = draws.pick(RELATION_WORDINGS).format(side=draws.pick(wordings), thing=thing)
                out.append(Question(text, cells[where + dx + 2 * dy], "relation"))
    return draws.sample(out, len(out))


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene number `index` of a split, with every question that makes sense for it in random order."""
    styles, names, sprites = atlas()
    draws = Draws(SPLITS[split], seed, index)
    usable = [s for s in styles if (s in SHIFTED_STYLES) == (split == "shifted")]
    style, colour = draws.pick(usable), draws.pick(tuple(COLOURS))
    count = draws.pick((1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4))
    places, things = sorted(draws.sample(range(4), count)), draws.sample(range(len(names)), count)
    placed, cells, corners = [], [""] * 4, []
    for where, thing in zip(places, things):
        sprite = sprites[styles.index(style), thing]
        x, y = CELL * (where % 2) + draws.below(CELL - SPRITE + 1), CELL * (where // 2) + draws.below(CELL - SPRITE + 1)
        placed.append((sprite[:, ::-1] if draws.below(2) else sprite, x, y))
        cells[where] = names[thing]
        corners.append((x, y))
    image = _paint(draws, colour, placed)
    four = (cells[0], cells[1], cells[2], cells[3])
    questions = _ask(draws, four, colour)
    return Scene(image, questions, f"{split}-{seed}-{index}", style, colour, four, tuple(corners))


def rows(split: str, images: int, questions_per_image: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Dataset rows: `image`, `image_id`, `question`, `answer`, `tags` (`kind` and `style`).

    Of a scene's questions those are taken whose kind has been asked least so far (yes and no count as two kinds), so
    that the kinds are balanced over the split and yes is as frequent as no.
    """
    asked: dict[tuple[str, str], float] = {}
    for index in range(images):
        made = scene(split, index, seed)
        left = list(made.questions)
        for _ in range(min(questions_per_image, len(left))):
            best = min(left, key=lambda q: (asked.get((q.kind, ""), 0), asked.get((q.kind, q.answer), 0)))
            left.remove(best)
            asked[best.kind, ""] = asked.get((best.kind, ""), 0) + 1
            if best.kind == "exists":
                asked[best.kind, best.answer] = asked.get((best.kind, best.answer), 0) + 1
            yield {
                "image": made.image,
                "image_id": made.image_id,
                "question": best.question,
                "answer": best.answer,
                "tags": {"kind": best.kind, "style": made.style},
            }
