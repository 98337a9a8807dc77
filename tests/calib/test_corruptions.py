"""Corruptions: the same picture for everybody, worse with every strength, and what each of them does to its pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from svlm.calib import corruptions as c
from svlm.calib.demo import scene
from svlm.calib.sample import ImageSource, Sample

PICTURE = scene("check", 3).image


def pixels(name: str, strength: int, picture: Image.Image = PICTURE) -> np.ndarray:
    return np.asarray(c.corrupt(picture, name, strength), dtype=np.float64)


@pytest.mark.parametrize("name", list(c.CORRUPTIONS))
def test_the_same_picture_is_made_worse_the_same_way_and_more_so_with_strength(name: str) -> None:
    assert (pixels(name, 3) == pixels(name, 3, PICTURE.copy())).all()
    clean = np.asarray(PICTURE, dtype=np.float64)
    off = [np.abs(pixels(name, strength) - clean).mean() for strength in c.STRENGTHS]
    assert off[0] > 1 and (sorted(off) == off or name == "shift"), "a picture that is moved farther may match better"
    assert c.corrupt(PICTURE, name, 1).size == PICTURE.size and c.corrupt(PICTURE, name, 1).mode == "RGB"


@pytest.mark.parametrize("name", list(c.CORRUPTIONS))
def test_odd_pictures_are_no_error(name: str) -> None:
    for size in ((1, 1), (3, 70), (70, 3)):
        assert c.corrupt(Image.new("RGB", size), name, 5).size == size


def test_other_pictures_get_other_noise() -> None:
    grey = [Image.new("RGB", (32, 32), (level, 127, 127)) for level in (126, 127)]
    noise = [pixels("noise", 1, picture)[..., 1] for picture in grey]
    assert np.abs(noise[0] - noise[1]).mean() > 5


def test_a_stronger_noise_is_more_of_the_same() -> None:
    grey = Image.new("RGB", (64, 64), (127, 127, 127))
    weak, strong = (pixels("noise", strength, grey) - 127 for strength in (1, 2))
    np.testing.assert_allclose(np.clip(weak * c.NOISE[1] / c.NOISE[0], -127, 128), strong, atol=2)


def test_occlusion_covers_its_share_and_what_a_weaker_one_covered() -> None:
    white = Image.new("RGB", (100, 60), (255, 255, 255))
    covered = [pixels("occlusion", strength, white)[..., 0] < 200 for strength in c.STRENGTHS]
    for mask, side in zip(covered, c.OCCLUSION):
        assert mask.mean() == pytest.approx(side**2, abs=0.01)
    for weaker, stronger in itertools.pairwise(covered):
        assert (stronger | ~weaker).mean() > 0.99


def test_shift_moves_the_picture_and_fills_with_its_mean() -> None:
    clean = np.asarray(PICTURE, dtype=np.float64)
    made, move = pixels("shift", 3), round(c.SHIFT[2] * 96)
    found = [
        (dy, dx)
        for dy in (-move, move)
        for dx in (-move, move)
        if (np.roll(clean, (dy, dx), (0, 1))[move:-move, move:-move] == made[move:-move, move:-move]).all()
    ]
    assert len(found) == 1
    row = made[0 if found[0][0] > 0 else -1]
    np.testing.assert_allclose(row, np.broadcast_to(clean.mean((0, 1)), row.shape), atol=0.51)


def test_samples_open_their_worse_pictures_and_keep_all_else() -> None:
    sample = Sample("a", "p", (ImageSource(picture=PICTURE, where="here"),), "what?", ("bear",), {"kind": "name"})
    worse = c.corrupted(sample, "blur", 2)
    assert (worse.id, worse.image_id, worse.question, worse.answers) == ("a", "p", "what?", ("bear",))
    assert (np.asarray(worse.images[0].open()) == pixels("blur", 2)).all()
    assert worse.images[0].where == "here, blur 2"
