"""What training is fed: which batches are held out, and the others without end, from any position on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from ...calib.shown import Shown
from ...compress.errors import WorkFailed

if TYPE_CHECKING:
    from ._observe import Batch

T = TypeVar("T")


def split(batch: Batch, size: int) -> list[Batch]:
    """`batch` in runs of at most `size` samples; whole where its tensors do not all have one row a sample."""
    if isinstance(batch, Shown):
        mine, theirs = split(dict(batch), size), split(batch.original, size)
        return [Shown(a, b) for a, b in zip(mine, theirs)] if len(mine) == len(theirs) else [batch]
    rows = len(batch["labels"])
    tensors = [v for v in batch.values() if isinstance(v, Tensor)]
    if rows <= size or len(tensors) < len(batch) or any(len(t) != rows for t in tensors):
        return [batch]
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)]


def held_out(batches: Sequence[T], share: float = 0.1) -> tuple[list[T], list[T]]:
    """(train, validation): evenly spread batches are held out, at least one; of a single batch both are that one."""
    if len(batches) < 2:
        return list(batches), list(batches)
    count = max(1, round(len(batches) * share))
    step = len(batches) / count
    chosen = {int(i * step + step / 2) for i in range(count)}
    rest = [b for i, b in enumerate(batches) if i not in chosen]
    return rest, [batches[i] for i in sorted(chosen)]


def epochs(batches: Sequence[T], seed: int, start: int = 0) -> Iterator[T]:
    """The batches without end, in a new order each time round, from number `start` on."""
    generator = torch.Generator().manual_seed(seed)

    def numbers() -> Iterator[int]:
        while True:
            yield from torch.randperm(len(batches), generator=generator).tolist()

    return (batches[i] for i in islice(numbers(), start, None))


class Feed(Generic[T]):
    """Batches without end. What comes next follows from `position` alone, so that is all that a resumed run needs.

    Args:
        begin: `begin(n)` starts a round of batches without its first n; where the round ends, another begins.
        usable: batches of which it is false are passed over.

    Raises:
        WorkFailed: (when the next batch is asked for) a whole round holds no usable one.
    """

    def __init__(self, begin: Callable[[int], Iterator[T]], usable: Callable[[T], bool] = lambda _: True) -> None:
        self._begin, self._usable = begin, usable
        self.seek(0)

    def seek(self, position: int) -> None:
        """Go on with the batch after `position` others of a round."""
        self.position, self._round = position, self._begin(position)

    def __next__(self) -> T:
        for _ in range(2):  # what is left of this round, and then a whole one
            for batch in self._round:
                self.position += 1
                if self._usable(batch):
                    return batch
            self.seek(0)
        raise WorkFailed("the recovery data has no samples with an answer")
