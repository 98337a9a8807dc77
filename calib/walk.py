"""Stream the fit split through the model one unit at a time, exactly, for every family.

To process a unit the model's OWN forward runs, batch by batch, with every finished module replaced by what it returned
(its memo); the unit's arguments are caught and the forward is stopped there. Statistics then come from running the unit
alone on what was caught, as often as a pass likes. When the body of the loop ends, the unit runs once more as it now
is, and its outputs are its memo: the next unit sees the compressed prefix, whatever the model computes in between.

::

    for block in Walk(view, batches, "language"):
        for stage in block.stages:                                  # true-sequential
            for linear, stat in block.observe(Hessian, stage).items():
                linear.module.weight.copy_(rounded(linear.module.weight, stat.matrix))

Memory: the arguments of one unit for all batches, and the memos that something still reads. A block whose output only
its successor reads is replaced by a tensor of NaN without storage as soon as that one is finished; which outputs are
read elsewhere (LLaVA's second last vision layer, Qwen3-VL's deep stack) is found by tracing NaN through the first
batch, so a mistake would be loud. A vision tower that is finished as a whole is remembered as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..compress.anatomy import LinearRef, ModelView, Unit
from ..compress.base import Json, Progress, Silent, evaluating
from ..compress.errors import WorkFailed
from ..compress.mapped import hand_back, only_lets_go, release
from ..compress.runtime.activations import installed as rounding_of
from ..compress.runtime.merge import merging_of
from ..compress.runtime.rules import read_again
from ..compress.runtime.seen import Kept, seen
from ..compress.selectors import Where
from .balance import Balance
from .clock import Clock
from .joined import Joined, alone, apart, joined, kind_of
from .narrow import narrow_dtype, narrow_weights, narrowed, narrowing
from .replay import (
    Arrived,
    Call,
    Probe,
    catching,
    hollow,
    patched,
    recording,
    relayed,
    replaying,
    with_first,
)
from .scratch import Scratch
from .stats import TokenWeights, input_masks, modality_weights
from .walk_unit import WalkUnit


class Walk:
    """An iteration over the units of which `where` selects linears, in forward order. See the module's docstring.

    Args:
        view: the model. batches: model-ready batches (dicts of tensors), the same sequence at every iteration.
        where: selector; None selects everything but the head.
        scratch: a folder that keeps finished units across a kill; they are restored and not yielded again.
        name: of the walk, a folder in `scratch`, unique within a pass.
        balance: the gradient ratios of token_weights ``gradient``, shared by the walks of a pass.
        seconds: to which the time is added, by kind of work (`clock.Clock`).
        drifting: share of the visual tokens that count with token_weights ``drift``.

    Attributes:
        notes: unit name -> what the pass noted there, restored units included.
        without_drift: linears (paths) of visual and text tokens that have no ``drift`` and took ``balanced``.
        balance: as given, or one that measures this model on `batches` when it is first asked.

    The body may change the tensors of its own unit (shapes too), `view.grids` of its linears and how these round their
    inputs; nothing else.
    """

    def __init__(
        self,
        view: ModelView,
        batches: Sequence[Mapping[str, Any]],
        where: Where = None,
        *,
        scratch: Path | None = None,
        name: str = "walk",
        progress: Progress | None = None,
        balance: Balance | None = None,
        seconds: dict[str, float] | None = None,
        drifting: float = 0.0,
    ) -> None:
        self.view, self.batches = view, batches
        self._clock, self._units = Clock(seconds), view.units
        self.name, self.progress = name, progress or Silent()
        self.notes: dict[str, dict[str, Json]] = {}
        self.drifting = drifting
        self.without_drift: set[str] = set()
        self._selected: dict[Unit, list[LinearRef]] = {}
        for ref in view.linears(where):
            self._selected.setdefault(ref.unit, []).append(ref)
        self._scratch = Scratch(scratch / name, view, batches, list(self._selected)) if scratch else None
        self._memos: dict[str, list[list[Any]]] = {}  # module path -> batch -> arrival -> output
        self._kept: list[Kept | None] = [None] * len(batches)  # by token passes
        self._shares: dict[LinearRef, float] = {}
        self._narrow = narrow_dtype(view)
        self._weighs = any(ref.unit.tokens != "image" for refs in self._selected.values() for ref in refs)
        self.balance = balance or Balance(view, batches, scratch)
        self._probe: Probe | None = None
        self._apart: dict[Any, bool] = {}  # what units are made of -> whether they treat samples apart

    def __len__(self) -> int:
        return len(self._selected)

    def __iter__(self) -> Iterator[WalkUnit]:
        units = [unit for unit in self._units if unit in self._selected]
        self._memos.clear()
        self.progress.start(self.name, len(units))
        restored = 0
        if self._scratch:
            for unit in units:
                notes = self._scratch.restore(unit)
                if notes is None:
                    break
                self.notes[unit.name] = notes
                self.progress.step(note=unit.name)
                restored += 1
        if restored == len(units):
            units = []
        calls: list[list[Call]] = []  # how the next unit is called, where that is known
        runs: list[Joined] = []
        for number, (unit, after) in enumerate(zip(units, [*units[1:], None])):
            with self._clock.timing("forward"), narrowing(self._units, self._narrow):
                if not runs:
                    calls = self._capture(unit)
                    runs = self._joined(unit, calls)
                elif not self._joins(unit, runs, calls):
                    runs = alone(calls)
            current = WalkUnit(self, unit, self._selected[unit], calls, runs)
            if number >= restored:  # what was restored is run through as it was the first time: the same bits
                rounding = rounding_of(unit.module)
                with self._clock.timing("solve"):
                    yield current
                self.notes[unit.name] = current.notes
                if self._scratch:
                    with self._clock.timing("write"):
                        self._scratch.save(unit, current.notes)
                now = rounding_of(unit.module)  # of a unit that is a linear itself: what was caught has met its hook
                if now is not None and now is not rounding:
                    calls = [[with_first(call, now.round(call[0][0])) for call in batch] for batch in calls]
                    runs = [replace(one, call=with_first(one.call, now.round(one.call[0][0]))) for one in runs]
            if after is not None:
                current._calls, current._runs = calls, runs
                outs = current.replay(lambda one: self._run(unit, *one.call, narrow=True), last=True)  # noqa: B023
                returned: list[list[Any]] = [[] for _ in calls]
                for one, out in zip(runs, outs, strict=True):
                    for index, part in zip(one.batches, one.split(out), strict=True):
                        returned[index].append(part)
                relays = self._relays(unit, after)
                calls = relayed(calls, returned) if relays else []
                runs = [one.relayed(out) for one, out in zip(runs, outs, strict=True)] if relays else []
                self._memos[unit.path] = returned
                del outs, returned
                self._forget()
            current.let_go()
            hand_back()
            if number >= restored:
                self.progress.step(note=unit.name)
        self.progress.done()

    def replay(self, index: int) -> Any:
        """The model's own output for batch `index` with every finished unit replaced by its memo."""
        with self._clock.timing("forward"), evaluating(self.view.model), patched(self._returning(index)):
            return self._forward(self.batches[index])

    def weights_used(self, mode: TokenWeights) -> Json:
        """For a pass's notes: what a visual token weighed in the language model where one of text weighed 1.

        With ``balanced`` over all batches; with ``gradient`` the spread over layers (`balance.Measured.numbers`), None
        where no such token was weighed at all.
        """
        if mode == "gradient":
            known = self.balance.known()
            return known.numbers() if known else None
        if mode != "balanced":
            return {"uniform": 1.0, "text": 0.0, "drift": self.drifting}[mode]
        tokens = "prompt" if self.view.family.seq2seq and all("input_ids" in b for b in self.batches) else "sequence"
        masks = [self.view.token_masks(batch, tokens) for batch in self.batches]
        vision, text = (sum(int(getattr(m, kind).sum()) for m in masks) for kind in ("vision", "text"))
        return text / vision if vision and text else 1.0

    # ------------------------------------------------------------------------------------------------ one unit alone

    def _run(self, unit: Unit, args: Any, kwargs: Any, gradients: bool = False, narrow: bool = False) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        versions = [tensor._version for tensor in given]
        with self._clock.timing("forward"), evaluating(unit.module), torch.set_grad_enabled(gradients):
            out = narrowed(unit.module.forward, unit, self._narrow if narrow else None)(*args, **kwargs)
        if versions != [tensor._version for tensor in given]:
            raise WorkFailed("a block changes its input in place; it cannot be walked", where=unit.name)
        return out

    def _weights(
        self, index: int, ref: LinearRef, mode: TokenWeights, drifts: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Token weights [batch, tokens] of a linear's input; None: all 1. `drifts`: of the unit's own tokens."""
        if mode == "gradient" and self._weighs:  # before the first change of a weight, whichever unit comes first
            with self._clock.timing("balance"):
                same = self.balance.batches is self.batches  # finished outputs are known by the batch's number
                self.balance.measured(self._finished if same else None)
        masks = input_masks(self.view, self.batches[index], ref, self._kept[index])
        if masks is None:
            return None
        if mode == "drift":
            kept = self._kept_inside(index, ref.unit)
            if drifts is not None and kept and drifts.ndim == 2:
                drifts = kept.taken(ref.unit.module, ref.role, drifts)
            if drifts is not None and (ref.role in ("cross.k", "cross.v") or drifts.numel() != masks.text.numel()):
                drifts = None  # of other tokens
            if drifts is None and masks.vision.any() and masks.text.any():
                self.without_drift.add(ref.path)
            places = None if drifts is None else drifts.reshape(masks.text.shape).to(masks.text.device)
            return modality_weights(masks, mode, drift=places, top=self.drifting)
        if mode != "gradient":
            return modality_weights(masks, mode)
        return modality_weights(masks, mode, ratio=self.balance.ratio(ref), share=self._share(ref))

    def _kept_inside(self, index: int, unit: Unit) -> Kept | None:
        """What token passes left of a batch's sequence, where the unit is in the decoder."""
        return self._kept[index] if unit.path.startswith(self.view.decoder_path + ".") else None

    def _share(self, ref: LinearRef) -> float:
        """Share of visual tokens among the rows of a linear's input, over all batches."""
        if ref not in self._shares:
            found = [input_masks(self.view, batch, ref, kept) for batch, kept in zip(self.batches, self._kept)]
            vision, text = (sum(int(getattr(m, k).sum()) for m in found if m is not None) for k in ("vision", "text"))
            self._shares[ref] = vision / max(vision + text, 1)
        return self._shares[ref]

    # ------------------------------------------------------------------------------------------------- the whole model

    def _forward(self, batch: Mapping[str, Any]) -> Any:
        given = {k: v.to(self.view.model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        try:
            return self.view.model(**{**given, "use_cache": False})
        finally:
            for value in batch.values():
                if isinstance(value, torch.Tensor):
                    release(value)

    def _capture(self, unit: Unit) -> list[list[Call]]:
        """The arguments of `unit` for every batch. What runs before it and is not finished is remembered on the way."""
        if self._probe is None:
            self._probe = Probe(self.view, self._units, self.batches, self._forward)
            self._probe.tapped |= read_again(self.view.model)
            hand_back()
        probe = self._probe
        ahead = [u for u in self._units[: self._units.index(unit)] if not self._covered(u.path)]
        known = {*self._memos, *(u.path for u in ahead)}
        owners = [
            owner
            for owner, inside in probe.owners.items()
            if all(path in known or self._covered(path) for path in inside) and not self._covered(owner)
        ]
        owners = [owner for owner in owners if not any(owner.startswith(other + ".") for other in owners)]
        hidden = [u for u in ahead if any(u.path.startswith(owner + ".") for owner in owners)]
        keep = {u.path: False for u in ahead if u not in hidden and u.path not in self._memos}
        for path in keep:
            after = probe.successor.get(path)
            keep[path] = path in probe.tapped or after is None or after not in known
        records: dict[str, list[list[Any]]] = {path: [] for path in [*owners, *keep]}
        finished: list[set[str]] = []  # by batch
        calls: list[list[Call]] = []
        self._shares.clear()
        with narrow_weights(ahead, self._narrow, away=True):
            for index, batch in enumerate(self.batches):
                caught: list[Call] = []
                reached = False
                patches = self._returning(index)
                for path, record in records.items():
                    record.append([])
                    patches[self._module(path)] = recording(self._module(path), record[-1], keep.get(path, True))
                patches[unit.module] = catching(unit.module, caught, probe.calls(batch, unit.path))
                with evaluating(self.view.model), patched(patches):
                    try:
                        self._forward(batch)
                    except Arrived:
                        reached = True
                kept, before = seen(self.view.model), self._kept[index]
                self._kept[index] = kept.since(before) if kept else before
                done = {p for p, record in records.items() if not reached or len(record[-1]) >= probe.calls(batch, p)}
                for path in (p for p in done if self._unread(p, {*self._memos, *done})):
                    records[path][-1] = [hollow(out) for out in records[path][-1]]
                finished.append(done)
                calls.append(caught)
                hand_back()
        if all(done == finished[0] for done in finished):  # else what one batch let go of, another might ask for
            self._memos |= {path: records[path] for path in finished[0]}
        self._forget()
        if not any(calls):
            change = "calibrate with images"
            raise WorkFailed("no sample reaches this part of the model", where=unit.name, change=change)
        return calls

    def _joined(self, unit: Unit, calls: list[list[Call]]) -> list[Joined]:
        """The calls of several batches as one where that can be; frees what they then hold twice."""
        kinds = [
            [masks and masks.text.shape[1:] for ref in unit.linears for masks in [input_masks(self.view, batch, ref)]]
            for batch in self.batches
        ]
        runs = joined(calls, kinds)
        if not self._joins(unit, runs, calls):
            return alone(calls)
        for one in runs:
            if len(one.batches) > 1:
                for index, mine in zip(one.batches, one.split(one.call[0][0]), strict=True):
                    calls[index] = [with_first(calls[index][0], mine)]
        return runs

    def _joins(self, unit: Unit, runs: list[Joined], calls: list[list[Call]]) -> bool:
        """Whether the unit may be called for several batches at once.

        It has no hook that might count calls, and a unit that is made of the same answered the longest of these calls
        as it does the batches one by one. Rounding of inputs, which a restored unit has from the start, is none.
        """
        several = [one for one in runs if len(one.batches) > 1]
        plain = all(only_lets_go(m, before=int(rounding_of(m) is not None)) for m in unit.module.modules())
        if not several or not plain or self._runs_differ() or merging_of(unit.module) is not None:
            return False
        made_of = kind_of(unit.module)
        if made_of not in self._apart:
            longest = max(several, key=lambda one: sum(one.samples))
            tolerance = 1e-3 if self._narrow is None else 2 * torch.finfo(self._narrow).eps
            with narrow_weights([unit], self._narrow):
                self._apart[made_of] = apart(lambda call: self._run(unit, *call), longest, calls, tolerance)
        return self._apart[made_of]

    def _relays(self, unit: Unit, after: Unit) -> bool:
        """Whether a finished unit's outputs and its own arguments are all that `after` is called with."""
        probe = self._probe
        assert probe is not None
        return not self._runs_differ() and unit.path in probe.relayed and probe.successor[unit.path] == after.path

    def _runs_differ(self) -> bool:
        """Whether a unit may not simply be given again what it was given: tokens are taken away, or written over."""
        return any(self._kept) or self._probe is None or self._probe.mutates

    def _module(self, path: str) -> nn.Module:
        return self.view.model.get_submodule(path)

    def _covered(self, path: str) -> bool:
        """Whether the module, or one around it, is remembered."""
        return path in self._memos or any(path.startswith(done + ".") for done in self._memos)

    def _forget(self) -> None:
        """Let go of memos that nothing reads any more."""
        for path in list(self._memos):
            if any(path.startswith(owner + ".") for owner in self._memos):
                del self._memos[path]
            elif self._unread(path, self._memos):
                self._memos[path] = [[hollow(out) for out in batch] for batch in self._memos[path]]

    def _unread(self, path: str, known: Collection[str]) -> bool:
        """Whether nothing but modules that are `known` reads what the module returned."""
        assert self._probe is not None
        readers = self._probe.readers.get(path, {self._probe.successor.get(path)})
        return path not in self._probe.tapped and all(reader in known for reader in readers)

    def _returning(self, index: int) -> dict[nn.Module, Callable[..., Any]]:
        copy = self._probe is not None and self._probe.mutates
        return {self._module(path): replaying(path, memo[index], copy) for path, memo in self._memos.items()}

    def _finished(self, index: int, rows: slice) -> dict[nn.Module, Callable[..., Any]]:
        """What stands in for finished modules where only the samples `rows` of a batch run; nothing where unsure."""
        assert self._probe is not None
        memos = {path: memo[index] for path, memo in self._memos.items()}
        return self._probe.standing_in(self.batches[index], memos, rows)
