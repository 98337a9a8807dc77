"""The data in the token ids that a model speaks, and the original as far as it speaks them.

`prune.vocabulary` leaves a model with fewer tokens and ids of its own. Whatever is measured of it is encoded by its own
processor and compared with the original without the same rows: logits of the tokens that stayed are the original's,
their softmax runs over these tokens alone. The answers that are right or wrong stay those of the whole original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..compress.anatomy import ModelView
from ..compress.base import Batches
from ..compress.vocabulary import speaking
from .dataset import CalibrationSet
from .encode import Encoder
from .judge import Judge
from .sample import Sample

PROBE_SAMPLES = 4


class Speech:
    """Batches, judge and teacher for models that speak the ids of `view`.

    Args:
        original: what such models are compared with. data: fit and check samples.
        view: one of these models; only its processor and its vocabulary are used.
        first: the judge of the original with all its tokens; None: `original` and `view` speak the same.
    """

    def __init__(
        self,
        original: ModelView,
        data: CalibrationSet,
        view: ModelView,
        *,
        cache_dir: Path | None,
        batch_size: int,
        first: Judge | None = None,
    ) -> None:
        self.original, self.data, self.vocabulary = original, data, view.vocabulary
        self.cache_dir, self.batch_size, self.first = cache_dir, batch_size, first
        self.encoder = Encoder(view.processor, seq2seq=view.family.seq2seq)

    @cached_property
    def teacher(self) -> ModelView:
        """The original, speaking these ids."""
        if self.vocabulary == self.original.vocabulary:
            return self.original
        return speaking(self.original, self.vocabulary, self.encoder.processor)

    @cached_property
    def judge(self) -> Judge:
        return Judge(
            self.data.check,
            self.encoder,
            self.teacher,
            cache_dir=self.cache_dir,
            batch_size=self.batch_size,
            first=self.first,
        )

    @cached_property
    def fit(self) -> list[Mapping[str, Any]]:
        """The fit split as model-ready batches, the original's own answers where there are none."""
        samples = (self.first or self.judge).answered(self.data.fit)
        return list(self.encoder.batches(samples, self.batch_size))

    def some(self, count: int) -> dict[str, Tensor]:
        """The first samples of the fit split as one batch."""
        return self.encoder.encode((self.first or self.judge).answered(self.data.fit[:count]))

    @cached_property
    def probe_batch(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.some(PROBE_SAMPLES).items() if k != "labels"}

    def encoded(self, samples: Callable[[], Iterator[Sample]]) -> Batches:
        """Batches of `samples()`, the original's own answers where there are none."""

        def batches(batch_size: int, start: int) -> Iterator[Mapping[str, Any]]:
            rest = islice(samples(), start * batch_size, None)  # what comes before is neither answered nor encoded
            while chunk := list(islice(rest, batch_size)):
                yield self.encoder.encode((self.first or self.judge).answered(chunk))

        return batches
