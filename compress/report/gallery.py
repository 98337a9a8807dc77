"""Which pictures the report shows, with the answers before and after: those that changed first."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE = 288  # pixels of the longer side: sharp enough at the width of a card
SMALL = 40_000  # bytes: a drawing stays a PNG, a photograph that would take more becomes a JPEG
SHARE = {"right_to_wrong": 5, "wrong_to_right": 2, "changed": 1, "same": 10}


class Picture(Protocol):
    """What an image source of a sample can do."""

    def open(self) -> Image: ...


class Asked(Protocol):
    """What the gallery needs of a check sample."""

    @property
    def id(self) -> str: ...
    @property
    def images(self) -> Sequence[Picture]: ...
    @property
    def question(self) -> str | None: ...
    @property
    def answers(self) -> tuple[str, ...]: ...
    @property
    def tags(self) -> Mapping[str, str]: ...


def gallery_rows(
    samples: Sequence[Asked],
    before: Sequence[Mapping[str, Any]] | None,
    after: Sequence[Mapping[str, Any]],
    *,
    count: int = 10,
) -> list[dict[str, Any]]:
    """Up to `count` samples with a picture, no picture twice; answers that turned wrong first.

    Args:
        samples: the check split.
        before, after: the answers of the original and of the result, dicts with id, image_id, answer, correct. None:
            those that `after` names as reference_answer, reference_correct.

    Returns:
        Rows with image (a data URI), question, reference, before, after, tags, flip.
    """
    if before is None:
        before = [{**i, "answer": i["reference_answer"], "correct": i["reference_correct"]} for i in after]
    old, new = ({item["id"]: item for item in items} for items in (before, after))
    found: dict[str, list[Asked]] = {flip: [] for flip in SHARE}
    for sample in samples:
        if sample.images and sample.id in old and sample.id in new:
            found[_flip(old[sample.id], new[sample.id])].append(sample)
    first = [(flip, s) for flip, share in SHARE.items() for s in found[flip][:share]]
    rest = [(flip, s) for flip, share in SHARE.items() for s in found[flip][share:]]
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for flip, sample in first + rest:
        image_id = old[sample.id]["image_id"]
        if image_id in seen or len(rows) == count:
            continue
        seen.add(image_id)
        answers = sample.answers or (str(old[sample.id]["answer"]),)
        rows.append({
            "image": _data_uri(sample.images[0]),
            "question": sample.question or "",
            "reference": answers[0],
            "before": old[sample.id]["answer"],
            "after": new[sample.id]["answer"],
            "tags": dict(sample.tags),
            "flip": flip,
        })  # fmt: skip
    return rows


def _flip(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if bool(old["correct"]) != bool(new["correct"]):
        return "right_to_wrong" if old["correct"] else "wrong_to_right"
    return "same" if old["answer"] == new["answer"] else "changed"


def _data_uri(source: Picture) -> str:
    picture = source.open().convert("RGB")
    picture.thumbnail((PICTURE, PICTURE))
    kind, data = "png", _encoded(picture, "PNG", optimize=True)
    if len(data) > SMALL:
        kind, data = "jpeg", _encoded(picture, "JPEG", quality=85, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encoded(picture: Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()
