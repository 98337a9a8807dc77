"""The last step of a run: the last good stage becomes OUT, and a fresh process proves that it loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import Json
from .disk import disk_errors, read_json, sync, write_json
from .errors import WorkFailed
from .stages import RunFolder
from .storage import LEDGER_FILE, weight_bytes

_CHILD = "import sys; from svlm.passes.api import answer_probe; answer_probe(*sys.argv[1:])"


def publish(model: Path, run: RunFolder) -> int:
    """Copy the stage's model folder into OUT; `svlm.json` comes last, as the mark that all is there. Returns the bytes.

    Raises:
        WorkFailed: the disk is full; the stage stays in `.svlm`, so that --resume can publish it later.
    """
    staging = run.work / "publish"
    with disk_errors(run.out):
        shutil.rmtree(staging, ignore_errors=True)
        try:
            shutil.copytree(model, staging)
        except (OSError, shutil.Error):
            shutil.rmtree(staging, ignore_errors=True)
            raise
        for path in sorted(staging.iterdir()):
            sync(path)
        names = sorted((p.name for p in staging.iterdir()), key=lambda name: (name == LEDGER_FILE, name))
        published = run.work / "published.json"
        earlier = [Path(name).name for name in (read_json(published) if published.is_file() else [])]
        (run.out / LEDGER_FILE).unlink(missing_ok=True)
        write_json(published, sorted({*earlier, *names}))
        for stale in {*earlier} - {*names}:  # what an earlier run left; a file of the user's own stays
            (run.out / stale).unlink(missing_ok=True)
        for name in names:
            os.replace(staging / name, run.out / name)
        staging.rmdir()
        sync(run.out)
    return weight_bytes(run.out)


def prove_reload(out: Path, probe: Path, options: Mapping[str, Any]) -> dict[str, Json]:
    """Load OUT in a fresh process and compare its logits on image prompts with those that were in memory.

    Raises:
        WorkFailed: the process ended badly, or the logits differ.
    """
    answer = out / ".svlm" / "reload.json"
    answer.unlink(missing_ok=True)
    root = str(Path(__file__).resolve().parent.parent.parent)
    search = os.pathsep.join([p for p in sys.path if p] + [root])
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": str(options.get("threads", ""))}
    if not options.get("threads"):
        environment.pop("OMP_NUM_THREADS")
    command = [sys.executable, "-c", _CHILD, str(out), str(probe), str(answer)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode != 0 or not answer.is_file():
        raise WorkFailed(
            "the result does not load in a fresh process",
            where=str(out),
            found=child.stderr.strip()[-2000:] or f"exit code {child.returncode}",
        )
    result = read_json(answer)
    answer.unlink()
    if not result["same"]:
        raise WorkFailed("the result loads, but answers otherwise than in memory", where=str(out), found=str(result))
    return {"checked": True, "max_abs_diff": result["max_abs_diff"]}
