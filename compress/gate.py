"""Gates: what a stage may lose, and what happens when it lost more.

A gate in a recipe::

    gate: {metric: exact_match, max_drop: 0.01, on_fail: retry}

or on the command line: ``--gate "exact_match max_drop=0.01 on_fail=retry"``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .base import Json
from .errors import RecipeError, did_you_mean

# scores that a data set may have of its own (calib/metrics/scores.py has the functions), and their titles
SCORES = {"vqa": "VQA accuracy", "anls": "ANLS", "relaxed": "relaxed accuracy", "cider": "CIDEr", "bleu": "BLEU-4"}
# metric -> the bound that it takes: `max_drop` is absolute against the original, `max` is on the value itself
BOUNDS = {"exact_match": "max_drop", "agreement": "max_drop", "kl": "max", "perplexity": "max"} | dict.fromkeys(
    SCORES, "max_drop"
)
ON_FAIL = ("stop", "skip", "keep", "retry")


@dataclass(frozen=True)
class Gate:
    """One bound on one metric of the check split, measured against the ORIGINAL model.

    Attributes:
        metric: `exact_match`, `agreement`, the data's own score (`anls`, ...; all of these: `max_drop`), `kl` (nats a
            token) or `perplexity` (both: `max`).
        max_drop: largest absolute loss that passes, 0.01 = one point.
        max: largest value that passes.
        on_fail: `stop` restores the stage before and ends with exit code 1; `skip` restores and goes on; `keep` goes on
            with the worse model; `retry` walks the pass's ladder of milder settings until the gate holds, then stops.
    """

    metric: str = "exact_match"
    max_drop: float | None = None
    max: float | None = None
    on_fail: Literal["stop", "skip", "keep", "retry"] = "stop"

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or self.metric not in BOUNDS:
            raise RecipeError(f"gate: unknown metric '{self.metric}'", change=did_you_mean(str(self.metric), BOUNDS))
        if not isinstance(self.on_fail, str) or self.on_fail not in ON_FAIL:
            raise RecipeError(
                f"gate: unknown on_fail '{self.on_fail}'", change=did_you_mean(str(self.on_fail), ON_FAIL)
            )
        need = BOUNDS[self.metric]
        other = "max" if need == "max_drop" else "max_drop"
        value = getattr(self, need)
        if getattr(self, other) is not None or not _is_bound(value):
            raise RecipeError(
                f"gate: {self.metric} takes '{need}', a number of at least 0",
                found=str(self.to_json()),
                change=f"gate: {{metric: {self.metric}, {need}: 0.01}}",
            )

    @classmethod
    def from_json(cls, value: Json, *, where: str = "gate") -> Gate:
        """A gate from a recipe's mapping.

        Raises:
            RecipeError: unknown key, metric or bound.
        """
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, Mapping):
            raise RecipeError(
                "a gate is a mapping",
                where=where,
                found=repr(value),
                change="gate: {metric: exact_match, max_drop: 0.01}",
            )
        known = {f.name for f in dataclasses.fields(cls)}
        for key in value:
            if key not in known:
                raise RecipeError(f"a gate has no key '{key}'", where=where, change=did_you_mean(str(key), known))
        try:
            return cls(**value)
        except RecipeError as error:
            raise RecipeError(error.what, where=where, found=error.found, change=error.change) from error

    @classmethod
    def parse(cls, text: str) -> Gate:
        """A gate from the command line: ``"exact_match max_drop=0.01 on_fail=retry"``."""
        words = text.replace(",", " ").split()
        values: dict[str, Json] = {}
        for word in words:
            key, _, value = word.partition("=")
            if not value:
                values["metric"] = key
                continue
            try:
                values[key] = float(value)
            except ValueError:
                values[key] = value
        return cls.from_json(values, where=f"gate '{text}'")

    def to_json(self) -> dict[str, Json]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def judge(self, quality: Mapping[str, Json]) -> tuple[bool, str]:
        """Whether `quality` (report.json's `quality`) holds the gate, and one sentence that says why.

        Raises:
            RecipeError: it asks for a score that was not measured.
        """
        measured = self._score(quality) if self.metric in SCORES else quality[self.metric]
        if isinstance(measured, Mapping):
            lost, allowed = 0.0 - measured["delta"], self.max_drop
            low, high = (0.0 - 100 * b for b in reversed(measured["ci95"]))
            name = SCORES.get(self.metric, "exact match")
            says = f"{name} lost {100 * lost:.2f} points (95 % interval {low:.2f} to {high:.2f})"
        elif self.metric == "agreement":
            lost, allowed = 1.0 - measured, self.max_drop
            says = f"agreement with the original lost {100 * lost:.2f} points"
        else:
            lost, allowed = measured, self.max
            says = f"{self.metric} is {measured:.4g}"
        assert allowed is not None
        passed = math.isfinite(lost) and lost <= allowed + 1e-9
        bound = f"{100 * allowed:.2f} points" if BOUNDS[self.metric] == "max_drop" else f"{allowed:.4g}"
        return passed, f"{says}, allowed {bound}"

    def _score(self, quality: Mapping[str, Json]) -> Json:
        measured = quality.get("score") or {"name": "exact_match"}
        if measured["name"] != self.metric:
            raise RecipeError(
                f"the gate asks for {self.metric}, which was not measured",
                found=f"the data's score is {measured['name']}",
                change=f"calibration: {{score: {self.metric}}}, or --score {self.metric}",
            )
        return measured


def _is_bound(value: Json) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
