"""Where samples come from: a name, a file, a folder or a hub id.

::

    demo, demo:shifted    made up on the spot, see calib/demo; `shifted` checks on picture styles never trained on
    easy-vqa              the public easy-VQA set: fit from its train split, check from its test split
    rows.jsonl, llava.json    see calib/rows.py
    a folder              images with captions: `a.png` with `a.txt` (one accepted caption a line), or captions.jsonl
    a saved `datasets` folder, or a hub id ``owner/name[:config][@split]``: columns image (or images), question and
                          answer (or answers); fit from `train` and check from `validation` or `test` where there are
                          such splits, else both from the only one
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..compress.errors import DataError
from .rows import CAPTION_QUESTION, Folder, answers_of, caption_samples, file_samples, read_text
from .sample import ImageSource, Sample

NAMES = ("demo", "demo:shifted", "easy-vqa")
DEMO_QUESTIONS = 4  # of one scene
RECOVERY_QUESTIONS = 8
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")
COLUMNS = {"question": ("question", "query"), "answer": ("answers", "answer", "caption", "text")}


@dataclass(frozen=True)
class Source:
    """What a spec names.

    Attributes:
        fit: the pool to draw fit questions from; and check questions, too, where `check` is None.
        check: a pool of its own.
        recovery: starts an endless stream of fresh samples.
        in_order: the pools are random already and are taken from the start.
    """

    description: str
    fit: Iterable[Sample]
    check: Iterable[Sample] | None = None
    recovery: Callable[[], Iterator[Sample]] | None = None
    in_order: bool = False


def read(spec: str | Path, *, fit: int, check: int, seed: int) -> Source:
    """The source that `spec` names; `fit` and `check` say how much of an endless one is needed.

    Raises:
        DataError: nothing of that name, or what is there cannot be read.
    """
    text = str(spec)
    if text in ("demo", "demo:shifted"):
        return _demo("shifted" if text == "demo:shifted" else "check", fit, check, seed)
    if text == "easy-vqa":
        return _easy_vqa()
    path = Path(spec).expanduser()
    if path.is_file():
        return _file(path)
    if path.is_dir():
        saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
        return _saved(path) if saved else _captions(path)
    hub = HUB_ID.fullmatch(text)
    if hub and Path(text).suffix.lower() not in (".json", ".jsonl", ".yaml", ".csv", ".zip", *PICTURES):
        return _hub(hub["name"], hub["config"], hub["split"])
    raise DataError(
        f"no such file or folder: {text}",
        where=f"data {text}",
        change=f"give a .jsonl or .json file, a folder, a hub id (owner/name), or one of the known names: "
        f"{', '.join(NAMES)}",
    )


def _demo(check_split: str, fit: int, check: int, seed: int) -> Source:
    from .demo import rows

    def pool(split: str, count: int) -> list[Sample]:
        return list(_made(rows(split, -(-count // DEMO_QUESTIONS), DEMO_QUESTIONS, seed)))

    def recovery() -> Iterator[Sample]:
        return _made(rows("recovery", sys.maxsize, RECOVERY_QUESTIONS, seed))

    style = "in picture styles never trained on" if check_split == "shifted" else "of the same kind"
    description = f"Made-up scenes, {DEMO_QUESTIONS} questions each; checked on scenes {style}."
    return Source(description, pool("fit", fit), pool(check_split, check), recovery, in_order=True)


def _made(rows: Iterable[dict[str, Any]]) -> Iterator[Sample]:
    """Samples of the demo's rows, in which the questions of one picture stand together."""
    image_id, image, number = "", ImageSource(), 0
    for row in rows:
        if row["image_id"] != image_id:
            image_id, number = row["image_id"], 0
            image = ImageSource(picture=row["image"], where=image_id)
        number += 1
        name = f"{image_id}#{number}"
        yield Sample(name, image_id, (image,), row["question"], (row["answer"],), dict(row["tags"]), None, image_id)


def _easy_vqa() -> Source:
    from .demo import easy

    def pool(split: str) -> Iterator[Sample]:
        try:
            images = easy.read(split)
        except ImportError as error:
            raise _missing("easy-vqa", "easy-vqa", error) from error
        for number, (path, pairs) in images.items():
            image_id = f"easy-vqa-{split}-{number}"
            image = ImageSource(Path(path), where=image_id)
            for k, (question, answer) in enumerate(pairs, 1):
                tags = {"kind": easy.kind(question, answer), "style": "easy-vqa"}
                yield Sample(f"{image_id}#{k}", image_id, (image,), question, (answer,), tags, None, image_id)

    return Source("easy-VQA: one coloured shape a picture; fit from its train, check from its test split.",
                  pool("train"), pool("test"))  # fmt: skip


def _missing(package: str, where: str, error: ImportError) -> DataError:
    return DataError(
        f"this data needs the package {package}",
        where=f"data {where}",
        found=str(error),
        change="pip install 'svlm[data]'",
    )


