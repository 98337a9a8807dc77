"""A processor with other settings, made as transformers would: saved, its files edited, loaded again.

What a processor derives from its settings (placeholders, ids, lengths) is then derived anew.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .base import Json
from .errors import Unmet
from .vocabulary import is_id_key

PICTURES = {"preprocessor_config.json": "image_processor", "video_preprocessor_config.json": "video_processor"}


def remade(processor: Any, config: Any, edit: Callable[[Path], None]) -> Any:
    """`processor`, saved, with its files changed by `edit(folder)`, and loaded again.

    Args:
        config: of the model; it names the processor where the processor's own files do not.

    Raises:
        Unmet: stock transformers do not load it.
    """
    from transformers import AutoProcessor

    with tempfile.TemporaryDirectory(prefix="svlm-processor-") as name:
        folder = Path(name)
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        edit(folder)
        try:
            return AutoProcessor.from_pretrained(folder)
        except Exception as error:  # transformers and tokenizers raise many kinds
            raise Unmet("the changed processor does not load", found=f"{type(error).__name__}: {error}") from error


def with_tokens_of(processor: Any, speaker: Any, config: Any) -> Any:
    """`processor` with the tokenizer of `speaker`: pictures as the one makes them, ids as the other does."""

    def edit(folder: Path) -> None:
        told = picture_settings(folder)
        for file in [*folder.glob("*token*"), *folder.glob("vocab*"), *folder.glob("merges*")]:
            file.unlink()
        speaker.save_pretrained(folder / "speaker")
        ids = {k: v for k, v in picture_settings(folder / "speaker").items() if is_id_key(k)}
        write_picture_settings(folder, told | ids)
        speaker.tokenizer.save_pretrained(folder)

    return remade(processor, config, edit)


def picture_settings(folder: Path) -> dict[str, Json]:
    """What a saved processor says besides its tokenizer: its own settings, `image_processor`, `video_processor`."""
    file = folder / "processor_config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, key in PICTURES.items():
        if (folder / name).is_file():
            told[key] = json.loads((folder / name).read_text(encoding="utf-8"))
    return told


def write_picture_settings(folder: Path, told: dict[str, Json]) -> None:
    """The inverse of `picture_settings`."""
    told = dict(told)
    for name, key in PICTURES.items():
        if (folder / name).is_file():
            (folder / name).write_text(json.dumps(told.pop(key)), encoding="utf-8")
    if told:
        (folder / "processor_config.json").write_text(json.dumps(told), encoding="utf-8")
