"""A batch as a model is shown it, with the same samples as its original is shown them.

A pass may have changed what a model is shown (`ModelView.sight`: smaller pictures, fewer visual tokens). Its batches
are then made by its own processor, and those of the original travel with them: questions, answers and the order of the
samples are the same, lengths are not. Whoever asks the original about a batch asks it about `as_original(batch)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Batch = Mapping[str, Any]


class Shown(dict[str, Any]):
    """A batch of a model whose original is shown other tensors for the same samples.

    Attributes:
        original: these tensors.
    """

    def __init__(self, batch: Batch, original: Batch) -> None:
        super().__init__(batch)
        self.original = original


def as_original(batch: Batch) -> Batch:
    """The batch that the original is to be asked about."""
    return batch.original if isinstance(batch, Shown) else batch


def differs(batches: Iterable[Batch]) -> bool:
    """Whether the original is shown other tensors than the model."""
    return any(isinstance(batch, Shown) for batch in batches)
