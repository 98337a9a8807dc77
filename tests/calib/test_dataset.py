"""CalibrationSet: counts are questions, splits are by picture, draws follow from the seed, doubles are dropped."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from svlm.calib.dataset import PER_IMAGE, CalibrationSet, ImageSource, Sample, fingerprint
from svlm.compress.errors import DataError


def picture(path: Path, number: int) -> Path:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def asked(folder: Path, images: int, questions: int) -> Path:
    rows = []
    for i in range(images):
        picture(folder / f"{i}.png", i)
        rows += [{"image": f"{i}.png", "question": f"q{k}?", "answer": str(k)} for k in range(questions)]
    return write(folder, rows)


def contents(samples: list[Sample]) -> set[str]:
    return {image.content for s in samples for image in s.images}


def test_counts_are_questions_and_no_picture_is_in_both(tmp_path: Path) -> None:
    data = CalibrationSet.load(asked(tmp_path, 12, 3), fit=10, check=20)
    assert (len(data.fit), len(data.check), data.dropped) == (10, 20, 0)
    assert not contents(data.fit) & contents(data.check)
    assert len({s.id for s in data.fit + data.check}) == 30
    assert all(s.images[0].open().mode == "RGB" for s in data.fit)


def test_two_files_with_the_same_picture_are_one_image(tmp_path: Path) -> None:
    rows = []
    for i in range(6):
        for name in (f"{i}.png", f"copy-of-{i}.bmp"):  # another format, the same pixels
            picture(tmp_path / name, i)
            rows.append({"image": name, "question": f"what is {name}?", "answer": "noise"})
    data = CalibrationSet.load(write(tmp_path, rows), fit=6, check=6)
    assert (len(data.fit), len(data.check)) == (6, 6)
    assert not contents(data.fit) & contents(data.check)
    for split in (data.fit, data.check):
        assert len({s.image_id for s in split}) == len(contents(split)) == 3  # the copies share one image_id


def test_a_question_about_pictures_of_both_splits_is_dropped(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "question": "what?", "answer": "x"} for i in range(8)]
    rows += [{"image": ["0.png", f"{i}.png"], "question": "which is darker?", "answer": "y"} for i in range(1, 8)]
    for i in range(8):
        picture(tmp_path / f"{i}.png", i)
    dropped = []
    for seed in range(4):  # pairs and single pictures come in any order
        data = CalibrationSet.load(write(tmp_path, rows), fit=20, check=20, seed=seed)
        assert not contents(data.fit) & contents(data.check)
        assert len(data.fit) + len(data.check) + data.dropped == 15
        for split in (data.fit, data.check):  # pictures that are asked about together have one image_id
            assert all(len({s.image_id for s in split if i in s.images}) <= 1 for s in split for i in s.images)
        assert (f"{data.dropped} questions dropped" in data.description) == bool(data.dropped)
        dropped.append(data.dropped)
    assert any(dropped)


def test_doubles_are_dropped_and_counted(tmp_path: Path) -> None:
    file = asked(tmp_path, 4, 2)
    picture(tmp_path / "again.png", 0)
    again = [{"image": "0.png", "question": "q0?", "answer": "0"}, {"image": "again.png", "question": "q1?"}]
    with file.open("a") as out:
        out.write("".join(json.dumps(row) + "\n" for row in again))
    data = CalibrationSet.load(file, fit=4, check=8)
    assert data.dropped == 2 and len(data.fit) + len(data.check) == 8
    keys = [(s.images[0].content, s.question) for s in data.fit + data.check]
    assert len(keys) == len(set(keys))


def test_too_few_questions_are_shared_in_the_proportion_asked(tmp_path: Path) -> None:
    data = CalibrationSet.load(asked(tmp_path, 30, 1), fit=256, check=512)
    assert (len(data.fit), len(data.check)) == (10, 20)
    assert "Asked for 256 + 512 questions, found 10 + 20." in data.description
    two = CalibrationSet.load(asked(tmp_path, 2, 1), fit=256, check=512)
    assert (len(two.fit), len(two.check)) == (1, 1)


def test_many_questions_of_one_picture_wait_until_others_had_their_turn(tmp_path: Path) -> None:
    file = asked(tmp_path, 8, 10)
    data = CalibrationSet.load(file, fit=16, check=16)
    for split in (data.fit, data.check):
        assert [sum(s.image_id == i for s in split) for i in {s.image_id for s in split}] == [PER_IMAGE] * 4
    more = CalibrationSet.load(file, fit=40, check=40)
    assert (len(more.fit), len(more.check)) == (40, 40)


@pytest.mark.parametrize(("images", "says"), [(1, "zero check samples")])
def test_one_picture_cannot_serve_both_splits(tmp_path: Path, images: int, says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        CalibrationSet.load(asked(tmp_path, images, 50), fit=10, check=10)
    assert "two different pictures" in error.value.change


def test_zero_samples_cannot_be_asked_for() -> None:
    with pytest.raises(DataError, match="zero fit samples"):
        CalibrationSet.load("demo", fit=0, check=8)
    with pytest.raises(DataError, match="zero check samples"):
        CalibrationSet.load("demo", fit=8, check=0)


def test_the_draw_follows_from_the_seed_and_not_from_the_order_of_rows(tmp_path: Path) -> None:
    file = asked(tmp_path, 20, 2)
    one = CalibrationSet.load(file, fit=8, check=8, seed=3)
    assert CalibrationSet.load(file, fit=8, check=8, seed=3).fingerprint == one.fingerprint
    assert CalibrationSet.load(file, fit=8, check=8, seed=4).fingerprint != one.fingerprint
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(lines)))
    turned = CalibrationSet.load(file, fit=8, check=8, seed=3)
    assert contents(turned.fit) == contents(one.fit) and contents(turned.check) == contents(one.check)


def test_the_fingerprint_notices_every_change(tmp_path: Path) -> None:
    a, b = (ImageSource(picture(tmp_path / f"{i}.png", i)) for i in range(2))
    base = Sample("1", "a", (a,), "q?", ("x",), {"kind": "k"})
    changed = [
        Sample("2", "a", (a,), "q?", ("x",), {"kind": "k"}),
        Sample("1", "a", (b,), "q?", ("x",), {"kind": "k"}),
        Sample("1", "a", (a,), "r?", ("x",), {"kind": "k"}),
        Sample("1", "a", (a,), "q?", ("x", "y"), {"kind": "k"}),
        Sample("1", "a", (a,), "q?", ("x",), {"kind": "l"}),
        Sample("1", "a", (a,), "q?", ("x",), {"kind": "k"}, [{"role": "user", "content": []}]),
    ]
    prints = {fingerprint([s], []) for s in [base, *changed]} | {fingerprint([], [base])}
    assert len(prints) == 8


def test_equal_ids_are_told_apart(tmp_path: Path) -> None:
    rows = [{"id": "same", "image": f"{i}.png", "question": "q?", "answer": "x"} for i in range(4)]
    for i in range(4):
        picture(tmp_path / f"{i}.png", i)
    data = CalibrationSet.load(write(tmp_path, rows), fit=2, check=2)
    assert sorted(s.id for s in data.fit + data.check) == ["same", "same~2", "same~3", "same~4"]


def test_the_demo_is_reproducible_balanced_and_grows_at_the_end() -> None:
    data = CalibrationSet.load("demo", fit=16, check=48)
    longer = CalibrationSet.load("demo", fit=16, check=96)
    assert [s.id for s in longer.check[:48]] == [s.id for s in data.check]
    assert [s.question for s in longer.check[:48]] == [s.question for s in data.check]
    assert longer.fit == data.fit and longer.fingerprint != data.fingerprint
    kinds = [s.tags["kind"] for s in longer.check]
    assert {kinds.count(k) for k in set(kinds)} <= set(range(12, 21)) and len(set(kinds)) == 6
    assert not contents(data.fit) & contents(data.check)
    assert {s.image_id.split("-")[0] for s in data.fit} == {"fit"}
    assert {s.image_id.split("-")[0] for s in data.check} == {"check"}
    assert CalibrationSet.load("demo", fit=16, check=48, seed=1).fingerprint != data.fingerprint


def test_the_demo_has_a_shifted_check_split_and_endless_fresh_data() -> None:
    plain = CalibrationSet.load("demo", fit=8, check=16)
    shifted = CalibrationSet.load("demo:shifted", fit=8, check=16)
    assert [s.id for s in shifted.fit] == [s.id for s in plain.fit]
    assert not {s.tags["style"] for s in shifted.check} & {s.tags["style"] for s in plain.check + plain.fit}
    assert plain.recovery is not None
    fresh = list(islice(plain.recovery(), 40))
    assert [s.id for s in islice(plain.recovery(), 40)] == [s.id for s in fresh]
    assert not contents(fresh) & contents(plain.fit + plain.check)
    assert all(s.answers and s.image_id.startswith("recovery") for s in fresh)


def test_other_data_to_train_on_show_no_picture_of_the_check_split(tmp_path: Path) -> None:
    file = asked(tmp_path, 12, 2)
    data = CalibrationSet.load(file, fit=8, check=8, seed=0)
    stream = data.other(str(file), seed=3)
    found = list(stream())
    assert [s.id for s in stream()] == [s.id for s in found]
    assert [s.id for s in data.other(str(file), seed=4)()] != [s.id for s in found]
    assert not contents(found) & contents(data.check)
    everything = contents(list(CalibrationSet.load(file, fit=12, check=12).fit)) | contents(data.fit)
    assert everything - contents(data.check) <= contents(found)
    assert len(found) == 24 - 2 * len(contents(data.check))
    runs = sum(a.image_id == b.image_id for a, b in pairwise(found))
    assert runs < len(found) / 2, "the questions of one picture do not stand together"
    with pytest.raises(DataError, match="no such file"):
        data.other(str(tmp_path / "none.jsonl"), seed=0)
    fresh = data.other("demo", seed=0)
    assert [s.id for s in islice(fresh(), 3)] == [s.id for s in islice(fresh(), 3)]
