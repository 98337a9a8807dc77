"""Gates: what a stage may lose, and what happens when it lost more.

A gate in a recipe::

    gate: {metric: exact_match, max_drop: 0.01, on_fail: retry}

or on the command line: ``--gate "exact_match max_drop=0.01 on_fail=retry"``. Without `confidence` the figure itself is
held against the bound; with it, what the check split proves of the figure (`compress.evidence`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from . import evidence as proof
from .base import Json
from .errors import RecipeError, did_you_mean

# scores that a data set may have of its own (calib/metrics/scores.py has the functions), and their titles
SCORES = {"vqa": "VQA accuracy", "anls": "ANLS", "relaxed": "relaxed accuracy", "cider": "CIDEr", "bleu": "BLEU-4"}
# metric -> the bound that it takes: `max_drop` is absolute against the original, `max` is on the value itself
BOUNDS = {"exact_match": "max_drop", "agreement": "max_drop", "kl": "max", "perplexity": "max"} | dict.fromkeys(
    SCORES, "max_drop"
)
ON_FAIL = ("stop", "skip", "keep", "retry")
WITHOUT_EVIDENCE = ("perplexity", "cider")  # means without an upper end of which no bound is computed
BY_QUESTION = ("exact_match",)  # metrics of which each question is one observation, so that a plan can tell how many


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
        confidence: passes only where the one-sided bound of the loss at this confidence, 0.95 say, is inside as well.
            Where the check split is too small to tell, the gate does not hold and `on_fail` decides as ever.
    """

    metric: str = "exact_match"
    max_drop: float | None = None
    max: float | None = None
    on_fail: Literal["stop", "skip", "keep", "retry"] = "stop"
    confidence: float | None = None

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

        if self.confidence is not None:
            self._check_confidence(value)

    def _check_confidence(self, allowed: float) -> None:
        value = self.confidence
        if value is None or not _is_bound(value) or not 0.5 <= value < 1:
            raise RecipeError("gate: 'confidence' is a number from 0.5 to below 1", found=repr(value), change="0.95")
        if self.metric in WITHOUT_EVIDENCE:
            raise RecipeError(f"gate: {self.metric} takes no 'confidence'", change="a gate on kl or exact_match")
        if allowed == 0:
            raise RecipeError(
                "gate: no number of questions proves a loss of 0",
                found=str(self.to_json()),
                change=f"{BOUNDS[self.metric]}: 0.01, or no confidence",
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
        says = f"{says}, allowed {self._spell(allowed)}"
        if self.confidence is None or not math.isfinite(lost):
            return passed, says
        sure, told = self._proves(quality["evidence"][self.metric], allowed)
        return passed and sure, f"{says}; {told}"

    def _proves(self, evidence: Mapping[str, Json], allowed: float) -> tuple[bool, str]:
        """Whether the evidence suffices that no more than `allowed` was lost, and what it says instead."""
        assert self.confidence is not None
        most = proof.bound(evidence, self.confidence)
        if BOUNDS[self.metric] == "max_drop":
            most = max(most, 0.0)  # that something was gained is nothing that a gate claims
        at = f"{100 * self.confidence:g} % confidence"
        if most <= allowed:
            return True, f"at {at} no more than {self._spell(most)}"
        fewest = proof.bound(evidence, self.confidence, least=True)
        if fewest > allowed:
            return False, f"at {at} more than {self._spell(fewest)}"
        enough = proof.needed(evidence, allowed, self.confidence)
        told = f"at {at} up to {self._spell(most)}: cannot tell with n = {evidence['questions']:,}"
        if enough is None:
            return False, f"{told}, nor with more if they come out alike"
        return False, f"{told}; {proof.rounded(max(enough, evidence['questions'] + 1)):,} needed"

    def _spell(self, value: float) -> str:
        return f"{100 * value:.2f} points" if BOUNDS[self.metric] == "max_drop" else f"{value:.4g}"

    def foresees(self, check: int) -> str | None:
        """What can be said before the run: that `check` questions will not suffice for the proof; None where they may.

        Flips and their clustering are not known yet, those of `compress.evidence` are assumed, of a model that lost
        nothing. Tokens, which agreement and KL count, cannot be foreseen.
        """
        if self.confidence is None or self.metric not in BY_QUESTION:
            return None
        allowed = getattr(self, BOUNDS[self.metric])
        enough = proof.likely(allowed, self.confidence)
        flips = f"{100 * proof.TYPICAL_FLIPS:g} % of the answers flip, half of them each way"
        if enough is None:
            advice = "no number of questions would"
        else:
            advice = f"where nothing is lost and {flips}, check: {proof.rounded(enough)} does in four runs of five"
        claim = f"a loss of at most {self._spell(allowed)} at {100 * self.confidence:g} % confidence"
        if check < proof.least(allowed, self.confidence):
            return f"check: {check} cannot prove {claim} of a model that answers as the original does; {advice}"
        if enough is None or check < enough:
            return f"check: {check} is likely too few to prove {claim}; {advice}"
        return None

    def hopeless(self, check: int) -> bool:
        """Whether so few questions prove the gate of no model but one that got better than the original."""
        if self.confidence is None or self.metric not in BY_QUESTION:
            return False
        return check < proof.least(getattr(self, BOUNDS[self.metric]), self.confidence)

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
