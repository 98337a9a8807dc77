"""The last step of a run: the last good stage becomes OUT, and a fresh process proves that it loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Json
from .disk import disk_errors, read_json, sync, write_json
from .errors import WorkFailed
from .mapped import worth_mapping
from .stages import RunFolder
from .storage import LEDGER_FILE, weight_bytes

if TYPE_CHECKING:
    import torch

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


def stock_loads(
    out: str, batch: Mapping[str, torch.Tensor], expected: torch.Tensor, tolerance: float, parameters: int
) -> dict[str, Json] | None:
    """Whether stock transformers loads `out` and answers as svlm's own model does; None where memory is short.

    Args:
        batch, expected: a prompt and its logits [samples, tokens, vocabulary]. tolerance: absolute, of a logit.
        parameters: of the model.

    Returns:
        works, and `says`: why not.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    if worth_mapping(parameters):
        return None
    try:
        model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(**batch).logits.float()
    except Exception as error:  # whatever a stock loader raises: it is the answer to the question
        first = (str(error).strip().splitlines() or [""])[0]
        return {"works": False, "says": f"{type(error).__name__}: {first}"[:300]}
    if logits.shape != expected.shape:
        return {"works": False, "says": "it loads another model: its logits have another shape"}
    difference = float((logits - expected).abs().max())
    if not difference <= tolerance:
        return {"works": False, "says": f"it loads another model: logits differ by up to {difference:.3g}"}
    return {"works": True, "says": ""}


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
    return {"checked": True, "max_abs_diff": result["max_abs_diff"], "stock": result["stock"]}
