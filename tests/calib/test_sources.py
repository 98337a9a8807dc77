"""Every format is read as documented; everything broken is refused with file, row and what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from svlm.calib import sources
from svlm.calib.dataset import CalibrationSet, Sample
from svlm.calib.sample import ImageSource
from svlm.compress.errors import DataError


def draw(path: Path, number: int, size: tuple[int, int] = (8, 8)) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        draw(tmp_path / f"{i}.png", i)
    return tmp_path


def lines(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def pool(spec: Path | str) -> list[Sample]:
    return list(sources.read(spec, fit=8, check=8, seed=0).fit)


def refused(spec: Path | str) -> DataError:
    with pytest.raises(DataError) as caught:
        CalibrationSet.load(spec, fit=2, check=2)
    assert caught.value.exit_code == 2
    return caught.value


GOOD = {"image": "0.png", "question": "what?", "answer": "a"}


def test_rows(folder: Path) -> None:
    file = lines(
        folder,
        {"image": "0.png", "question": " how many? ", "answer": ["2", "two", "2"], "tags": {"kind": "count", "n": 1}},
        "",
        {"id": 7, "image": ["1.png", "2.png"], "question": "same?", "answer": 3},
        {"image": "1.png", "question": "what?"},
    )
    first, second, third = pool(file)
    assert (first.question, first.answers, first.tags) == ("how many?", ("2", "2", "two"), {"kind": "count", "n": "1"})
    assert first.images[0].path == folder / "0.png" and first.where.endswith("rows.jsonl, line 1")
    assert (second.id, second.image_id, second.answers) == ("7", "1.png+2.png", ("3",))
    assert third.answers == () and third.where.endswith("line 4")
    assert third.images[0] is second.images[0]  # decoded once
    assert [p["type"] for p in second.conversation[0]["content"]] == ["image", "image", "text"]


def test_chat_messages(folder: Path) -> None:
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "look:"}, {"type": "image", "image": "0.png"}]},
        {"role": "assistant", "content": "seen"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "too"}]},
    ]
    (sample,) = pool(lines(folder, {"image": "1.png", "messages": chat}))
    assert sample.question == "and this?" and sample.answers == ("too",)
    assert [i.path.name for i in sample.images if i.path] == ["0.png", "1.png"]
    assert [turn["role"] for turn in sample.conversation] == ["system", "user", "assistant", "user"]
    assert sample.conversation[1]["content"] == [{"type": "text", "text": "look:"}, {"type": "image"}]
    plain = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a"}]
    (short,) = pool(lines(folder, {"image": "0.png", "messages": plain}))
    assert short.messages is None and (short.question, short.answers) == ("what?", ("a",))


def test_llava(folder: Path) -> None:
    talk = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "noise"},
        {"from": "human", "value": "which colour?"},
        {"from": "gpt", "value": "all"},
    ]
    rows = [
        {"id": "x", "image": "0.png", "conversations": talk, "model": "someone"},
        {"id": "y", "image": "1.png", "conversations": [{"from": "human", "value": "why?"}]},
        {"id": "z", "conversations": talk[2:]},
    ]
    file = folder / "llava.json"
    file.write_text(json.dumps(rows))
    source = sources.read(file, fit=1, check=1, seed=0)
    first, second, third = source.fit
    assert (first.id, first.question, first.answers, first.messages) == ("x/1", "what is it?", ("noise",), None)
    assert (second.id, second.question, second.answers) == ("x/2", "which colour?", ("all",))
    assert [turn["role"] for turn in second.conversation] == ["user", "assistant", "user"]
    assert (third.id, third.answers) == ("y", ())
    assert "1 rows without an image left out" in source.description


def test_a_folder_of_images_with_captions(folder: Path) -> None:
    (folder / "0.txt").write_text("noise\n\nmany colours\n")
    (folder / "deep").mkdir()
    draw(folder / "deep" / "9.jpg", 9)
    found = {s.id: s for s in pool(folder)}
    assert set(found) == {"0.png", "1.png", "2.png", "3.png", "deep/9.jpg"}
    assert found["0.png"].answers == ("noise", "many colours") and found["1.png"].answers == ()
    assert found["1.png"].question == "Describe the image."
    lines(
        folder, {"file_name": "2.png", "text": "two"}, {"image": "3.png", "caption": ["a", "b"]}, name="captions.jsonl"
    )
    assert [s.answers for s in pool(folder)] == [("two",), ("a", "b")]
    (folder / "captions.jsonl").unlink()
    (folder / "1.txt").write_text("\n")
    assert "1.txt" in refused(folder).where


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(6)]
    table = {
        "image": pictures,
        "question": [f"q{i}?" for i in range(6)],
        "answers": [[{"answer": str(i)}] for i in range(6)],
    }
    features = datasets.Features({
        "image": datasets.Image(), "question": datasets.Value("string"),
        "answers": [{"answer": datasets.Value("string")}],
    })  # fmt: skip
    one = datasets.Dataset.from_dict(table, features=features)
    one.save_to_disk(tmp_path / "one")
    data = CalibrationSet.load(tmp_path / "one", fit=2, check=4)
    assert (len(data.fit), len(data.check)) == (2, 4)
    for s in data.fit + data.check:
        number = int(s.answers[0])
        assert s.question == f"q{number}?" and s.images[0].open().getpixel((0, 0)) == (number, 0, 0)
    both = datasets.DatasetDict({"train": one.select([0, 1, 2]), "test": one.select([2, 3])})
    both.save_to_disk(tmp_path / "both")
    apart = CalibrationSet.load(tmp_path / "both", fit=3, check=2)
    assert {s.answers[0] for s in apart.fit} == {"0", "1", "2"}
    assert [s.answers[0] for s in apart.check] == ["3"] and apart.dropped == 1  # picture 2 is in both tables
    one.remove_columns("question").save_to_disk(tmp_path / "bare")
    assert "image, answers" in refused(tmp_path / "bare").found


def test_a_hub_id_with_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(4)]
    table = datasets.Dataset.from_dict({"image": pictures, "caption": list("abcd")})
    asked = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = CalibrationSet.load("someone/some-data:small@test", fit=2, check=2)
    assert asked == [(("someone/some-data", "small"), {"split": "test"})]
    assert {s.answers[0] for s in data.fit + data.check} == set("abcd")
    assert {s.question for s in data.fit} == {"Describe the image."}

    def fail(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    error = refused("someone/some-data")
    assert "neither a file or folder here nor a dataset" in error.what and "no route" in error.found


def test_easy_vqa() -> None:
    data = CalibrationSet.load("easy-vqa", fit=8, check=16)
    assert (len(data.fit), len(data.check)) == (8, 16)
    assert all(s.image_id.startswith("easy-vqa-train") for s in data.fit)
    assert all(s.image_id.startswith("easy-vqa-test") and s.answers for s in data.check)


@pytest.mark.parametrize(("package", "spec"), [("datasets", "someone/some-data"), ("easy_vqa", "easy-vqa")])
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, package: str, spec: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(spec)
    assert package.replace("_", "-") in error.what and "svlm[data]" in error.change


@pytest.mark.parametrize("spec", ["nothing.jsonl", "demmo", "some/where/else", "images/a.json"])
def test_an_unknown_name_lists_those_that_are_known(spec: str) -> None:
    error = refused(spec)
    assert "no such file" in error.what and spec in error.what and "demo, demo:shifted, easy-vqa" in error.change


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"image": "0.png", "answer": "a"}, "a row without a question"),
        ({"image": "0.png", "question": "  ", "answer": "a"}, "a row without a question"),
        ({"question": "what?", "answer": "a"}, "a row without an image"),
        ({"image": [], "question": "what?"}, "a row without an image"),
        ({"image": {"path": "0.png"}, "question": "what?"}, "an image is a path"),
        ({**GOOD, "answer": {"text": "a"}}, "an answer is a text"),
        ({**GOOD, "answer": " "}, "an accepted answer is empty"),
        ({**GOOD, "tags": ["count"]}, "tags are an object"),
        ({**GOOD, "messages": []}, "either 'question' or 'messages'"),
        ({"image": "0.png", "messages": [{"role": "assistant", "content": "a"}]}, "a row without a question"),
        ({"image": "0.png", "messages": [{"role": "bot", "content": "a"}]}, "a turn has the role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "an image part without a path"),
        ({"image": "0.png", "messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part is a text"),
        ({"image": "0.png", "conversations": [{"from": "you", "value": "?"}]}, "a turn has 'from'"),
        ({"image": "0.png", "conversations": [{"from": "human", "value": "<image><image> ?"}]}, "2 times <image>"),
        ({"image": "0.png", "conversations": [{"from": "human", "value": "<image>"}]}, "a row without a question"),
        ([1, 2], "a row is a JSON object"),
        ("{'image': 0}", "not valid JSON"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(folder: Path, row: Any, what: str) -> None:
    error = refused(lines(folder, GOOD, "", row))
    assert what in error.what
    assert error.where.endswith("rows.jsonl, line 3")


def test_an_unknown_key_is_refused_with_the_one_that_was_meant(folder: Path) -> None:
    error = refused(lines(folder, {"image": "0.png", "qestion": "what?"}))
    assert error.what == "unknown key 'qestion'" and "did you mean 'question'?" in error.change
    error = refused(lines(folder, {"image": "0.png", "captoin": "x"}, name="captions.jsonl").parent)
    assert "did you mean 'caption'?" in error.change


def test_empty_and_foreign_files_are_refused(folder: Path) -> None:
    assert "the file is empty" in refused(lines(folder)).what
    assert "the file is empty" in refused(lines(folder, "[]", name="none.json")).what
    assert "a list of rows" in refused(lines(folder, {"a": 1}, name="object.json")).what
    error = refused(lines(folder, "[", '{"image": 3', "]", name="cut.json"))
    assert error.what == "not valid JSON" and error.where.endswith("cut.json, line 3")
    assert "cannot tell what table.csv is" in refused(lines(folder, "a,b", name="table.csv")).what
    (folder / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    assert "not UTF-8" in refused(folder / "latin.jsonl").what
    (folder / "nothing").mkdir()
    assert "a folder without images" in refused(folder / "nothing").what


def test_a_missing_image_is_refused_with_its_row(folder: Path) -> None:
    error = refused(lines(folder, GOOD, {"image": "lost.png", "question": "q?", "answer": "a"}))
    assert "no such image" in error.what and "lost.png" in error.what
    assert error.where.endswith("rows.jsonl, line 2") and "path" in error.change


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_an_image_that_was_cut_off_is_refused_up_front(folder: Path, suffix: str) -> None:
    draw(folder / f"big.{suffix}", 5, (64, 64))
    whole = (folder / f"big.{suffix}").read_bytes()
    (folder / f"big.{suffix}").write_bytes(whole[: len(whole) // 2])
    error = refused(lines(folder, GOOD, {"image": f"big.{suffix}", "question": "q?", "answer": "a"}))
    assert "cannot read the image" in error.what and error.where.endswith("line 2") and "cut off" in error.change


def test_an_image_that_is_none_is_refused(folder: Path) -> None:
    (folder / "text.png").write_text("not an image")
    assert "cannot read the image" in refused(lines(folder, GOOD, {"image": "text.png", "question": "q?"})).what
    (folder / "empty.png").touch()
    assert "cannot read the image" in refused(lines(folder, GOOD, {"image": "empty.png", "question": "q?"})).what
    (folder / "folder.png").mkdir()
    assert "cannot read the image" in refused(lines(folder, GOOD, {"image": "folder.png", "question": "q?"})).what


def test_every_mode_becomes_rgb_and_upright(tmp_path: Path) -> None:
    Image.new("L", (4, 2), 9).save(tmp_path / "gray.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    rows = [{"image": n, "question": "q?", "answer": "a"} for n in ("gray.png", "turned.jpg")]
    gray, turned = (s.images[0].open() for s in pool(lines(tmp_path, *rows)))
    assert (gray.mode, gray.getpixel((0, 0)), gray.size) == ("RGB", (9, 9, 9), (4, 2))
    assert turned.size == (2, 4)


def test_deep_grey_pictures_keep_their_shades(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    shades = np.asarray(ImageSource(tmp_path / "deep.png").open())
    assert abs(float(shades.mean()) - 127.5) < 1 and shades.max() == 255 and shades.min() == 0
    Image.fromarray(np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match="floating-point"):
        ImageSource(tmp_path / "float.tiff").open()


def test_ten_peoples_answers_stay_ten_and_choose_their_score(folder: Path) -> None:
    people = ["grey", "noise", "noise", "dots", *["noise"] * 6]
    rows = [{"image": f"{i}.png", "question": "what?", "answer": people} for i in range(4)]
    lines(folder, *rows)
    data = CalibrationSet.load(folder / "rows.jsonl", fit=2, check=2)
    assert data.score == "vqa" and data.check[0].answers == (*["noise"] * 8, "grey", "dots"), "the most frequent first"
    assert CalibrationSet.load(folder / "rows.jsonl", fit=2, check=2, score="anls").score == "anls"
    lines(folder, *rows[:3], {**rows[3], "answer": people[:9]})
    scores = {CalibrationSet.load(folder / "rows.jsonl", fit=1, check=3, seed=seed).score for seed in range(6)}
    assert "exact_match" in scores, "not all have ten"
    with pytest.raises(DataError, match="did you mean 'anls'"):
        CalibrationSet.load(folder / "nothing.jsonl", score="anals")
