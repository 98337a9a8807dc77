"""The data as a model is asked about it, and the original as far as it can be compared with that model.

What a model is shown is what its own processor makes of a sample. `prune.vocabulary` leaves a model with fewer tokens
and ids of its own (`ModelView.vocabulary`): its original is then lent without the same rows, logits of the tokens that
stayed are the original's, their softmax runs over these tokens alone. `tokens.resolution` leaves it with smaller
pictures (`ModelView.sight`): its original is still shown the large ones (`shown`). The answers that are right or wrong
stay those of the whole original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..compress.anatomy import ModelView
from ..compress.base import Batches
from ..compress.mapped import put_away
from ..compress.processors import with_tokens_of
from ..compress.vocabulary import speaking
from .dataset import CalibrationSet
from .encode import Encoder
from .judge import Judge
from .sample import Sample
from .shown import Shown

PROBE_SAMPLES = 4


class Speech:
    """Batches, judge and teacher for models that speak the ids of `view` and are shown what it is shown.

    Args:
        original: what such models are compared with. data: fit and check samples.
        view: one of these models; only its processor, its vocabulary and its sight are used.
        first: the judge of the original with all its tokens; None: `original` and `view` are asked alike.
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
        self.original, self.data, self.vocabulary, self.sight = original, data, view.vocabulary, view.sight
        self.cache_dir, self.batch_size, self.first = cache_dir, batch_size, first
        self.encoder = Encoder(view.processor, seq2seq=view.family.seq2seq)

    def serves(self, view: ModelView) -> bool:
        """Whether `view` is asked in these ids and shown the same."""
        return (view.vocabulary, view.sight) == (self.vocabulary, self.sight)

    @property
    def alike(self) -> bool:
        """Whether the original is shown the same pictures."""
        return self.sight == self.original.sight

    @cached_property
    def teacher(self) -> ModelView:
        """The original, speaking these ids; its own processor shows it pictures as they always were."""
        if self.vocabulary == self.original.vocabulary:
            return self.original
        processor = self.encoder.processor
        if not self.alike:
            processor = with_tokens_of(self.original.processor, processor, self.original.model.config)
        return speaking(self.original, self.vocabulary, processor)

    @cached_property
    def _theirs(self) -> Encoder:
        """Makes the teacher's batches."""
        return self.encoder if self.alike else Encoder(self.teacher.processor, seq2seq=self.original.family.seq2seq)

    @cached_property
    def judge(self) -> Judge:
        return Judge(
            self.data.check,
            self._theirs,
            self.teacher,
            cache_dir=self.cache_dir,
            batch_size=self.batch_size,
            first=self.first,
            shown=self.encoder,
            score=self.data.score,
        )

    def encode(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """One batch of `samples`, those without an answer with the original's own."""
        samples = (self.first or self.judge).answered(samples)
        batch = self.encoder.encode(samples)
        return batch if self.alike else Shown(batch, self._theirs.encode(samples))

    @cached_property
    def fit(self) -> list[Mapping[str, Any]]:
        """The fit split as model-ready batches; large pictures lie in files, read when asked for."""
        (self.first or self.judge).answered(self.data.fit)  # all at once: what is asked is remembered
        starts = range(0, len(self.data.fit), self.batch_size)
        return [_put_away(self.encode(self.data.fit[start : start + self.batch_size])) for start in starts]

    def some(self, count: int) -> dict[str, Any]:
        """The first samples of the fit split as one batch."""
        return self.encode(self.data.fit[:count])

    @cached_property
    def probe_batch(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.some(PROBE_SAMPLES).items() if k != "labels"}

    def encoded(self, samples: Callable[[], Iterator[Sample]]) -> Batches:
        """Batches of `samples()`."""

        def batches(batch_size: int, start: int) -> Iterator[Mapping[str, Any]]:
            rest = islice(samples(), start * batch_size, None)  # what comes before is neither answered nor encoded
            while chunk := list(islice(rest, batch_size)):
                yield self.encode(chunk)

        return batches


def _put_away(batch: dict[str, Any]) -> dict[str, Any]:
    if isinstance(batch, Shown):
        return Shown(_put_away(dict(batch)), _put_away(dict(batch.original)))
    return {key: put_away(value) if isinstance(value, Tensor) else value for key, value in batch.items()}
