"""Recipes: an ordered list of passes with their gates, and how much data to fit and to check on, in YAML.

::

    calibration: {fit: 256, check: 512, seed: 0}           # score: anls, vqa, ... where the data have one of their own
    gate: {metric: exact_match, max_drop: 0.02}            # the gate of every step that has none of its own
    passes:
      - prune.structured: {ratio: 0.3}
      - quantize.gptq: {bits: 4, group: 64}
        gate: {metric: exact_match, max_drop: 0.01, on_fail: retry}
      - repeat: {times: 2, passes: [prune.structured: {ratio: 0.2}, distill.logits: {steps: 200}]}

Names resolve through the menu that is passed in, never as code paths: a recipe cannot run code of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .base import Json, Pass
from .errors import RecipeError, did_you_mean
from .gate import SCORES, Gate

Menu = Callable[[str], type[Pass]]  # name -> class; raises RecipeError for an unknown name
REPEAT = "repeat: {times: 3, passes: [prune.structured: {ratio: 0.2}, distill.logits: {steps: 200}]}"
DEFAULT_GATE = Gate(metric="exact_match", max_drop=0.02)


@dataclass(frozen=True)
class Calibration:
    """How many questions passes may look at (`fit`), how many judge them (`check`), and the seed of all draws.

    `score` is the data's own: `anls`, ...; None: what the data show for certain, else exact match.
    """

    fit: int = 256
    check: int = 512
    seed: int = 0
    score: str | None = None


@dataclass(frozen=True)
class Step:
    """One pass and its gate (None: measured, never stopped)."""

    step: Pass
    gate: Gate | None = None


@dataclass(frozen=True)
class Recipe:
    """What a pipeline is to do; `to_json` is what report.json and the resume fingerprint hold."""

    steps: tuple[Step, ...]
    calibration: Calibration = field(default_factory=Calibration)
    name: str = "recipe"

    @property
    def score(self) -> str | None:
        """The data's own score: as `calibration` says, or as a gate asks for.

        Raises:
            RecipeError: for two different ones.
        """
        asked = {s.gate.metric for s in self.steps if s.gate and s.gate.metric in SCORES}
        if self.calibration.score is not None:
            asked.add(self.calibration.score)
        if len(asked) > 1:
            raise RecipeError(
                "a run measures one score",
                where=f"{self.name}: calibration and gates",
                found=", ".join(sorted(asked)),
                change="gates on one of them, or on exact_match",
            )
        return next(iter(asked), None)

    def to_json(self) -> dict[str, Json]:
        passes: list[Json] = []
        for s in self.steps:
            gate = None if s.gate is None else s.gate.to_json()
            passes.append({s.step.name: s.step.settings(), "gate": gate})
        return {"name": self.name, "calibration": dataclasses.asdict(self.calibration), "passes": passes}

    @classmethod
    def from_json(cls, value: Json, menu: Menu, *, name: str = "recipe") -> Recipe:
        """Check every key and build the passes.

        Raises:
            RecipeError: naming the step, the key and the nearest known one.
        """
        if not isinstance(value, Mapping):
            raise RecipeError("a recipe is a mapping with the key 'passes'", where=name, found=repr(value)[:80])
        _known(value, {"calibration", "gate", "passes", "name"}, name)
        calibration = _calibration(value.get("calibration", {}), f"{name}: calibration")
        gate: Gate | None = DEFAULT_GATE
        if "gate" in value:
            gate = None if value["gate"] is None else Gate.from_json(value["gate"], where=f"{name}: gate")
        rows = value.get("passes")
        if not isinstance(rows, list) or not rows:
            raise RecipeError(
                "a recipe lists at least one pass",
                where=name,
                found=repr(rows),
                change="passes: [{quantize.gptq: {bits: 4}}]",
            )
        return cls(tuple(_steps(rows, gate, menu, f"{name}: passes")), calibration, str(value.get("name", name)))

    def override(self, assignments: list[tuple[str, str, str]]) -> Recipe:
        """Replace settings: (pass name, key, YAML value), as `-p quantize.gptq:bits=3` gives them, in every such step.

        Raises:
            RecipeError: the recipe has no such pass, or the pass no such setting.
        """
        steps = list(self.steps)
        for name, key, text in assignments:
            hits = [i for i, s in enumerate(steps) if s.step.name == name]
            where = f"-p {name}:{key}={text}"
            if not hits:
                raise RecipeError(
                    f"the recipe has no pass '{name}'",
                    where=where,
                    change=did_you_mean(name, {s.step.name for s in steps}),
                )
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise RecipeError("the value is not YAML", where=where, found=text) from error
            for i in hits:
                settings = steps[i].step.settings() | {key: value}
                steps[i] = Step(type(steps[i].step).from_settings(settings, where=where), steps[i].gate)
        return dataclasses.replace(self, steps=tuple(steps))

    def with_gate(self, gate: Gate) -> Recipe:
        """The same recipe with `gate` on every step."""
        return dataclasses.replace(self, steps=tuple(Step(s.step, gate) for s in self.steps))


def read_recipe(source: str | Path, menu: Menu, shipped: Mapping[str, Path]) -> Recipe:
    """A recipe from a YAML file or by the name of one that ships.

    Raises:
        RecipeError: no such file or name, not YAML, or wrong inside.
    """
    path = shipped.get(str(source), Path(source))
    if not path.is_file():
        raise RecipeError(
            f"no recipe '{source}'", change=f"give a YAML file or a name; {did_you_mean(str(source), shipped)}"
        )
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError("the recipe is not YAML", where=str(source), found=str(error)) from error
    return Recipe.from_json(value, menu, name=path.stem)


def _steps(rows: list[Json], gate: Gate | None, menu: Menu, where: str) -> Iterator[Step]:
    """The steps of a list; ``repeat: {times: 3, passes: [...]}`` stands for its passes three times over."""
    for i, row in enumerate(rows):
        place = f"{where}[{i}]"
        if not isinstance(row, Mapping) or "repeat" not in row:
            yield _step(row, gate, menu, place)
            continue
        inside = row["repeat"]
        if not isinstance(inside, Mapping):
            raise RecipeError("'repeat' is a mapping", where=place, found=repr(inside)[:80], change=REPEAT)
        _known(row, {"repeat", "gate"}, place)
        _known(inside, {"times", "passes"}, f"{place}: repeat")
        times, passes = inside.get("times"), inside.get("passes")
        if type(times) is not int or times < 1:
            raise RecipeError("'times' is a whole number of at least 1", where=place, found=repr(times), change=REPEAT)
        if not isinstance(passes, list) or not passes:
            raise RecipeError("'repeat' lists at least one pass", where=place, found=repr(passes), change=REPEAT)
        once = list(_steps(passes, _own_gate(row, gate, place), menu, f"{place}: repeat: passes"))
        for _ in range(times):
            yield from once


def _own_gate(row: Mapping[str, Json], gate: Gate | None, where: str) -> Gate | None:
    if "gate" not in row:
        return gate
    return None if row["gate"] in (None, False) else Gate.from_json(row["gate"], where=f"{where}: gate")


def _step(row: Json, gate: Gate | None, menu: Menu, where: str) -> Step:
    if isinstance(row, str):
        row = {row: {}}
    if not isinstance(row, Mapping):
        raise RecipeError("a step is 'pass: {settings}'", where=where, found=repr(row))
    names = [k for k in row if k != "gate"]
    if len(names) != 1:
        raise RecipeError(
            "a step names one pass",
            where=where,
            found=", ".join(map(str, row)) or "none",
            change="start a new '-' for each pass",
        )
    name = str(names[0])
    try:
        kind = menu(name)
    except RecipeError as error:
        raise RecipeError(error.what, where=where, found=error.found, change=error.change) from error
    settings = row[names[0]] or {}
    if not isinstance(settings, Mapping):
        raise RecipeError(f"the settings of {name} are a mapping", where=where, found=repr(settings))
    return Step(kind.from_settings(settings, where=f"{where}: {name}"), _own_gate(row, gate, where))


def _calibration(value: Json, where: str) -> Calibration:
    if not isinstance(value, Mapping):
        raise RecipeError(
            "calibration is a mapping", where=where, found=repr(value), change="calibration: {fit: 256, check: 512}"
        )
    _known(value, {f.name for f in dataclasses.fields(Calibration)}, where)
    score = value.get("score")
    if score is not None and score not in (known := ("exact_match", *SCORES)):
        raise RecipeError(f"no score '{score}'", where=where, change=did_you_mean(str(score), known))
    for key, number in value.items():
        if key == "score":
            continue
        if type(number) is not int or number < (0 if key == "seed" else 1):
            raise RecipeError(
                f"'{key}' is a whole number of at least {0 if key == 'seed' else 1}", where=where, found=repr(number)
            )
    return Calibration(**value)


def _known(value: Mapping[str, Json], known: set[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise RecipeError(f"unknown key '{key}'", where=where, change=did_you_mean(str(key), known))
