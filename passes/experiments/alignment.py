"""`svlm experiment alignment`: visual and language embeddings before and after each pass of a recipe.

The passes are applied one after the other in memory, without gates, and after each one the alignment with the original
is measured (calib/alignment.py). What enters the language model, and what its last block returns, is drawn in two
dimensions: the first two principal components of the original's tokens, onto which every stage is projected.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compress.base import Json, Progress, Silent
from ...compress.families import Family
from ...compress.recipe import Recipe
from . import _figures as figures

if TYPE_CHECKING:
    from torch import Tensor

    from ...calib.workbench import Workbench
    from ...compress.anatomy import ModelView

POINTS = 150  # tokens of each kind in a picture
PLACES = ("enters the language model", "leaves its last block")
CURVES = {
    "cka_text": "CKA with the original, text",
    "cka_visual": "CKA with the original, visual",
    "between_knn": "visual against text: shared neighbours",
    "mir": "visual against text: MIR of the block",
}


def alignment(
    model: str | Path,
    recipe: Recipe,
    data: str | Path,
    folder: Path,
    *,
    batch_size: int = 32,
    rows: Sequence[Family] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Json]:
    """Apply `recipe` and measure after each pass.

    Returns:
        stages, the original first: name, settings, exact_match and kl (of the check split; the original's own kl is 0),
        alignment (calib/alignment.py), points {place: {kind: [[x, y], ...]}}; says: sentences. Also in `folder`.
    """
    from ...compress.pipeline import apply_pass
    from ..api import environment
    from ._pair import pair

    told, c = progress or Silent(), recipe.calibration
    bench, small = pair(
        model, data, c, batch_size=batch_size, rows=rows, trust_remote_code=trust_remote_code, progress=told
    )
    drawing = _Drawing()
    stages: list[dict[str, Json]] = []
    for number, step in enumerate([None, *(s.step for s in recipe.steps)]):
        if step is not None:
            apply_pass(step, small, bench.context(small, seed=c.seed), where=f"step {number}")
        quality, _ = bench.baseline(told) if step is None else bench.measure(small, told)
        stages.append(
            {
                "name": "original" if step is None else f"{number} {step.name}",
                "settings": {} if step is None else step.settings(),
                "exact_match": quality["exact_match"]["value"],
                "kl": quality["kl"],
                "alignment": bench.alignment(small, told),
                "points": drawing.points(small, bench, "" if step is None else step.name),
            }
        )
    made: dict[str, Json] = {
        "experiment": "alignment",
        "model": str(bench.original.source),
        "recipe": recipe.to_json(),
        "data": bench.info,
        "environment": environment(),
        "stages": stages,
        "says": [*_says(stages), *drawing.says],
    }
    figures.leave(made, folder, alignment=_curves(stages), **{"alignment-embeddings": _embeddings(stages)})
    return made


class _Drawing:
    """Tokens in the plane of the original's first two principal components, at both places."""

    def __init__(self) -> None:
        self._planes: dict[str, tuple[Tensor, Tensor]] = {}
        self.says: list[str] = []

    def points(self, view: ModelView, bench: Workbench, name: str) -> dict[str, Json]:
        from ...calib.alignment import INPUT, KINDS, collect, questions

        speech = bench.speaking(view)
        blocks = [unit for unit in view.parts.get("language", ()) if unit.index is not None]
        samples = questions(bench.data.check)
        size = speech.batch_size
        batches = [speech.encode(samples[i : i + size]) for i in range(0, len(samples), size)]
        states = collect(view, batches, blocks[-1:], POINTS, alike=True, entering=True)
        found: dict[str, Json] = {}
        for place, key in zip(PLACES, (INPUT, blocks[-1].name if blocks else "")):
            if key in states:
                sets = {kind: states[key].of(kind) for kind in KINDS}
                found[place] = {kind: rows.tolist() for kind, rows in self._flat(name, place, sets).items()}
        return found

    def _flat(self, name: str, place: str, sets: dict[str, Tensor]) -> dict[str, Tensor]:
        import torch

        rows = torch.cat(list(sets.values()))
        if place not in self._planes or len(self._planes[place][0]) != rows.shape[1]:
            if place in self._planes:
                self.says.append(
                    f"What {place} has {rows.shape[1]} channels after {name}: its picture has axes of its own."
                )
            mean = rows.mean(0)
            self._planes[place] = mean, torch.linalg.svd(rows - mean, full_matrices=False).Vh[:2].T
        mean, axes = self._planes[place]
        return {kind: (states - mean) @ axes for kind, states in sets.items()}


def _says(stages: list[dict[str, Any]]) -> list[str]:
    first, last = stages[0]["alignment"], stages[-1]["alignment"]
    said = []
    if first["mir"] is not None and last["mir"] is not None:
        said.append(
            f"Modality Integration Rate {last['reference_mir']:.3f} before and {last['mir']:.3f} after the last pass, "
            "over the blocks that both have; lower is better."
        )
    steps = [(stage["alignment"]["cka"], stage["name"]) for stage in stages if stage["alignment"]["cka"] is not None]
    falls = [(after[0] - before[0], after[1]) for before, after in pairwise(steps)]
    if falls:
        fall, name = min(falls)
        said.append(f"Mean CKA with the original falls most at {name}: by {-fall:.3f}.")
    return said


def table(made: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells: a stage a row."""
    cells = []
    for stage in made["stages"]:
        found = stage["alignment"]
        keys = ("cka", "mutual_knn", "mir", "reference_mir", "cosine", "reference_cosine")
        figures_of = ["–" if found[key] is None else f"{found[key]:.3f}" for key in keys]
        cells.append([stage["name"], f"{100 * stage['exact_match']:.1f} %", f"{stage['kl']:.4f}", *figures_of])
    return ["stage", "exact match", "KL", "CKA", "k-NN", "MIR", "original's", "cosine", "original's"], cells


def _curves(stages: list[dict[str, Any]]) -> Any:
    figure, panels = figures.empty(2, 2, 9.5, 6)
    names = [row["origin"] for row in stages[0]["alignment"]["blocks"]]
    short = [name.replace("blocks[", "").replace("]", "").replace(".", " ") for name in names]
    for axes, (key, title) in zip(panels, CURVES.items()):
        for number, stage in enumerate(stages):
            if key.startswith("cka") and not number:
                continue  # the original against itself
            by_origin = {row["origin"]: row[key] for row in stage["alignment"]["blocks"]}
            figures.curve(axes, number, range(len(names)), [by_origin.get(name) for name in names], stage["name"])
        axes.set_xticks(range(len(names)), short, rotation=35, ha="right")
        figures.titled(axes, title)
    figures.legend(panels[2])
    return figure


def _embeddings(stages: list[dict[str, Any]]) -> Any:
    figure, panels = figures.empty(2, len(stages), 0.6 + 2.2 * len(stages), 4.8)
    for line, place in enumerate(PLACES):
        for column, stage in enumerate(stages):
            axes = panels[line * len(stages) + column]
            for number, (kind, points) in enumerate(stage["points"].get(place, {}).items()):
                colour, marker, _ = figures.SERIES[number]
                axes.scatter(
                    [p[0] for p in points], [p[1] for p in points], s=9, color=colour, marker=marker, alpha=0.55,
                    linewidths=0, label=kind,
                )  # fmt: skip
            every = [p for s in stages for kind in s["points"].get(place, {}).values() for p in kind]
            axes.set_xlim(*_limits([x for x, _ in every]))  # one scale for all stages
            axes.set_ylim(*_limits([y for _, y in every]))
            axes.set_xticks([])
            axes.set_yticks([])
            figures.titled(axes, "" if line else stage["name"], y="" if column else place)
    figures.legend(panels[0])
    return figure


def _limits(ends: Sequence[float]) -> tuple[float, float]:
    """Of an axis, with a little room around what lies on it."""
    room = 0.04 * (max(ends) - min(ends)) if ends else 1.0
    return min(ends, default=0.0) - room, max(ends, default=0.0) + room
