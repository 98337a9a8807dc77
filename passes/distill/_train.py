"""The training loop of distillation: batches, teacher's logits, schedule, the best weights, divergence."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...compress.errors import WorkFailed
from ...compress.runtime.reduce import installed
from ._losses import answer_positions, forward_kl

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView
    from ...compress.base import Progress

Batch = Mapping[str, Any]
CACHE_BYTES = 512 * 2**20  # teacher logits kept in memory
EXPLODED = 3.0  # times the loss of the first steps: diverged
SETTLED = 20  # the first steps
CHECKS = 10  # validations in a run


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


def split(batch: Batch, size: int) -> list[Batch]:
    """`batch` in runs of at most `size` samples; whole where its tensors do not all have one row a sample."""
    rows = len(batch["labels"])
    tensors = [v for v in batch.values() if isinstance(v, Tensor)]
    if rows <= size or len(tensors) < len(batch) or any(len(t) != rows for t in tensors):
        return [batch]
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)]


def held_out(batches: Sequence[Batch], share: float = 0.1) -> tuple[list[Batch], list[Batch]]:
    """(train, validation): evenly spread batches are held out, at least one; of a single batch both are that one."""
    if len(batches) < 2:
        return list(batches), list(batches)
    count = max(1, round(len(batches) * share))
    step = len(batches) / count
    chosen = {int(i * step + step / 2) for i in range(count)}
    rest = [b for i, b in enumerate(batches) if i not in chosen]
    return rest, [batches[i] for i in sorted(chosen)]


def epochs(batches: Sequence[Batch], seed: int) -> Iterator[Batch]:
    """The batches without end, in a new order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def endless(source: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    """`source()` again and again.

    Raises:
        WorkFailed: it yields nothing.
    """
    while True:
        empty = True
        for batch in source():
            empty = False
            yield batch
        if empty:
            raise WorkFailed("the recovery data has no samples")


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


def rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then a cosine down to 0; `step` counts from 0."""
    rising = max(1, round(steps * warmup)) if warmup > 0 else 0
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass(frozen=True)
class Plan:
    """How to train: AdamW's numbers, its schedule (see `rate`), the temperature of the loss."""

    steps: int
    lr: float
    warmup: float
    weight_decay: float
    temperature: float


@dataclass
class Course:
    """What happened: training losses, validation losses by step, and where it was stopped."""

    losses: list[float] = field(default_factory=list)
    checks: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    diverged_at: int | None = None

    @property
    def best(self) -> tuple[int, float]:
        """(step, validation loss) of the weights that were kept; of equal ones the first."""
        return min(self.checks.items(), key=lambda item: item[1])


def train(
    view: ModelView,
    teacher: Teacher,
    parameters: Sequence[nn.Parameter],
    batches: Iterator[Batch],
    validation: Sequence[Batch],
    plan: Plan,
    progress: Progress,
) -> Course:
    """Train `parameters` in place; they end as those that validated best, the untrained ones included."""
    course, steps, temperature = Course(), plan.steps, plan.temperature
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay)

    def check() -> float:
        with torch.no_grad():
            losses = [forward_kl(answer_logits(view, batch), teacher(batch), temperature) for batch in validation]
        return float(torch.stack(losses).mean())

    course.checks[0] = least = check()
    if not math.isfinite(least):
        raise WorkFailed("the model's answers are not finite before any training", found=f"KL {least}")
    best = [p.detach().clone() for p in parameters]
    every, settled = max(1, steps // CHECKS), max(SETTLED, round(steps * plan.warmup))
    progress.start("distill", steps)
    smooth = start = 0.0
    for step in range(steps):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * rate(step, steps, plan.warmup)
        with torch.enable_grad():
            logits = answer_logits(view, batch)
            loss = forward_kl(logits, teacher(batch), temperature)
        value = float(loss.detach())
        course.losses.append(value)
        course.tokens += len(logits)
        smooth = value if step == 0 else 0.9 * smooth + 0.1 * value
        start = max(start, smooth) if step < settled else start
        if not math.isfinite(value) or (step >= settled and smooth > EXPLODED * start):
            course.diverged_at = step
            break
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not bool(torch.isfinite(norm)):
            course.diverged_at = step
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            found = course.checks[step + 1] = check()
            if found < least:
                least, best = found, [p.detach().clone() for p in parameters]
        progress.step(note=f"KL {smooth:.4f}")
    progress.done()
    with torch.no_grad():
        for parameter, kept in zip(parameters, best):
            parameter.copy_(kept)
            parameter.grad = None
    return course
