"""Running a model with some of its modules replaced by what they returned, and finding out who reads what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise, product
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..compress.anatomy import LinearRef, ModelView, Unit
from ..compress.base import evaluating
from ..compress.errors import WorkFailed
from ..compress.runtime.merge import carried
from ..compress.runtime.reduce import installed
from .clock import Clock
from .stats import Stat, fitting

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Arrived(BaseException):
    """Stops a forward when what was wanted is there. No Exception: nothing on the way may swallow it."""


class Probe:
    """What a forward of this model looks like: how often each module is called, and who reads which block's output.

    Attributes:
        successor: block -> the next block of its stack.
        readers: the tower -> the units of the connector, where nothing else reads what it returns.
        tapped: blocks whose output something besides the successor reads, a token pass that reads the tower among it.
        owners: a tower, a decoder or the parent of a stack -> the units inside; only those that all calls go through,
            and no tower of which a token pass reads a block: it would not run.
        relayed: blocks whose successor is called with what they return and otherwise with the very objects that they
            were called with themselves.
        mutates: the model changes block outputs in place, so that memos must be copied.

    What is looked at is one sample of the first batch of each kind, or that batch whole where it cannot be taken apart.
    """

    def __init__(
        self,
        view: ModelView,
        units: Sequence[Unit],
        batches: Sequence[Mapping[str, Any]],
        run: Callable[[Mapping[str, Any]], Any],
    ) -> None:
        """`run(batch)` is the model's forward of a batch."""
        self.view, self.units, self.run = view, units, run
        self.successor = {a.path: b.path for a, b in pairwise(units) if a.stack is not None and a.stack is b.stack}
        paths = {unit.path for unit in units}
        candidates = [self.view.tower_path, self.view.decoder_path]
        candidates += [unit.path.rsplit(".", 2)[0] for unit in units if unit.stack is not None]
        self.owners = {
            owner: {path for path in paths if path.startswith(owner + ".")}
            for owner in dict.fromkeys(candidates)
            if owner and owner not in paths
        }
        reduction = installed(view.model)
        read = reduction.watch.reader.path if reduction is not None and reduction.watch is not None else ""
        self.owners = {owner: inside for owner, inside in self.owners.items() if not read.startswith(owner + ".")}
        self.tapped: set[str] = {path for path, after in self.successor.items() if after == read}
        self.relayed = set(self.successor)
        self.readers: dict[str, set[str]] = {}
        self.mutates = False
        self._calls: dict[frozenset[str], dict[str, int]] = {}
        self._lengths: dict[frozenset[str], dict[str, list[int | None]] | None] = {}
        for batch in batches:
            if _keys(batch) not in self._calls:
                first = next(pieces(view, batch, 1))
                self._calls[_keys(batch)], lengths = self._trace(first)
                self._lengths[_keys(batch)] = lengths if samples(first) == 1 else None

    def calls(self, batch: Mapping[str, Any], path: str) -> int:
        """How often the module is called in a forward of this kind of batch."""
        return self._calls[_keys(batch)][path]

    def rows(self, batch: Mapping[str, Any], path: str, outputs: list[Any], rows: slice) -> list[Any] | None:
        """Of what the module returned for `batch`, one entry a call, that of the samples `rows`; None: cannot be said.

        It can where every tensor is as long as the one of a single sample times the samples.
        """
        lengths, count = self._lengths[_keys(batch)], samples(batch)
        if lengths is None:
            return outputs if (rows.start, rows.stop) == (0, count) else None
        leaves, spec = tree_flatten(outputs)
        if [_length(leaf) for leaf in leaves] != [n and n * count for n in lengths[path]]:
            return None
        parts = [None if n is None else slice(rows.start * n, rows.stop * n) for n in lengths[path]]
        cut = [leaf if part is None else carried(leaf[part], leaf, part) for leaf, part in zip(leaves, parts)]
        return tree_unflatten(cut, spec)

    def standing_in(
        self, batch: Mapping[str, Any], memos: Mapping[str, list[Any]], rows: slice
    ) -> dict[nn.Module, Callable[..., Any]]:
        """What stands in for finished modules where only the samples `rows` of a batch run; nothing where unsure.

        `memos`: path -> what the module returned for the whole batch, one entry a call.
        """
        later = [unit.path for unit in self.units if unit.part in ("language", "head")]  # gradients pass through these
        before = {
            path: memo
            for path, memo in memos.items()
            if not any(f"{unit}.".startswith(f"{path}.") or f"{path}.".startswith(f"{unit}.") for unit in later)
        }
        found = {path: self.rows(batch, path, memo, rows) for path, memo in before.items()}
        known = {path: outputs for path, outputs in found.items() if outputs is not None}
        if len(known) < len(found):
            return {}
        return {self.view.model.get_submodule(p): replaying(p, outs, self.mutates) for p, outs in known.items()}

    def _trace(self, batch: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, list[int | None]]]:
        units = {unit.path for unit in self.units}
        blocks = {unit.path for unit in self.units if unit.stack is not None}  # the many: shapes alone are kept
        shapes: dict[str, list[Any]] = {path: [] for path in [*self.owners, *units]}
        lengths: dict[str, list[int | None]] = {path: [] for path in shapes}
        active: list[str] = []
        last: tuple[str, Call, Any] = "", ((), {}), None  # block, how it was called, what it returned

        def follow(path: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal last
                if path in blocks and not (self.successor.get(last[0]) == path and relays(*last[1:], (args, kwargs))):
                    self.relayed -= {before for before, after in self.successor.items() if after == path}
                for owner in [o for o, inside in self.owners.items() if path in inside and o not in active]:
                    del self.owners[owner]
                active.append(path)
                try:
                    out = original(*args, **kwargs)
                finally:
                    active.remove(path)
                last = (path, (args, kwargs), out) if path in blocks else last
                lengths[path] += [_length(leaf) for leaf in tree_leaves(out)]
                shapes[path].append(rewrapped(out) if path in units - blocks else hollow(out, 0.0))
                return out

            return forward

        modules = {path: self.view.model.get_submodule(path) for path in shapes}
        with evaluating(self.view.model), patched({m: follow(p, m.forward) for p, m in modules.items()}):
            self.run(batch)
        self.owners = {owner: inside for owner, inside in self.owners.items() if shapes[owner]}
        outputs = {unit.path: shapes[unit.path] for unit in self.units}
        self._find_taps(batch, outputs)
        tower = self.view.tower_path
        after = {unit.path for unit in self.units if unit.part == "connector" and outputs[unit.path]}
        if tower in self.owners and after and not any(path.startswith(f"{tower}.") for path in after):
            outside = {path: outs for path, outs in outputs.items() if path not in self.owners[tower]}
            if self._read_elsewhere(batch, outside | {tower: shapes[tower]}, [tower], after):
                self.tapped.add(tower)
            self.readers[tower] = self.readers.get(tower, set()) | after
        return {path: len(outs) for path, outs in shapes.items()}, lengths

    def _find_taps(self, batch: Mapping[str, Any], outputs: dict[str, list[Any]]) -> None:
        """Which blocks' outputs something besides their successors reads.

        Many blocks are looked at in one run: those whose number has the same bit in the same place, so that any two
        are apart in some run, and a block that reads another's output is seen in that one.
        """
        left = [path for path in self.successor if path not in self.tapped and outputs[path]]
        while left:
            halves = [
                [path for number, path in enumerate(left) if number >> bit & 1 == value]
                for bit, value in product(range(max((len(left) - 1).bit_length(), 1)), (0, 1))
            ]
            leaking = [half for half in halves if half and self._read_elsewhere(batch, outputs, half)]
            if not leaking:
                return
            suspects = [path for path in left if all(half in leaking for half in halves if path in half)] or left
            self.tapped |= {path for path in suspects if self._read_elsewhere(batch, outputs, [path])}
            left = [path for path in left if path not in suspects]

    def _read_elsewhere(
        self,
        batch: Mapping[str, Any],
        outputs: dict[str, list[Any]],
        paths: Sequence[str],
        readers: Collection[str] = (),
    ) -> bool:
        """Run the model with all of `outputs` stubbed, those of `paths` NaN: does NaN reach others than may read it?

        Those are `readers`, by default the successors.
        """
        leaked = False
        allowed = readers or {self.successor[path] for path in paths}

        def stub(name: str) -> Callable[..., Any]:
            rest = iter([hollow(out) for out in outputs[name]] if name in paths else outputs[name])

            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal leaked
                leaked = leaked or (name not in allowed and has_nan((args, kwargs)))
                return rewrapped(next(rest))

            return forward

        stubs = {self.view.model.get_submodule(name): stub(name) for name in outputs}
        with evaluating(self.view.model), patched(stubs):
            try:
                final = self.run(batch)
            except RuntimeError:  # code between the blocks writes into a block's output
                self.mutates = True
                return True
        return leaked or has_nan(final.logits if readers else final)  # some hand on what the tower said


def relays(call: Call, out: Any, after: Call) -> bool:
    """Whether the call `after` is `call` with what it returned, `out`, in the place of its first argument."""
    (args, kwargs), (later, options) = call, after
    if not args or len(args) != len(later) or kwargs.keys() != options.keys() or later[0] is not hidden(out):
        return False
    return all(a is b for a, b in zip([*args[1:], *kwargs.values()], [*later[1:], *options.values()]))


def relayed(calls: list[list[Call]], outs: list[list[Any]]) -> list[list[Call]]:
    """How the successor is called where it is relayed what a block returned, by batch."""
    pairs = [zip(batch, returned, strict=True) for batch, returned in zip(calls, outs, strict=True)]
    return [[with_first(call, hidden(out)) for call, out in batch] for batch in pairs]


def with_first(call: Call, first: Any) -> Call:
    """The call with another first argument."""
    (_, *args), kwargs = call
    return (first, *args), kwargs


def hidden(out: Any) -> Any:
    """The hidden states among what a block returns: that itself, or the first of several."""
    return out[0] if isinstance(out, (tuple, list)) and out else out


def _length(leaf: Any) -> int | None:
    return len(leaf) if isinstance(leaf, torch.Tensor) and leaf.ndim else None


def samples(batch: Mapping[str, Any]) -> int:
    """How many samples are in a batch."""
    return len(next(batch[key] for key in ("input_ids", "labels", "pixel_values") if key in batch))


def pieces(view: ModelView, batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """A batch, `size` samples at a time where it can be taken apart, else whole.

    It can where every tensor has a row for each sample: the rows of `pixel_values` are then one a sample, since each
    sample has visual tokens, and so an image.
    """
    rows = samples(batch)
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    apart = "input_ids" in batch and all(value.ndim and len(value) == rows for value in tensors.values())
    apart = apart and bool(view.token_masks(batch, "prompt").vision.any(1).all())
    if not apart:
        yield dict(batch)
        return
    for start in range(0, rows, size):
        yield {key: value[start : start + size] if key in tensors else value for key, value in batch.items()}


def _keys(batch: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(key for key, value in batch.items() if value is not None)


@contextmanager
def patched(patches: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Other `forward`s of the modules inside; hooks on the modules keep running. Exactly what was there afterwards."""
    before = {module: module.__dict__.get("forward") for module in patches}
    try:
        for module, forward in patches.items():  # `wraps`: the signature is still that of the model's own code
            module.__dict__["forward"] = wraps(module.forward)(forward)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextmanager
def swapped(weights: Mapping[nn.Linear, torch.Tensor]) -> Iterator[None]:
    """Linears compute with other weights inside, which may be part of a graph; their own are back afterwards."""
    own: list[tuple[dict[str, Any], Any]] = [(vars(linear)["_parameters"], linear.weight) for linear in weights]
    try:
        for (parameters, _), weight in zip(own, weights.values(), strict=True):
            parameters["weight"] = weight
        yield
    finally:
        for parameters, weight in own:
            parameters["weight"] = weight


def replaying(path: str, outputs: list[Any], copy: bool) -> Callable[..., Any]:
    """A forward that returns `outputs`, one a call."""
    rest = iter(outputs)

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        try:
            out = next(rest)
        except StopIteration:
            raise WorkFailed(
                "a module is called more often than in the first batch of its kind",
                where=path,
                change="do not mix images and videos in a batch",
            ) from None
        return tree_map(lambda t: carried(t.clone(), t) if copy and isinstance(t, torch.Tensor) else t, out)

    return forward


def recording(module: nn.Module, into: list[Any], keep: bool) -> Callable[..., Any]:
    """The module's forward, each output added to `into`: as it is, or only its shape."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        into.append(rewrapped(out) if keep else hollow(out))
        return out

    return forward


def catching(module: nn.Module, caught: list[Call], expected: int) -> Callable[..., Any]:
    """The module's forward, its arguments added to `caught`; stops the model's forward at the last expected call."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        caught.append((args, kwargs))
        if len(caught) == expected:
            raise Arrived
        return original(*args, **kwargs)

    return forward


def rewrapped(out: Any) -> Any:
    """The same tensors in new containers: models write into the output objects that their parts return."""
    return tree_map(lambda leaf: leaf, out)


def hollow(out: Any, value: float = float("nan")) -> Any:
    """The same structure with floating tensors of one repeated value, which take no memory."""

    def blank(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return torch.full((), value, dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
        return leaf

    return tree_map(blank, out)


def has_nan(tree: Any) -> bool:
    """Whether any floating tensor in `tree` holds NaN."""
    tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]
    single = [t[(slice(0, 1),) * t.ndim] if not any(t.stride()) else t for t in tensors]  # hollow ones: one value
    return any(bool(t.isnan().any()) for t in single)


def watching(
    ref: LinearRef,
    stat: Stat,
    weights: torch.Tensor | None,
    waiting: dict[int, LinearRef],
    clock: Clock,
    apart: bool = False,
) -> Any:
    """The linear's forward, its input added to `stat`; stops the unit's forward when the last of `waiting` is there.

    `apart`: the tokens of `weights` come in two calls, [batch, tokens, channels] each.
    """
    original = ref.module.forward
    taken = 0

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal taken
        rows, mine = x.detach().reshape(-1, x.shape[-1]), weights
        if apart and weights is not None:
            mine = weights[:, taken : taken + x.shape[1]]
            taken += x.shape[1]
        with clock.timing("statistics"):
            stat.update(rows, fitting(mine, rows, ref))
        if mine is weights or (weights is not None and taken == weights.shape[1]):
            waiting.pop(ref.stage, None)
        if not waiting:
            raise Arrived
        return original(x)

    return forward
