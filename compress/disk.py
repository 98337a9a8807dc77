"""Files that appear whole or not at all, and what a full or forbidden disk says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .base import Json
from .errors import ModelError, OutputError, WorkFailed


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Write into a temporary sibling; fsync and rename it to `target` when the body ends well, remove it otherwise.

    Raises:
        WorkFailed: the disk is full; nothing of the new folder is left.
    """
    make_folder(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    os.chmod(temporary, 0o755)
    try:
        with disk_errors(target):
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    os.chmod(path, 0o644)
                sync(path)
            sync(temporary)
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
            sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        OutputError: it cannot be made here. WorkFailed: the disk is full.
    """
    with disk_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            raise OutputError(
                "cannot make a folder here",
                where=str(path),
                found=str(error.strerror),
                change="choose a folder that you may write to",
            ) from error


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a temporary sibling; fsync and rename it to `path` when the body ends well, remove it otherwise.

    Raises:
        WorkFailed: the disk is full; what was at `path` before is still there.
    """
    with disk_errors(path):
        make_folder(path.parent)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            sync(temporary)
            temporary.chmod(0o644)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_json(path: Path, value: Json) -> None:
    write_whole(path, json.dumps(value, indent=1, allow_nan=True) + "\n")


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(
    target: Path, change: str = "free some space or choose another --output, then run again with --resume"
) -> Iterator[None]:
    """Turn 'no space left', quota and permission errors into a message that says what to `change`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        text = str(error)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "os error 28" in text:
            free = shutil.disk_usage(_existing(target)).free
            raise WorkFailed(
                "the disk is full; what was finished before is kept",
                where=str(target),
                found=f"{free / 1e6:.1f} MB free",
                change=change,
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(
                "cannot write here", where=str(target), found=text, change="choose a folder that you may write to"
            ) from error
        raise
    except Exception as error:
        if "No space left" in str(error) or "os error 28" in str(error):
            raise WorkFailed(
                "the disk is full; what was finished before is kept", where=str(target), found=str(error)
            ) from error
        raise


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError("cannot read", where=str(path), found=str(error)) from error
