"""One unit in the hands of a pass: statistics of its linears' inputs, what it is called with and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..compress.anatomy import LinearRef, Unit
from ..compress.base import Json
from ..compress.errors import WorkFailed
from ..compress.mapped import hand_back, only_lets_go
from ..compress.runtime.merge import merging_of
from .drift import drift
from .joined import Joined
from .narrow import narrow_weights
from .replay import Arrived, Call, patched, recording, replaying, samples, swapped, watching
from .stats import Stat, TokenWeights

if TYPE_CHECKING:
    from .walk import Walk

SPARE = 64 << 20  # bytes of free memory that a process keeps between two runs

S = TypeVar("S", bound=Stat)
R = TypeVar("R")


class WalkUnit:
    """One unit in the hands of a pass.

    Attributes:
        unit: the unit. name, part: the unit's.
        linears: those of its linears that the walk selected. stages: the same by stage, in execution order.
        notes: JSON values that the pass wants to keep; they survive a kill and are in `Walk.notes`.
    """

    def __init__(
        self, walk: Walk, unit: Unit, linears: Sequence[LinearRef], calls: list[list[Call]], runs: list[Joined]
    ) -> None:
        self.unit, self.name, self.part = unit, unit.name, unit.part
        self.linears = tuple(linears)
        stages = (tuple(ref for ref in stage if ref in self.linears) for stage in unit.stages)
        self.stages = tuple(stage for stage in stages if stage)
        self.notes: dict[str, Json] = {}
        self._walk, self._calls, self._runs = walk, calls, runs
        self._drifts: list[torch.Tensor | None] | None = None  # by batch
        self._settled: set[LinearRef] = set()
        self._remembered: dict[str, list[list[Any]]] = {}  # child -> run -> what it returned

    def observe(
        self,
        stat_factory: Callable[[], S],
        linears: Iterable[LinearRef] | None = None,
        token_weights: TokenWeights = "balanced",
    ) -> dict[LinearRef, S]:
        """Statistics of the inputs of `linears` (default: all selected), with the unit as it now is.

        Args:
            stat_factory: makes an empty statistic, for instance the class `Hessian`.
            linears: linears of this unit.
            token_weights: see `stats.modality_weights`. All tokens in the vision tower and the connector weigh 1.
                ``gradient`` measures the model and ``drift`` the unit at the first time it is asked for: ask before
                changing weights.

        Returns:
            The statistic of each linear; linears that share an input share one.
        """
        chosen = self.linears if linears is None else tuple(linears)
        leads: dict[int, LinearRef] = {}
        for ref in chosen:
            if ref.unit is not self.unit:
                raise ValueError(f"{ref.path} is not in {self.name}")
            leads.setdefault(ref.stage, ref)
        stats = {stage: stat_factory() for stage in leads}
        weights, apart = [], []  # by batch
        for index in range(len(self._calls)):
            weights.append({stage: self._weights(index, ref, token_weights) for stage, ref in leads.items()})
            kept = self._walk._kept_inside(index, self.unit)
            apart.append({ref for ref in leads.values() if kept and kept.apart(self.unit.module, ref.role)})

        def watch(one: Joined) -> None:
            waiting, clock = dict(leads), self._walk._clock
            watchers = {}
            for stage, ref in leads.items():
                each = [w for index in one.batches if (w := weights[index][stage]) is not None]
                whole = torch.cat(each) if each else None  # all alike: an image's own, or not
                in_two = ref in apart[one.batches[0]]
                watchers[ref.module] = watching(ref, stats[stage], whole, waiting, clock, in_two)
            with patched(watchers):
                try:
                    self._walk._run(self.unit, *one.call, narrow=True)
                except Arrived:
                    return
            raise WorkFailed(
                "a linear was not called",
                where=self.name,
                found=", ".join(ref.path for ref in waiting.values()),
                change="correct the block's layout in the anatomy row, or list the linear under 'ignored'",
            )

        self.replay(watch)
        return {ref: stats[ref.stage] for ref in chosen}

    def settle(self, linears: Iterable[LinearRef]) -> None:
        """Say that these linears keep the weights that they now have until the unit is done.

        What a child of the unit (its attention) returns is then remembered from the next run on where nothing before
        or in it can change any more, and the child does not run again: the memory of one more hidden state by token.
        """
        self._settled.update(linears)

    def replay(self, run: Callable[[Joined], R], last: bool = False) -> list[R]:
        """`run` of each of the unit's runs; settled children return what they returned.

        The linears' weights are in the dtype that statistics are computed in, once for all runs.

        Args:
            last: it will not be called again, and nothing more is remembered.
        """
        settled = {f"{self.unit.path}.{name}": child for name, child in self._finished()}
        fresh: dict[str, list[list[Any]]] = {path: [] for path in settled if path not in self._remembered}
        found: list[R] = []
        with narrow_weights([self.unit], self._walk._narrow):
            for number, one in enumerate(self._runs):
                patches = {}
                for path, child in settled.items():
                    if path in self._remembered:
                        patches[child] = replaying(path, self._remembered[path][number], False)
                    elif not last:
                        fresh[path].append([])
                        patches[child] = recording(child, fresh[path][-1], True)
                with patched(patches):
                    found.append(run(one))
        self._remembered |= {path: calls for path, calls in fresh.items() if not last and all(calls)}
        hand_back(SPARE)
        return found

    def let_go(self) -> None:
        """Free what the unit was called with and what was remembered of it."""
        self._calls, self._runs = [], []
        self._remembered.clear()

    def _finished(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """The children of the unit with linears that no longer change, nor does anything before these."""
        if self._walk._runs_differ() or merging_of(self.unit.module) is not None:  # merging reads keys inside attention
            return
        for name, child in self.unit.module.named_children():
            inside = [ref for ref in self.unit.linears if ref.path.startswith(f"{self.unit.path}.{name}.")]
            last = max((ref.stage for ref in inside), default=-1)
            open_ = [ref for ref in self.linears if ref.stage <= last and ref not in self._settled]
            if inside and self._settled and not open_ and all(only_lets_go(module) for module in child.modules()):
                yield name, child

    def inputs(self) -> Iterator[Call]:
        """The caught (args, kwargs) of the unit, batch after batch. Not copies: leave them as they are."""
        for calls in self._calls:
            yield from calls

    def outputs(self) -> Iterator[Any]:
        """What the unit, as it now is, returns for each of `inputs`."""
        for args, kwargs in self.inputs():
            yield self._walk._run(self.unit, args, kwargs)

    def kept(self) -> Iterator[tuple[torch.Tensor, torch.Tensor] | None]:
        """For each of `inputs` what token passes left of the unit's sequence (`Kept.whole`); None: all of it."""
        kept = [self._walk._kept_inside(index, self.unit) for index in range(len(self._calls))]
        return (k.whole if k else None for k, calls in zip(kept, self._calls) for _ in calls)

    def run(self, call: Call, weights: Mapping[LinearRef, torch.Tensor]) -> Any:
        """What the unit returns for `call` with other weights in its linears, with gradients where they are enabled."""
        with swapped({ref.module: weight for ref, weight in weights.items()}):
            return self._walk._run(self.unit, *call, gradients=torch.is_grad_enabled())

    def rows(self, token_weights: TokenWeights = "balanced") -> Iterator[tuple[int, torch.Tensor | None]]:
        """For each of `inputs` the samples in its batch, and the weights [batch, tokens] of the unit's tokens.

        None: all 1. Tokens are those of what the unit returns: where it reads a second sequence, those of the first.
        """
        last = [ref for ref in self.unit.linears if ref.role not in ("cross.k", "cross.v")][-1]
        for index, calls in enumerate(self._calls):
            batch = self._walk.batches[index]
            weights, kept = self._weights(index, last, token_weights), self._walk._kept_inside(index, self.unit)
            if weights is not None and kept is not None:
                weights = kept.returned(self.unit.module, weights)
            yield from [(samples(batch), weights)] * len(calls)

    def _weights(self, index: int, ref: LinearRef, mode: TokenWeights) -> torch.Tensor | None:
        if mode == "drift" and self._drifts is None and self.unit.tokens != "image":
            found = [[drift(call, self._walk._run(self.unit, *call)) for call in calls] for calls in self._calls]
            self._drifts = [one[0] if len(one) == 1 else None for one in found]
        return self._walk._weights(index, ref, mode, self._drifts[index] if self._drifts else None)
