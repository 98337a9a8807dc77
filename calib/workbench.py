"""The workbench: data and measurement bound to one original model; what `compress.pipeline` asks of it is `Bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..compress.anatomy import ModelView
from ..compress.base import Batches, Context, Json, Progress, Silent, evaluating
from .balance import Balance
from .cost import cost
from .dataset import CalibrationSet
from .encode import Encoder
from .judge import Judge
from .sample import Sample
from .walk import Walk

PROBE_SAMPLES = 4


class Workbench:
    """Fit batches for passes, the judge of the check split, the meter of costs.

    Args:
        original: the model that everything is compared with; lent to passes as the teacher, never changed.
        data: fit and check samples.
        cache_dir: where the original's reference outputs are kept.
        batch_size: samples in a batch, for fitting and for judging.
        latency: whether to time the model at every stage.
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
        self.batch_size = batch_size
        self.encoder = Encoder(original.processor, seq2seq=original.family.seq2seq)
        self.judge = Judge(data.check, self.encoder, original, cache_dir=cache_dir, batch_size=batch_size)
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
        }

    @cached_property
    def fit(self) -> list[Mapping[str, Any]]:
        """The fit split as model-ready batches, the original's own answers where there are none."""
        return list(self.encoder.batches(self.judge.answered(self.data.fit), self.batch_size))

    def context(
        self, view: ModelView, *, seed: int = 0, scratch: Path | None = None, progress: Progress | None = None
    ) -> Context:
        """What a pass may use besides the model."""
        recovery = self._encoded(self.data.recovery) if self.data.recovery is not None else None
        made = _context(view, self.original, self.fit, seed, scratch, progress or self.progress)
        return replace(made, recovery=recovery, source=lambda spec: self._encoded(self.data.other(spec, seed)))

    def rehearsal(self, view: ModelView, teacher: ModelView) -> Context:
        """The same on two samples, for a shrunken copy of the model."""

        def pairs(batch_size: int, start: int) -> Iterator[Mapping[str, Any]]:
            return iter([self._pair] * 2)

        def source(spec: str) -> Batches:
            self.data.other(spec, 0)  # it is there and can be read
            return pairs

        made = _context(view, teacher, [self._pair], 0, None, Silent())
        return replace(made, recovery=pairs if self.data.recovery is not None else None, source=source)

    def measure(
        self, view: ModelView, progress: Progress | None = None
    ) -> tuple[dict[str, Json], list[dict[str, Json]]]:
        """Quality of `view` on the check split against the original, and the answer to every question."""
        measurement = self.judge.measure(view, progress or self.progress)
        return measurement.quality, measurement.items

    def cost(self, view: ModelView, bytes_on_disk: int | None) -> dict[str, Json]:
        """report.json's `cost`."""
        return cost(view, self._sample_batch, bytes_on_disk=bytes_on_disk, latency=self.latency)

    def probe(self, view: ModelView) -> torch.Tensor:
        """Logits `[samples, tokens, vocabulary]` on a few image prompts: what a reloaded model must reproduce."""
        with evaluating(view.model):
            return view.model(**self.probe_batch).logits.float().contiguous()

    @cached_property
    def probe_batch(self) -> dict[str, torch.Tensor]:
        batch = self.encoder.encode(self.judge.answered(self.data.fit[:PROBE_SAMPLES]))
        return {k: v for k, v in batch.items() if k != "labels"}

    @cached_property
    def _sample_batch(self) -> dict[str, torch.Tensor]:
        return self.encoder.encode(self.judge.answered(self.data.fit[:1]))

    @cached_property
    def _pair(self) -> dict[str, torch.Tensor]:
        return self.encoder.encode(self.judge.answered(self.data.fit[:2]))

    def _encoded(self, samples: Callable[[], Iterator[Sample]]) -> Batches:
        """Batches of `samples()`, the original's own answers where there are none."""

        def batches(batch_size: int, start: int) -> Iterator[Mapping[str, Any]]:
            rest = islice(samples(), start * batch_size, None)  # what comes before is neither answered nor encoded
            while chunk := list(islice(rest, batch_size)):
                yield self.encoder.encode(self.judge.answered(chunk))

        return batches


def _context(
    view: ModelView,
    original: ModelView,
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
        with evaluating(original.model):
            yield original

    return Context(fit, walk, teacher, seed, progress, scratch, seconds=seconds)
