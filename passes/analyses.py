"""What `svlm verify` can look into beyond the paired comparison, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..calib.attribution import attribute
from ..calib.dataset import CalibrationSet
from ..calib.robustness import QUESTIONS, robustness
from ..calib.workbench import Workbench
from ..compress.anatomy import ModelView
from ..compress.base import Json, Progress
from ..compress.errors import UsageError, did_you_mean

SHIFTED = {"demo": "demo:shifted"}  # data that brings questions of another distribution


def _robustness(bench: Workbench, view: ModelView, data: str | Path, progress: Progress | None) -> dict[str, Json]:
    other = SHIFTED.get(str(data))
    shifted = CalibrationSet.load(other, fit=1, check=QUESTIONS).check if other else ()
    return robustness(bench, view, progress, shifted=shifted)


def _attribution(bench: Workbench, view: ModelView, data: str | Path, progress: Progress | None) -> dict[str, Json]:
    return attribute(bench, view, progress=progress)


def _alignment(bench: Workbench, view: ModelView, data: str | Path, progress: Progress | None) -> dict[str, Json]:
    return bench.alignment(view, progress)


Analysis = Callable[[Workbench, ModelView, str | Path, Progress | None], dict[str, Json]]
ANALYSES: dict[str, Analysis] = {
    "alignment": _alignment,
    "robustness": _robustness,
    "attribution": _attribution,
}


def check(names: Sequence[str]) -> None:
    """Refuse names that no analysis has.

    Raises:
        UsageError: the first such name.
    """
    for name in names:
        if name not in ANALYSES:
            raise UsageError(f"no analysis '{name}'", change=did_you_mean(name, ANALYSES))


def analyse(
    names: Sequence[str], bench: Workbench, view: ModelView, data: str | Path, progress: Progress | None = None
) -> dict[str, Json]:
    """report.json's `analysis`: what each of `names` finds in `view` beside its original."""
    return {name: ANALYSES[name](bench, view, data, progress) for name in names}
