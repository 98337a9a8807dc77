"""The pipeline: baseline, then for each step requires -> apply -> all promises -> save -> measure -> gate.

Every stage is saved and then loaded back before it is measured, so that what is judged is what is on disk, and a run
that was killed and resumed walks through the very same states as one that was not. `compress.stages` has the folders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from . import __version__
from .anatomy import ModelView
from .base import Context, Json, Notes, Pass, Progress, Silent
from .controls import Items, beside, remarks
from .disk import whole_folder, write_json
from .errors import GateFailed, PromiseBroken, SvlmError, UsageError, WorkFailed
from .recipe import Recipe, Step
from .stages import RunFolder, StageFolder, chain
from .storage import Finder, check_finite, fingerprint, load_model, round_to_storage, save, weight_bytes

SAME_LOGITS = 1e-4  # relative: the weights are the same bits, the order of summation may change with the thread count
ROUNDED_LOGITS = 2e-2  # the same where inputs are rounded: there another order may move one of them by a whole step


class Bench(Protocol):
    """Data and measurement, bound to one original model; calib/workbench.py is the one that ships."""

    @property
    def info(self) -> dict[str, Json]: ...  # report.json's `data`

    def context(self, view: ModelView, *, seed: int, scratch: Path | None, progress: Progress) -> Context: ...

    def rehearsal(self, view: ModelView, teacher: ModelView) -> Context: ...

    def measure(self, view: ModelView, progress: Progress) -> tuple[dict[str, Json], list[dict[str, Json]]]: ...

    def baseline(self, progress: Progress) -> tuple[dict[str, Json], list[dict[str, Json]]]: ...  # of the original

    def compare(self, before: Items, after: Items) -> dict[str, Json]: ...  # answers to the same questions, paired

    def cost(self, view: ModelView, bytes_on_disk: int | None) -> dict[str, Json]: ...

    def probe(self, view: ModelView) -> dict[str, torch.Tensor]: ...  # what was asked, and the `logits`


@dataclass
class Outcome:
    """How a run ended: the report (schema 1), the answers by stage, the folder of the last good stage."""

    report: dict[str, Json]
    items: list[list[dict[str, Json]]]
    model: Path
    error: SvlmError | None = None


@dataclass
class Pipeline:
    """Runs a recipe over a model.

    Attributes:
        recipe: what to do.
        find: the menu, to load saved stages again.
        progress: who is told how far the work is.
        on_stage: called with every finished stage's report entry.
    """

    recipe: Recipe
    find: Finder
    progress: Progress = field(default_factory=Silent)
    on_stage: Callable[[dict[str, Json]], None] = lambda stage: None
    load_options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, original: ModelView, bench: Bench, run: RunFolder) -> Outcome:
        """Run every step, from the last finished stage on. `original` is rounded to the dtype it is saved in, no more.

        Raises:
            UsageError: a pass's `requires` does not hold.
            WorkFailed: weights that are not finite, a stage that does not load back equal, a full disk.
        """
        round_to_storage(original)
        seed = self.recipe.calibration.seed
        key = chain(
            "", fingerprint(original), bench.info, {"svlm": __version__, "torch": torch.__version__, "seed": seed}
        )
        report: dict[str, Json] = {
            "schema": 1,
            "recipe": self.recipe.to_json(),
            "data": bench.info,
            "stages": [],
        }
        folder = run.stage(0, None, key)
        if not folder.is_applied():
            _save_applied(folder, original, bench, {"notes": {}, "seconds": 0.0, "peak_rss_bytes": 0})
        base, items = self._measured(folder, bench, None, 0, None)
        stages, answers = [base], [items]
        report["stages"] = stages
        self.on_stage(base)
        current, error = folder, None
        for index, step in enumerate(self.recipe.steps, start=1):
            entry, items, folder, key, error = self._step(index, step, key, current, bench, run)
            stages.append(entry)
            answers.append(items)
            self.on_stage(entry)
            if error is not None:
                break
            current = folder
        return Outcome(report, answers, current.model, error)

    # -- one step ------------------------------------------------------------------------------------------------------

    def _step(
        self, index: int, step: Step, key: str, before: StageFolder, bench: Bench, run: RunFolder
    ) -> tuple[dict[str, Json], list[dict[str, Json]], StageFolder, str, SvlmError | None]:
        """Try the pass, and milder copies of it where the gate says `retry`, until the gate holds.

        Returns the stage, its answers, the folder that the next step starts from, the key, and what stops the run.
        """
        trial = step.step
        tries: list[dict[str, Json]] = []
        action = step.gate.on_fail if step.gate else "keep"
        while True:
            trial_key = chain(key, trial.name, trial.settings(), step.gate.to_json() if step.gate else None)
            folder = run.stage(index, trial, trial_key)
            entry, items = self._attempt(folder, trial, index, step, before, bench)
            entry["tries"] = tries
            if entry["gate_passed"]:
                entry["verdict"] = "retried" if tries else "passed"
                return entry, items, folder, trial_key, None
            milder = trial.weaker() if action == "retry" else None
            if milder is not None:
                tries = [*tries, _summary(entry)]
                trial = milder
                continue
            if action == "keep" and not entry["broken_promise"]:
                entry["verdict"] = "kept"
                return entry, items, folder, trial_key, None
            if action == "skip":
                entry["verdict"] = "skipped"
                return entry, items, before, chain(key, "skipped", trial_key), None
            entry["verdict"] = "failed"
            return entry, items, before, trial_key, _stopped(entry, index, trial)

    def _attempt(
        self, folder: StageFolder, trial: Pass, index: int, step: Step, before: StageFolder, bench: Bench
    ) -> tuple[dict[str, Json], list[dict[str, Json]]]:
        where = f"step {index} ({trial.name})"
        if folder.finished() is None and not folder.is_applied():
            view = self._load(before.model)
            ctx = bench.context(view, seed=self.recipe.calibration.seed, scratch=folder.scratch, progress=self.progress)
            start, meter = time.perf_counter(), PeakMemory()
            with meter:
                notes = apply_pass(trial, view, ctx, where=where)
            facts = {
                "notes": notes.numbers,
                "seconds": round(time.perf_counter() - start, 3),
                "peak_rss_bytes": meter.peak,
            }
            _, broken = ask_promises(view, self.find)
            if broken:  # such a model is judged as it is and never saved: its weights may fit no format any more
                now = time.perf_counter()
                return self._judged(folder, view, facts, bench, step, index, trial, None, before, now)
            _save_applied(folder, view, bench, facts)
        return self._measured(folder, bench, step, index, trial, before)

    def _measured(
        self,
        folder: StageFolder,
        bench: Bench,
        step: Step | None,
        index: int,
        trial: Pass | None,
        before: StageFolder | None = None,
    ) -> tuple[dict[str, Json], list[dict[str, Json]]]:
        """Load the saved stage, prove that it answers as it did in memory, and judge it."""
        finished = folder.finished()
        if isinstance(finished, dict):
            return finished, folder.items()
        start = time.perf_counter()
        view = self._load(folder.model)
        _same_logits(bench.probe(view)["logits"], folder.probe, f"stage {index}", logits_tolerance(view))
        stored = weight_bytes(folder.model)
        return self._judged(folder, view, folder.apply_facts(), bench, step, index, trial, stored, before, start)

    def _judged(
        self,
        folder: StageFolder,
        view: ModelView,
        facts: Mapping[str, Json],
        bench: Bench,
        step: Step | None,
        index: int,
        trial: Pass | None,
        bytes_on_disk: int | None,
        before: StageFolder | None,
        start: float,
    ) -> tuple[dict[str, Json], list[dict[str, Json]]]:
        """Ask all promises, measure, put the gate's question, and mark the stage finished.

        Validation began at `start` (`time.perf_counter`): with loading the saved stage.
        """
        kept, broken = ask_promises(view, self.find)
        quality, items = bench.measure(view, self.progress) if before else bench.baseline(self.progress)
        passed, says = step.gate.judge(quality) if step and step.gate else (True, "no gate")
        if broken:
            passed, says = False, broken
        controls: list[dict[str, Json]] = []
        if trial and before and (passed or (step and step.gate and step.gate.on_fail == "keep")):
            controls = beside(trial, items, lambda *what: self._instead(before, bench, *what), bench, self.progress)
        notes = dict(facts["notes"])
        if told := remarks(trial.name, quality["exact_match"]["value"], controls) if trial else []:
            notes["remarks"] = [*notes.get("remarks", []), *told]
        costs = bench.cost(view, bytes_on_disk)
        stage: dict[str, Json] = {
            "index": index,
            "pass": trial.name if trial else None,
            "settings": trial.settings() if trial else {},
            "verdict": "baseline",
            "gate": step.gate.to_json() if step and step.gate else None,
            "gate_passed": passed,
            "gate_says": says,
            "seconds": facts["seconds"],
            "seconds_measuring": round(time.perf_counter() - start, 3),
            "peak_rss_bytes": facts["peak_rss_bytes"],
            "quality": quality,
            "cost": costs,
            "promises": kept,
            "broken_promise": broken,
            "notes": notes,
            "controls": controls,
            "tries": [],
        }
        folder.finish(stage, items)
        return stage, items

    def _instead(self, before: StageFolder, bench: Bench, name: str, settings: Mapping[str, Json]) -> ModelView:
        """The stage before with another pass applied, in memory alone."""
        view = self._load(before.model)
        ctx = bench.context(view, seed=self.recipe.calibration.seed, scratch=None, progress=self.progress)
        apply_pass(self.find(name).from_settings(settings), view, ctx, where=f"control {name}")
        return view

    def _load(self, folder: Path) -> ModelView:
        return load_model(folder, find=self.find, **self.load_options)


# ------------------------------------------------------------------------------------------------------- used elsewhere


def apply_pass(step: Pass, view: ModelView, ctx: Context, *, where: str = "") -> Notes:
    """requires, apply, round to storage, ledger: one pass composed by hand. Its own promise is asked at once.

    Raises:
        Unmet: before any weight was touched.
        WorkFailed: the pass left weights that are not finite.
    """
    try:
        step.requires(view, ctx)
    except UsageError as error:
        error.where = error.where or where or step.name
        raise
    ctx.seconds.clear()
    notes = step.apply(view, ctx)
    if ctx.seconds:
        notes.numbers["seconds"] = {what: round(spent, 3) for what, spent in ctx.seconds.items()}
    round_to_storage(view)
    try:
        check_finite(view, where or step.name)
    except UsageError as error:
        raise WorkFailed(
            f"{step.name} left weights that are not finite", where=error.where, found=error.found
        ) from error
    view.ledger.add(step, notes.record)
    try:
        step.ensures(view)
    except PromiseBroken as error:
        raise WorkFailed(f"{step.name} does not keep its own promise", where=where, found=str(error)) from error
    return notes


def logits_tolerance(view: ModelView) -> float:
    """How far the logits of a model may be off when it is loaded again, as a share of the largest."""
    return ROUNDED_LOGITS if view.activations else SAME_LOGITS


def ask_promises(view: ModelView, find: Finder) -> tuple[list[str], str | None]:
    """Ask every pass in the ledger whether its promise still holds: the names that kept it, and the first breach."""
    kept: list[str] = []
    for entry in view.ledger:
        try:
            find(entry.name).from_settings(entry.settings).ensures(view)
        except PromiseBroken as error:
            return kept, f"{entry.name}'s promise is broken: {error}"
        kept.append(entry.name)
    return kept, None


class PeakMemory:
    """Largest resident memory of this process inside the `with`, sampled ten times a second."""

    def __init__(self) -> None:
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        import threading

        self._stop = threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self._process.memory_info().rss)
            if self._stop.wait(0.1):
                return

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


# -------------------------------------------------------------------------------------------------------------- private


def _save_applied(folder: StageFolder, view: ModelView, bench: Bench, facts: Mapping[str, Json]) -> None:
    from safetensors.torch import save_file

    with whole_folder(folder.applied) as temporary:
        save(view, temporary / "model")
        save_file(bench.probe(view), temporary / "probe.safetensors")
        write_json(temporary / "apply.json", facts)


def _same_logits(logits: torch.Tensor, probe: Path, where: str, tolerance: float) -> None:
    from safetensors.torch import load_file

    expected = load_file(probe)["logits"]
    if logits.shape != expected.shape:
        found = f"shapes {tuple(logits.shape)} and {tuple(expected.shape)}"
    else:
        difference, scale = (logits - expected).abs().max().item(), expected.abs().max().item()
        if difference <= tolerance * max(scale, 1.0):
            return
        found = f"largest difference {difference:.3g}, largest logit {scale:.3g}"
    raise WorkFailed("the saved stage does not load back as it was in memory", where=where, found=found)


def _summary(entry: Mapping[str, Json]) -> dict[str, Json]:
    keep = ("settings", "gate_says", "quality", "cost", "seconds", "seconds_measuring", "broken_promise")
    return {k: entry[k] for k in keep} | {"verdict": "failed"}


def _stopped(entry: Mapping[str, Json], index: int, trial: Pass) -> GateFailed | PromiseBroken:
    where = f"step {index} ({trial.name}), settings {trial.settings()}"
    change = "OUT holds the last good stage; try milder settings, 'on_fail: retry' or 'skip', or a wider gate"
    if entry["broken_promise"]:
        return PromiseBroken(
            f"{trial.name} broke an earlier promise", where=where, found=entry["broken_promise"], change=change
        )
    tried = f" after {len(entry['tries']) + 1} tries" if entry["tries"] else ""
    return GateFailed(f"the gate of {trial.name} failed{tried}", where=where, found=entry["gate_says"], change=change)


def describe_steps(recipe: Recipe) -> list[dict[str, Json]]:
    """What a recipe would do, in order, for `svlm plan`."""
    return [
        {
            "index": i,
            "pass": s.step.name,
            "summary": s.step.summary,
            "settings": s.step.settings(),
            "gate": s.gate.to_json() if s.gate else None,
            "ladder": [p.settings() for p in _ladder(s.step)] if s.gate and s.gate.on_fail == "retry" else [],
        }
        for i, s in enumerate(recipe.steps, start=1)
    ]


def _ladder(step: Pass) -> list[Pass]:
    rungs = []
    milder = step.weaker()
    while milder is not None:
        rungs.append(milder)
        milder = milder.weaker()
    return rungs
