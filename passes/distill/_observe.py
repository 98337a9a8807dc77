"""What a model makes of a batch: its logits at answer tokens, and what the original makes of it, remembered."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...compress.runtime.reduce import installed
from ._losses import answer_positions

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView

Batch = Mapping[str, Any]
CACHE_BYTES = 512 * 2**20  # of what the teacher said, kept in memory


def answer_logits(view: ModelView, batch: Batch) -> Tensor:
    """The model's logits where they predict an answer token: [answer tokens, vocabulary], row-major over the batch."""
    model: Any = view.model
    where = answer_positions(batch["labels"], shifted=not view.family.seq2seq).to(model.device)
    inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    reduction = installed(model)
    needs_labels = view.family.seq2seq or (reduction is not None and reduction.prompt)
    if needs_labels or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False).logits[where]
    del inputs["labels"]
    tail = where.shape[1] - int(where.any(0).int().argmax())  # the head runs from the first answer on
    logits = model(**inputs, use_cache=False, logits_to_keep=tail).logits
    return logits[:, -tail:][where[:, -tail:]]


def has_answer(view: ModelView, batch: Batch) -> bool:
    return bool(answer_positions(batch["labels"], shifted=not view.family.seq2seq).any())


class Teacher:
    """The original's logits at answer positions; those of batches that come again are kept while there is room."""

    def __init__(self, view: ModelView, again: Sequence[Batch]) -> None:
        self.view, self._again = view, {id(batch) for batch in again}
        self._known: dict[int, Tensor] = {}
        self._room = CACHE_BYTES

    def __call__(self, batch: Batch) -> Tensor:
        known = self._known.get(id(batch))
        if known is not None:
            return known
        with torch.no_grad():
            logits = answer_logits(self.view, batch).float()
        size = logits.numel() * logits.element_size()
        if id(batch) in self._again and size <= self._room:
            self._room -= size
            self._known[id(batch)] = logits
        return logits
