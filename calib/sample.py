"""One question about images, and where its images come from."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..compress.errors import DataError

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on broken files


@dataclass(frozen=True)
class ImageSource:
    """A picture in a file, in memory, or one that a function fetches.

    Attributes:
        path: its file; None where there is no file.
        picture: the picture, or what fetches it anew each time.
        where: the place that named it (file and row), for messages.
    """

    path: Path | None = None
    picture: Image.Image | Callable[[], Image.Image] | None = field(default=None, repr=False, compare=False)
    where: str = ""

    def open(self) -> Image.Image:
        """The whole picture, RGB, turned upright as its EXIF data says.

        Raises:
            DataError: no such file, not an image, or cut off.
        """
        try:
            if self.path is None:
                if self.picture is None:
                    raise DataError("an image source has neither a file nor a picture", where=self.where)
                return _upright(self.picture() if callable(self.picture) else self.picture)
            with Image.open(self.path) as checked:
                checked.verify()  # checksums; the file has to be opened anew afterwards
            with Image.open(self.path) as opened:
                return _upright(opened)
        except FileNotFoundError as error:
            raise DataError(
                f"no such image: {self.path}",
                where=self.where,
                change="correct the path (relative paths start at the folder of the file that names them)",
            ) from error
        except _UNREADABLE as error:
            raise DataError(
                f"cannot read the image {self.path or '(in memory)'}",
                where=self.where,
                found=f"{type(error).__name__}: {error}",
                change="replace the file or remove its row; a file that was cut off has to be copied again",
            ) from error

    @cached_property
    def content(self) -> str:
        """sha256 of size and decoded pixels: equal for every copy of the same picture, whatever its file."""
        picture = self.open()
        return hashlib.sha256(b"%d %d " % picture.size + picture.tobytes()).hexdigest()


def _upright(picture: Image.Image) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd EXIF data and palettes with transparency
        return ImageOps.exif_transpose(_eight_bits(picture)).convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, which Pillow's own conversion would clip to white."""
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture.convert("I"))
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels from {values.min()} to {values.max()}; save it with 8 or 16 bits")
    deep = picture.mode.startswith("I;16") or values.max() > 255
    return Image.fromarray((values // 257 if deep else values).astype(np.uint8))


@dataclass(frozen=True)
class Sample:
    """One question about one or more images.

    Attributes:
        id: unique within a CalibrationSet.
        image_id: equal for all questions about the same picture (or about pictures that occur together).
        images: in the order in which the prompt shows them.
        question: the last thing that the user says.
        answers: accepted answers; the first one is what a model is taught. Empty where nobody gave one.
        tags: for figures by group, like {"kind": "count"}.
        messages: the conversation up to and with the question, in the chat format with ``{"type": "image"}`` parts;
            None for a question alone.
        where: file and row, for messages.
    """

    id: str
    image_id: str
    images: tuple[ImageSource, ...]
    question: str | None
    answers: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None
    where: str = field(default="", compare=False)

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """`messages`; for a question alone a single turn with all images before it."""
        if self.messages is not None:
            return self.messages
        parts: list[dict[str, Any]] = [{"type": "image"} for _ in self.images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.question or ""}]}]
