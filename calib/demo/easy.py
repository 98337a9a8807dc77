"""easy-VQA as rows: 5,000 pictures of one coloured shape each, with a fixed split (`pip install easy-vqa`).

The demo model is trained on the train split, too, so this is the public data set that it can be measured on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from PIL import Image


def read(split: str) -> dict[int, tuple[str, list[tuple[str, str]]]]:
    """By number of the image: its file, and its (question, answer) pairs in lower case. `split`: "train" or "test"."""
    import easy_vqa

    if split not in ("train", "test"):
        raise ValueError(f"easy-VQA has the splits 'train' and 'test', not {split!r}")
    test = split == "test"
    paths = easy_vqa.get_test_image_paths() if test else easy_vqa.get_train_image_paths()
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in zip(*(easy_vqa.get_test_questions() if test else easy_vqa.get_train_questions())):
        asked[image].append((question.lower(), answer.lower()))
    return {image: (str(paths[image]), asked[image]) for image in sorted(asked)}


def kind(question: str, answer: str) -> str:
    """What is asked for: "exists", "colour" or "shape"."""
    if answer in ("yes", "no"):
        return "exists"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"


def easy_vqa_rows(split: str, images: int | None = None) -> Iterator[dict[str, Any]]:
    """Rows like those of `scenes.rows`; all images of the split, or the first `images`; pictures of 64 px."""
    for number, (image, (path, pairs)) in enumerate(read(split).items()):
        if images is not None and number >= images:
            return
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        for question, answer in pairs:
            yield {
                "image": picture,
                "image_id": f"easy-vqa-{split}-{image}",
                "question": question,
                "answer": answer,
                "tags": {"kind": kind(question, answer), "style": "easy-vqa"},
            }