def _file(path: Path) -> Source:
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(
            f"cannot tell what {path.name} is",
            where=str(path),
            found=f"the suffix '{path.suffix}'",
            change="give a .jsonl file (one row a line), a LLaVA .json file, a folder, or one of the known names: "
            + ", ".join(NAMES),
        )
    samples, without_image = file_samples(path)
    left_out = f" {without_image} rows without an image left out." if without_image else ""
    return Source(f"{len(samples)} questions from {path.name}.{left_out}", samples)


def _captions(path: Path) -> Source:
    listed = path / "captions.jsonl"
    if listed.is_file():
        samples = caption_samples(listed)
        return Source(f"{len(samples)} captions from {path.name}/captions.jsonl.", samples)
    pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    if not pictures:
        raise DataError(
            "a folder without images",
            where=str(path),
            change=f"put images ({', '.join(PICTURES)}) with captions (.txt of the same name, or captions.jsonl) into "
            "it, or give a folder that datasets.save_to_disk wrote",
        )
    folder, samples, without = Folder(path), [], 0
    for picture in pictures:
        text = picture.with_suffix(".txt")
        captions: tuple[str, ...] = ()
        if text.is_file():
            captions = tuple(dict.fromkeys(line.strip() for line in read_text(text).splitlines() if line.strip()))
            if not captions:
                raise DataError("an empty caption", where=str(text), change="write a caption, or remove the file")
        without += not captions
        name = picture.relative_to(path).as_posix()
        samples.append(Sample(name, name, (folder.image(name, name),), CAPTION_QUESTION, captions, {}, None, name))
    missing = f" {without} of them without a caption." if without else ""
    return Source(f"{len(pictures)} images of the folder {path.name}.{missing}", samples)


def _datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _missing("datasets", where, error) from error
    return datasets


def _saved(path: Path) -> Source:
    datasets = _datasets(str(path))
    try:
        return _tables(datasets.load_from_disk(str(path)), path.name)
    except (OSError, ValueError, KeyError) as error:
        raise DataError("cannot read the saved dataset", where=str(path), found=str(error)[:300]) from error


def _hub(name: str, config: str | None, split: str | None) -> Source:
    datasets = _datasets(name)
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise DataError(
            f"'{name}' is neither a file or folder here nor a dataset that can be loaded from the hub",
            where=f"data {name}",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            change=f"correct the path or the id (owner/name:config@split); known names: {', '.join(NAMES)}",
        ) from error
    return _tables(loaded, name)


def _tables(loaded: Any, name: str) -> Source:
    """One table, or a dict of tables by split."""
    if not isinstance(loaded, dict):
        return Source(f"{len(loaded)} rows of the dataset {name}.", _table(loaded, name))
    splits = list(loaded)
    checks = [s for s in ("validation", "val", "test") if s in loaded]
    if len(splits) == 1:
        return Source(f"{len(loaded[splits[0]])} rows of {name}, {splits[0]}.", _table(loaded[splits[0]], name))
    if "train" not in loaded or not checks:
        raise DataError(
            "cannot tell which split to fit on", where=name, found=", ".join(splits), change=f"say {name}@{splits[0]}"
        )
    fit, check = (_table(loaded[split], f"{name}/{split}") for split in ("train", checks[0]))
    return Source(f"The dataset {name}: fit from train, check from {checks[0]}.", fit, check)


def _table(table: Any, name: str) -> list[Sample]:
    columns = table.column_names
    pictures = next((c for c in ("image", "images") if c in columns), None)
    question, answer = (next((c for c in COLUMNS[key] if c in columns), None) for key in ("question", "answer"))
    if pictures is None or (question is None and answer not in ("caption", "text")):
        raise DataError(
            "a dataset needs the columns image, question and answer (or image and caption)",
            where=name,
            found=", ".join(columns),
            change="rename the columns with datasets' rename_column and save_to_disk",
        )
    texts = table.select_columns([c for c in columns if c in (question, answer, "image_id", "id")])
    samples = []
    for i, row in enumerate(texts):
        where = f"{name}, row {i}"
        asked = row[question] if question else CAPTION_QUESTION
        if not isinstance(asked, str) or not asked.strip():
            raise DataError("a row without a question", where=where, found=repr(asked))
        images = tuple(
            ImageSource(picture=partial(_cell, table, i, pictures, k), where=where)
            for k in range(len(table[i][pictures]) if pictures == "images" else 1)
        )
        if not images:
            raise DataError("a row without an image", where=where)
        image_id = str(row.get("image_id", f"{name}/{i}"))
        answers = answers_of(_plain(row.get(answer)), where)
        samples.append(Sample(str(row.get("id", i)), image_id, images, asked.strip(), answers, {}, None, where))
    return samples


def _cell(table: Sequence[Any], row: int, column: str, number: int) -> Image.Image:
    """Picture `number` of a row, decoded anew."""
    value = table[row][column]
    picture = value[number] if isinstance(value, list) else value
    if not isinstance(picture, Image.Image):
        raise ValueError(f"the column '{column}' holds {type(picture).__name__}, not images")
    return picture


def _plain(value: Any) -> Any:
    """Answers as texts, where they are given as objects (VQAv2: {"answer": "yes", "answer_confidence": ...})."""
    if isinstance(value, list):
        return [v.get("answer") if isinstance(v, dict) else v for v in value]
    return value
