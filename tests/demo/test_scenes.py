"""The demo's data: the same bytes everywhere, disjoint splits, balanced questions, answers that are true."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from svlm.calib.demo import KINDS, SHIFTED_STYLES, SPLITS, easy_vqa_rows, rows, scene
from svlm.calib.demo.scenes import COLOURS, PLACES, atlas

# of the first eight scenes of the check split: pictures and texts; it changes only when the data is meant to change
FINGERPRINT = "8a620712813358c36ea8edfebabc2f835425f26bc06f6f1ede6f9665f1a1dadc"


def fingerprint(split: str, seed: int = 0) -> str:
    digest = hashlib.sha256()
    for index in range(8):
        made = scene(split, index, seed)
        digest.update(made.image.tobytes())
        digest.update(repr(made.questions).encode())
    return digest.hexdigest()


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert fingerprint("check") == fingerprint("check") == FINGERPRINT


def test_splits_and_seeds_share_no_picture() -> None:
    pictures = [scene(split, i, seed).image.tobytes() for split in SPLITS for seed in (0, 1) for i in range(20)]
    assert len(set(pictures)) == len(pictures)


def test_only_the_shifted_split_uses_its_styles() -> None:
    for split in SPLITS:
        styles = {scene(split, i).style for i in range(30)}
        assert styles <= set(SHIFTED_STYLES) if split == "shifted" else not styles & set(SHIFTED_STYLES)


def test_the_atlas_holds_every_name_in_every_style() -> None:
    styles, names, sprites = atlas()
    assert sprites.shape == (6, len(names), 40, 40, 4) and len(styles) == 6
    assert (sprites[..., 3].reshape(6, len(names), -1) > 128).mean(-1).min() > 0.04  # none is empty
    assert len({sprite.tobytes() for sprite in sprites.reshape(-1, 40, 40, 4)}) > 0.98 * 6 * len(names)


def test_kinds_and_yes_are_balanced() -> None:
    asked = list(rows("check", 200, 3))
    kinds = Counter(row["tags"]["kind"] for row in asked)
    assert len(asked) == 600 and set(kinds) == set(KINDS)
    assert max(kinds.values()) - min(kinds.values()) <= 2
    said = Counter(row["answer"] for row in asked if row["tags"]["kind"] == "exists")
    assert abs(said["yes"] - said["no"]) <= 2


@pytest.mark.parametrize("index", range(20))
def test_answers_are_true(index: int) -> None:
    made = scene("check", index)
    present = {thing: PLACES[i] for i, thing in enumerate(made.cells) if thing}
    assert len(present) == sum(map(bool, made.cells)) == len(made.corners)
    for q in made.questions:
        words = q.question.replace("?", "").replace(".", "").split()
        subject = words[-1]
        if q.kind == "exists":
            assert (q.answer == "yes") == any(thing in words for thing in present)
        elif q.kind == "place":
            assert present[subject] == q.answer
        elif q.kind == "name":
            assert present[q.answer] in q.question
        elif q.kind == "count":
            assert q.answer == str(len(present))
        elif q.kind == "colour":
            assert q.answer == made.colour
        else:
            there, here = present[q.answer].split(), present[subject].split()
            side = next(word for word in ("above", "below", "left", "right") if word in words)
            assert there[0 if side in ("above", "below") else 1] == {"above": "top", "below": "bottom"}.get(side, side)
            assert sum(a != b for a, b in zip(here, there)) == 1


def test_the_background_has_the_colour_that_is_asked_for() -> None:
    for index in range(30):
        made = scene("check", index)
        empty = [i for i, thing in enumerate(made.cells) if not thing]
        if empty:
            x, y = 48 * (empty[0] % 2), 48 * (empty[0] // 2)
            mean = np.asarray(made.image)[y : y + 48, x : x + 48].reshape(-1, 3).mean(0)
            nearest = min(COLOURS, key=lambda c: float(np.abs(mean - COLOURS[c]).sum()))
            assert nearest == made.colour


def test_rows_are_reproducible_and_named() -> None:
    first, second = (list(rows("fit", 10, 4, seed=3)) for _ in range(2))
    assert [r["question"] for r in first] == [r["question"] for r in second]
    ids = [r["image_id"] for r in first]
    assert all(a == b or a not in ids[ids.index(b) :] for a, b in pairwise(ids)) and len(set(ids)) == 10
    assert first[0]["image"].size == (96, 96) and first[0]["image"].mode == "RGB"


def test_easy_vqa_rows() -> None:
    pytest.importorskip("easy_vqa")
    some = list(easy_vqa_rows("test", images=5))
    assert len({row["image_id"] for row in some}) == 5
    assert all(row["question"] == row["question"].lower() for row in some)
    assert {row["tags"]["kind"] for row in some} <= {"exists", "colour", "shape"}
