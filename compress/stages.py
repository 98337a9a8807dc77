"""What a run keeps on disk while it works, so that a kill at any instant loses at most the block in progress.

::

    OUT/.svlm/reference/                    what the original model answers, cached by fingerprint
    OUT/.svlm/stages/02-quantize.gptq-1f3a.../applied/model/      the model after the pass, appears whole
                                              applied/apply.json    what `apply` returned
                                              stage.json            the measured stage: the mark that it is finished
                                              items.json            the answer to every check question
    OUT/.svlm/scratch/1f3a.../              the blocks that a pass in progress has finished
    OUT/.svlm/published.json                the files in OUT that are svlm's, so that a later run may replace them

A stage's key is a hash of all that it depends on, chained from stage to stage: a changed recipe, model or data
invalidates what depends on it and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .base import Json, Pass
from .disk import read_json, write_json, write_whole
from .errors import OutputError
from .storage import LEDGER_FILE


def chain(previous: str, *parts: Json) -> str:
    """The key of a stage: sha256 over the key before and everything that the stage depends on."""
    return hashlib.sha256(json.dumps([previous, *parts], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class StageFolder:
    """The files of one attempt at one step."""

    path: Path
    scratch: Path

    @property
    def applied(self) -> Path:
        return self.path / "applied"

    @property
    def model(self) -> Path:
        return self.applied / "model"

    @property
    def probe(self) -> Path:
        return self.applied / "probe.safetensors"

    def is_applied(self) -> bool:
        return (self.applied / "apply.json").is_file()

    def apply_facts(self) -> Any:
        return read_json(self.applied / "apply.json")

    def finished(self) -> Json | None:
        """The stage's report entry if it is finished, else None; an entry or answers that are not whole are none."""
        if not (self.path / "stage.json").is_file():
            return None
        entry = read_json(self.path / "stage.json")
        whole = isinstance(entry, dict) and {"index", "verdict", "quality", "cost"} <= set(entry) and bool(self.items())
        return entry if whole else None

    def items(self) -> list[Any]:
        return read_json(self.path / "items.json")

    def finish(self, stage: Json, items: Json) -> None:
        write_json(self.path / "items.json", items)
        write_json(self.path / "stage.json", stage)
        shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass(frozen=True)
class RunFolder:
    """OUT and its `.svlm`."""

    out: Path

    @property
    def work(self) -> Path:
        return self.out / ".svlm"

    @property
    def reference(self) -> Path:
        return self.work / "reference"

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Make OUT ours, or refuse. Takes nothing away: see `clear`.

        Raises:
            OutputError: OUT exists and is not ours, or holds a run and neither `resume` nor `overwrite` was asked for.
        """
        if (self.out.exists() or self.out.is_symlink()) and not self.out.is_dir():
            raise OutputError("OUT is no folder", where=str(self.out), change="give a folder, or a new name")
        held = list(self.out.iterdir()) if self.out.is_dir() else []
        ours = self.work.is_dir() or (self.out / LEDGER_FILE).is_file()
        if held and not ours:
            raise OutputError(
                "OUT exists and was not made by svlm; it is left as it is",
                where=str(self.out),
                found=", ".join(sorted(p.name for p in held)[:5]),
                change="give another folder, or empty this one",
            )
        if held and not (resume or overwrite):
            raise OutputError(
                "OUT holds an earlier run",
                where=str(self.out),
                change="--resume goes on with it, --overwrite starts afresh",
            )
        write_whole(
            self.work / "README",
            "Stages of an svlm run; --resume needs them. Safe to delete when the run is finished.\n",
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold OUT against other runs; the system lets go when the process ends, however it ends.

        Raises:
            OutputError: another run is at work there.
        """
        lock = FileLock(self.work / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                "another run is at work in OUT", where=str(self.out), change="wait for it, or give another folder"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Forget the stages of an earlier run; what it published stays until it is replaced."""
        for part in ("stages", "scratch", "reference"):
            shutil.rmtree(self.work / part, ignore_errors=True)

    def stage(self, index: int, step: Pass | None, key: str) -> StageFolder:
        label = step.name if step is not None else "baseline"
        return StageFolder(self.work / "stages" / f"{index:02d}-{label}-{key[:16]}", self.work / "scratch" / key[:16])

    def abandon(self) -> None:
        """Leave nothing behind of a run that was refused before its first stage; what an earlier one left stays."""
        if not (self.work / "stages").exists() and not (self.work / "published.json").exists():
            shutil.rmtree(self.work, ignore_errors=True)
            if not any(self.out.iterdir()):
                self.out.rmdir()

    def tidy(self) -> None:
        """Drop what only a resume would need."""
        shutil.rmtree(self.work / "stages", ignore_errors=True)
        shutil.rmtree(self.work / "scratch", ignore_errors=True)
