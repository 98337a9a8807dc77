"""What an experiment on passes begins with: the original on a workbench, and a copy for the passes to change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...calib.dataset import CalibrationSet
from ...calib.workbench import Workbench
from ...compress.anatomy import ModelView
from ...compress.base import Progress
from ...compress.families import Family
from ...compress.recipe import Calibration
from ...compress.storage import round_to_storage
from ..api import load_view


def pair(
    model: str | Path,
    data: str | Path,
    calibration: Calibration,
    *,
    batch_size: int,
    rows: Sequence[Family],
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[Workbench, ModelView]:
    """Both rounded to the dtype that they are stored in, as a run of the pipeline has them."""
    c = calibration
    samples = CalibrationSet.load(data, fit=c.fit, check=c.check, seed=c.seed)
    original, small = (load_view(model, rows=rows, trust_remote_code=trust_remote_code) for _ in range(2))
    round_to_storage(original)
    round_to_storage(small)
    return Workbench(original, samples, batch_size=batch_size, latency=False, progress=progress), small
