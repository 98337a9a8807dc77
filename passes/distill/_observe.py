"""What a model makes of a batch: logits at answer tokens, hidden states; and the original's, remembered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...calib.stats import Kept, input_masks
from ...compress.errors import WorkFailed
from ...compress.runtime.reduce import installed
from ..quantize._parts import first
from ._losses import answer_positions

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView, Unit
    from ._mapping import Mapped

Batch = Mapping[str, Any]
CACHE_BYTES = 512 * 2**20  # of what the teacher said, kept in memory


def answer_logits(view: ModelView, batch: Batch) -> Tensor:
    """The model's logits where they predict an answer token: [answer tokens, vocabulary], row-major over the batch."""
    model: Any = view.model
    where = answers(view, batch)
    reduction = installed(model)
    needs_labels = view.family.seq2seq or (reduction is not None and reduction.reads_labels)
    if needs_labels or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return all_logits(view, batch)[where]
    tail = where.shape[1] - int(where.any(0).int().argmax())  # the head runs from the first answer on
    inputs = {k: v for k, v in _there(view, batch).items() if k != "labels"}
    logits = model(**inputs, use_cache=False, logits_to_keep=tail).logits
    return logits[:, -tail:][where[:, -tail:]]


def all_logits(view: ModelView, batch: Batch) -> Tensor:
    """The model's logits everywhere: [batch, tokens, vocabulary]."""
    return view.model(**_there(view, batch), use_cache=False).logits


def answers(view: ModelView, batch: Batch) -> Tensor:
    """Where logits predict an answer token: BoolTensor [batch, tokens], where the model is."""
    return answer_positions(batch["labels"], shifted=not view.family.seq2seq).to(view.model.device)


def _there(view: ModelView, batch: Batch) -> dict[str, Any]:
    return {k: v.to(view.model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def has_answer(view: ModelView, batch: Batch) -> bool:
    return bool(answers(view, batch).any())


@dataclass
class Seen:
    """What a model made of a batch.

    Attributes:
        logits: [answer tokens, vocabulary], where they predict an answer token.
        states: what each watched unit returned, one entry a call.
        kept: what a token pass left of the sequence in this forward; see calib/stats.py.
        visual: for each sample the logits at those of its visual tokens that the model sees, [tokens, vocabulary].
    """

    logits: Tensor
    states: list[list[Tensor]] = field(default_factory=list)
    kept: Kept | None = None
    visual: list[Tensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes."""
        tensors = [self.logits, *self.visual, *(state for calls in self.states for state in calls)]
        return sum(t.numel() * t.element_size() for t in tensors)


def observe(view: ModelView, batch: Batch, units: Sequence[Unit] = (), visual: bool = False) -> Seen:
    """Run the model on `batch`; gradients reach back through all that is returned.

    Args:
        units: whose outputs are wanted. visual: whether logits at visual tokens are; the head then runs everywhere.
    """
    seen = Seen(torch.empty(0), [[] for _ in units])

    def watching(into: list[Tensor]) -> Callable[..., None]:
        return lambda module, args, output: into.append(first(output))

    hooks = [unit.module.register_forward_hook(watching(into)) for unit, into in zip(units, seen.states)]
    try:
        whole = all_logits(view, batch) if visual else None
        seen.logits = answer_logits(view, batch) if whole is None else whole[answers(view, batch)]
    finally:
        for hook in hooks:
            hook.remove()
    reduction = installed(view.model)
    seen.kept = reduction.last if reduction else None
    if whole is not None:
        head = next(ref for unit in view.parts["head"] for ref in unit.linears)
        masks = input_masks(view, batch, head, seen.kept)
        assert masks is not None  # of a head
        seen.visual = [row[mask.to(row.device)] for row, mask in zip(whole, masks.vision)]
    return seen


def pair(view: ModelView, batch: Batch, mapped: Mapped, mine: Seen, theirs: Seen, number: int) -> tuple[Tensor, Tensor]:
    """The states of one mapped unit at the same real tokens, [tokens, width] each: the small model's, the original's.

    Args:
        view: the small model. number: of the unit in `states`.

    Raises:
        WorkFailed: the unit does not return a state for each token of the batch.
    """
    last = [ref for ref in mapped.here.linears if ref.role not in ("cross.k", "cross.v")][-1]
    masks = input_masks(view, batch, last, mine.kept)
    here, there = _flat(mine.states[number], mapped.here), _flat(theirs.states[number], mapped.there)
    if mine.kept is not None and last.path.startswith(view.decoder_path + "."):  # the original saw all tokens
        places = mine.kept[0].to(there.device)
        starts = torch.arange(len(places), device=there.device) * (len(there) // len(places))
        there = there[(places + starts[:, None]).flatten()]
    real = torch.ones(len(here), dtype=torch.bool) if masks is None else ~masks.padding.flatten()
    if not len(here) == len(there) == len(real):
        raise WorkFailed(
            "the states of the original and of the small model do not belong to the same tokens",
            where=mapped.here.name,
            found=f"{len(here)} here, {len(there)} in the original, {len(real)} in the batch",
            change="leave this unit out of 'features'",
        )
    here, there = here[real.to(here.device)], there[real.to(there.device)]
    if mapped.channels is not None:
        there = there[:, torch.tensor(mapped.channels, device=there.device)]
    return here, there


def _flat(calls: Sequence[Tensor], unit: Unit) -> Tensor:
    """[tokens, width]: the calls one after the other. Maps [batch, channels, height, width] have tokens of channels."""
    width = unit.linears[-1].module.out_features
    moved = [t.movedim(1, -1) if t.ndim == 4 and t.shape[1] == width else t for t in calls]
    return torch.cat([t.reshape(-1, t.shape[-1]) for t in moved])


class Teacher:
    """What the original makes of a batch; that of batches that come again is kept while there is room.

    Args:
        again: the batches that come more than once. units, visual: of the original; see `observe`.
    """

    def __init__(
        self, view: ModelView, again: Sequence[Batch], units: Sequence[Unit] = (), visual: bool = False
    ) -> None:
        self.view, self._units, self._visual = view, units, visual
        self._again = {id(batch) for batch in again}
        self._known: dict[int, Seen] = {}
        self._room = CACHE_BYTES

    def __call__(self, batch: Batch) -> Seen:
        known = self._known.get(id(batch))
        if known is not None:
            return known
        with torch.no_grad():
            seen = observe(self.view, batch, self._units, self._visual)
        if id(batch) in self._again and seen.size <= self._room:
            self._room -= seen.size
            self._known[id(batch)] = seen
        return seen
