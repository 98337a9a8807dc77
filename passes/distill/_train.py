"""The training loop of distillation: schedule, the best weights, divergence, and how a killed one goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn

from ...calib.muon import Muon
from ...compress.errors import WorkFailed

if TYPE_CHECKING:
    from ...compress.base import Json, Progress
    from ._checkpoint import Checkpoint
    from ._feed import Feed

T = TypeVar("T")
EXPLODED = 3.0  # times the loss of the first steps: diverged
NEGLIGIBLE = 0.01  # a loss that small may rise threefold and means nothing
SETTLED = 20  # the first steps
CHECKS = 10  # validations in a run


def rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then a cosine down to 0; `step` counts from 0."""
    rising = max(1, round(steps * warmup)) if warmup > 0 else 0
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass(frozen=True)
class Plan:
    """How to train: the optimizer's numbers and its schedule (see `rate`)."""

    steps: int
    lr: float
    warmup: float
    weight_decay: float
    optimizer: Literal["adamw", "muon"] = "adamw"
    average: float = 0.0

    def optimizers(self, parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """AdamW of all `parameters`; or Muon of the matrices, and AdamW of the others at a tenth of its rate."""
        decay = self.weight_decay
        if self.optimizer == "adamw":
            return [torch.optim.AdamW(parameters, lr=self.lr, weight_decay=decay)]
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        made: list[torch.optim.Optimizer] = []
        if matrices:
            made.append(Muon(matrices, lr=self.lr, weight_decay=decay))
        if others:
            made.append(torch.optim.AdamW(others, lr=0.1 * self.lr, weight_decay=decay))
        return made


@dataclass
class Course:
    """What happened: training losses, validation losses by step, and where it was stopped.

    Attributes:
        parts: for each check the validation loss of every batch.
        tokens: that losses were computed on. smooth: a running mean of the training losses. level: its largest value in
            the first steps.
    """

    losses: list[float] = field(default_factory=list)
    checks: dict[int, float] = field(default_factory=dict)
    parts: dict[int, list[float]] = field(default_factory=dict)
    tokens: int = 0
    diverged_at: int | None = None
    smooth: float = 0.0
    level: float = 0.0

    @property
    def best(self) -> tuple[int, float]:
        """(step, validation loss) of the weights that are kept: the last that are no worse than the lowest loss.

        A few answers carry much of the loss, so the lowest one is partly luck; weights trained for longer count as no
        worse within one standard error of the difference, batch by batch. The untrained ones are kept unless the
        trained have a lower loss.
        """
        lowest = min(self.checks, key=lambda step: self.checks[step])
        chosen = lowest
        for step in [step for step in self.checks if step > lowest and self.checks[step] < self.checks[0]]:
            if self.checks[step] - self.checks[lowest] <= spread(self.parts[step], self.parts[lowest]):
                chosen = step
        return chosen, self.checks[chosen]

    @classmethod
    def from_json(cls, values: Json) -> Course:
        return cls(**values | {key: {int(k): v for k, v in values[key].items()} for key in ("checks", "parts")})


def spread(some: Sequence[float], others: Sequence[float]) -> float:
    """Standard error of the mean difference of pairs; 0 where there is one pair."""
    apart = torch.tensor([a - b for a, b in zip(some, others, strict=True)], dtype=torch.float64)
    return float(apart.std() / len(apart) ** 0.5) if len(apart) > 1 else 0.0


def train(
    parameters: Sequence[nn.Parameter],
    objective: Callable[[T], tuple[Tensor, int]],
    judge: Callable[[T], Tensor],
    feed: Feed[T],
    validation: Sequence[T],
    plan: Plan,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
) -> Course:
    """Train `parameters` in place; they end as `Course.best` says, the untrained ones included.

    Args:
        objective: the loss of a batch, to be sent backward, and how many tokens it was computed on.
        judge: the validation loss of a batch.
        checkpoint: where a killed training goes on. Every step is a function of what is kept there: parameters,
            optimizer, best parameters, course, position in `feed`.
    """
    optimizers = plan.optimizers(parameters)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    best = [p.detach().clone() for p in parameters]
    mean = [p.detach().clone() for p in parameters] if plan.average else [p.detach() for p in parameters]
    more = {"best": best} | ({"mean": mean} if plan.average else {})
    course = _restore(checkpoint, parameters, more, optimizers, feed)

    def check(course: Course, step: int) -> None:
        with torch.no_grad(), holding(parameters, mean):
            course.parts[step] = torch.stack([judge(batch) for batch in validation]).tolist()
        course.checks[step] = sum(course.parts[step]) / len(validation)

    if course is None:
        course = Course()
        check(course, 0)
        if not math.isfinite(course.checks[0]):
            raise WorkFailed("the model's answers are not finite before any training", found=f"loss {course.checks[0]}")
    every, settled = max(1, plan.steps // CHECKS), max(SETTLED, round(plan.steps * plan.warmup))
    done = len(course.losses)
    progress.start("distill", plan.steps)
    progress.step(done)
    for step in range(done, plan.steps):
        batch = next(feed)
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * rate(step, plan.steps, plan.warmup)
        with torch.enable_grad():
            loss, tokens = objective(batch)
        value = float(loss.detach())
        course.losses.append(value)
        course.tokens += tokens
        course.smooth = value if step == 0 else 0.9 * course.smooth + 0.1 * value
        course.level = max(course.level, course.smooth) if step < settled else course.level
        if not math.isfinite(value) or (step >= settled and course.smooth > EXPLODED * max(course.level, NEGLIGIBLE)):
            course.diverged_at = step
            break
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not bool(torch.isfinite(norm)):
            course.diverged_at = step
            break
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if plan.average:
            with torch.no_grad():  # over fewer steps in the beginning, so that where it started is forgotten
                torch._foreach_lerp_(mean, list(parameters), 1 - min(plan.average, (step + 1) / (step + 10)))
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            check(course, step + 1)
            if course.best[0] == step + 1:
                with torch.no_grad():
                    torch._foreach_copy_(best, mean)
        if checkpoint and checkpoint.due():
            _keep(checkpoint, parameters, more, optimizers, feed, course)
        progress.step(note=f"loss {course.smooth:.4f}")
    progress.done()
    with torch.no_grad():
        for parameter, kept in zip(parameters, best):
            parameter.copy_(kept)
            parameter.grad = None
    return course


@contextmanager
def holding(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """`parameters` have these values inside."""
    before = [p.data for p in parameters]
    for parameter, value in zip(parameters, values):
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in zip(parameters, before):
            parameter.data = value


def _keep(
    checkpoint: Checkpoint,
    parameters: Sequence[nn.Parameter],
    more: Mapping[str, Sequence[Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
    feed: Feed[T],
    course: Course,
) -> None:
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(parameters):
        tensors |= {f"{i}:now": parameter} | {f"{i}:{name}": kept[i] for name, kept in more.items()}
        state: Mapping[str, Tensor] = next((o.state[parameter] for o in optimizers if parameter in o.state), {})
        tensors |= {f"{i}:optimizer:{name}": value for name, value in state.items()}
    checkpoint.save(tensors, {"course": asdict(course), "position": feed.position})


def _restore(
    checkpoint: Checkpoint | None,
    parameters: Sequence[nn.Parameter],
    more: Mapping[str, Sequence[Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
    feed: Feed[T],
) -> Course | None:
    """Put everything back as `_keep` found it; None where nothing was kept."""
    kept = checkpoint.load() if checkpoint else None
    if kept is None:
        return None
    tensors, state = kept
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"{i}:now"])
            for name, kept_ones in more.items():
                kept_ones[i].copy_(tensors[f"{i}:{name}"])
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, tensor in tensors.items():
        number, kind, entry = (*name.split(":"), "")[:3]
        if kind == "optimizer":
            parameter = parameters[int(number)]  # AdamW counts steps on the CPU
            value = tensor if entry == "step" else tensor.to(parameter.device)
            owners[id(parameter)].state[parameter][entry] = value
    feed.seek(state["position"])
    return Course.from_json(state["course"])
