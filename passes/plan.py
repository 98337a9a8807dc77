"""The checks of `svlm plan`: those that a run makes first, without the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..calib.dataset import CalibrationSet
from ..calib.workbench import Workbench
from ..compress.preflight import check_evidence, check_room, foreseen, rehearse
from ..compress.recipe import Recipe
from . import find
from .api import load_view


def checks(model: str, recipe: Recipe, data: str | None, batch_size: int, **options: Any) -> list[str]:
    """What each check found, in words; with `data` every pass is rehearsed on two samples of a shrunken copy.

    Sentences that begin with "careful" are about gates whose evidence the check split is too small for.

    Args:
        options: of loading: rows, trust_remote_code.

    Raises:
        UsageError, WorkFailed: what a run would have met.
    """
    view = load_view(model, **options)
    found = [f"{model} loads, family {view.family.name}"]
    check_room(recipe, view, Path.cwd())
    found.append("disk and memory suffice")
    judges = recipe.calibration.check
    if data is None:
        found.append("no data given (-d), so no pass was rehearsed")
    else:
        c = recipe.calibration
        samples = CalibrationSet.load(data, fit=c.fit, check=c.check, seed=c.seed, score=recipe.score)
        found.append(f"{data}: {len(samples.fit)} questions to fit on, {len(samples.check)} to check, no image in both")
        judges = len(samples.check)
        rehearse(recipe, view, Workbench(view, samples, batch_size=batch_size, latency=False), find, options)
        found.append("every pass ran on two samples of a shrunken copy, which was saved and loaded back equal")
    check_evidence(recipe, judges)
    return found + foreseen(recipe, judges)
