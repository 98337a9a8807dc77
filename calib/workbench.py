"""The workbench: data and measurement bound to one original model; what `compress.pipeline` asks of it is `Bench`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..compress.anatomy import ModelView
from ..compress.base import Batches, Context, Json, Progress, Silent, evaluating
from .balance import Balance
from .cost import cost
from .dataset import CalibrationSet
from .metrics.paired import compared
from .speech import Speech
from .walk import Walk


class Workbench:
    """Fit batches for passes, the judge of the check split, the meter of costs.

    Args:
        original: the model that everything is compared with; lent to passes as the teacher, never changed.
        data: fit and check samples.
        cache_dir: where the original's reference outputs are kept.
        batch_size: samples in a batch, for fitting and for judging.
        latency: whether to time the model at every stage.

    Attributes:
        encoder, judge, fit: of the original; `speaking` has those of a model that is asked otherwise.
    """

    def __init__(
        self,
        original: ModelView,
        data: CalibrationSet,
        *,
        cache_dir: Path | None = None,
        batch_size: int = 32,
        latency: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.original, self.data, self.latency = original, data, latency
        self.batch_size, self.cache_dir = batch_size, cache_dir
        self._own = Speech(original, data, original, cache_dir=cache_dir, batch_size=batch_size)
        self._other = self._own
        self.encoder, self.judge = self._own.encoder, self._own.judge
        self.progress = progress or Silent()

    @cached_property
    def info(self) -> dict[str, Json]:
        """report.json's `data`."""
        return {
            "name": self.data.name,
            "description": self.data.description,
            "fit": len(self.data.fit),
            "check": len(self.data.check),
            "fingerprint": self.data.fingerprint,
            "batch_size": self.batch_size,
            "score": self.data.score,
        }

    @property
    def fit(self) -> list[Mapping[str, Any]]:
        """The fit split as model-ready batches, the original's own answers where there are none."""
        return self._own.fit

    def speaking(self, view: ModelView, original: ModelView | None = None) -> Speech:
        """Batches, judge and teacher for `view`: in its token ids, and as its own processor shows it pictures.

        Args:
            original: another model to learn from than the original, asked as it is.
        """
        if original is None:
            for known in (self._own, self._other):
                if known.serves(view):
                    return known
        made = Speech(
            original or self.original,
            self.data,
            view,
            cache_dir=self.cache_dir,
            batch_size=self.batch_size,
            first=self.judge,
        )
        if original is None:  # the last one is kept: a run goes from one way of asking to the next
            self._other = made
        return made

    def context(
        self, view: ModelView, *, seed: int = 0, scratch: Path | None = None, progress: Progress | None = None
    ) -> Context:
        """What a pass may use besides the model."""
        speech = self.speaking(view)
        recovery = speech.encoded(self.data.recovery) if self.data.recovery is not None else None
        made = _context(view, speech, speech.fit, seed, scratch, progress or self.progress)
        return replace(made, recovery=recovery, source=lambda spec: speech.encoded(self.data.other(spec, seed)))

    def rehearsal(self, view: ModelView, teacher: ModelView) -> Context:
        """The same on two samples, for a shrunken copy of the model."""
        speech = self.speaking(view, teacher)
        pair = speech.some(2)

        def pairs(batch_size: int, start: int) -> Iterator[Mapping[str, Any]]:
            return iter([pair] * 2)

        def source(spec: str) -> Batches:
            self.data.other(spec, 0)  # it is there and can be read
            return pairs

        made = _context(view, speech, [pair], 0, None, Silent())
        return replace(made, recovery=pairs if self.data.recovery is not None else None, source=source)

    def measure(
        self, view: ModelView, progress: Progress | None = None
    ) -> tuple[dict[str, Json], list[dict[str, Json]]]:
        """Quality of `view` on the check split against the original, and the answer to every question."""
        measurement = self.speaking(view).judge.measure(view, progress or self.progress)
        return measurement.quality, measurement.items

    def baseline(self, progress: Progress | None = None) -> tuple[dict[str, Json], list[dict[str, Json]]]:
        """The same of the original: what it said when it was asked, compared with itself."""
        measurement = self.judge.baseline(progress or self.progress)
        return measurement.quality, measurement.items

    def alignment(self, view: ModelView, progress: Progress | None = None) -> dict[str, Json]:
        """Alignment of `view` with the original on a few check questions (calib/alignment.py)."""
        from .alignment import alignment, questions

        return alignment(view, self.speaking(view), questions(self.data.check), progress or self.progress)

    def compare(self, before: Sequence[Mapping[str, Json]], after: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
        """Exact match of two models' answers to the check split (`measure`'s items), paired: delta, ci95, mcnemar_p."""
        return compared(before, after)

    def cost(self, view: ModelView, bytes_on_disk: int | None) -> dict[str, Json]:
        """report.json's `cost`."""
        return cost(view, self.speaking(view).some(1), bytes_on_disk=bytes_on_disk, latency=self.latency)

    def probe(self, view: ModelView) -> dict[str, torch.Tensor]:
        """A few image prompts, and their `logits` [samples, tokens, vocabulary]: what a reloaded model reproduces."""
        batch = self.speaking(view).probe_batch
        with evaluating(view.model):
            logits = view.model(**batch).logits.float().contiguous()
        return {k: v.contiguous() for k, v in batch.items()} | {"logits": logits}


def _context(
    view: ModelView,
    speech: Speech,
    fit: list[Mapping[str, Any]],
    seed: int,
    scratch: Path | None,
    progress: Progress,
) -> Context:
    balance = Balance(view, fit, scratch)
    seconds: dict[str, float] = {}

    def walk(where: Any = None, **options: Any) -> Walk:
        return Walk(view, fit, where, scratch=scratch, progress=progress, balance=balance, seconds=seconds, **options)

    @contextmanager
    def teacher() -> Iterator[ModelView]:
        with evaluating(speech.teacher.model):
            yield speech.teacher

    return Context(fit, walk, teacher, seed, progress, scratch, seconds=seconds)
