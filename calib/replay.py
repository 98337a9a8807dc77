"""Running a model with some of its modules replaced by what they returned, and finding out who reads what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..compress.anatomy import ModelView, Unit
from ..compress.base import evaluating
from ..compress.errors import WorkFailed


class Probe:
    """What a forward of this model looks like: how often each module is called, and who reads which block's output.

    Attributes:
        successor: block -> the next block of its stack.
        tapped: blocks whose output something besides the successor reads.
        owners: a tower, a decoder or the parent of a stack -> the units inside; only those that all calls go through.
        mutates: the model changes block outputs in place, so that memos must be copied.
    """

    def __init__(
        self,
        view: ModelView,
        units: Sequence[Unit],
        batches: Sequence[Mapping[str, Any]],
        run: Callable[[int], Any],
    ) -> None:
        """`run(index)` is the model's forward of batch `index`."""
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
        self.tapped: set[str] = set()
        self.mutates = False
        self._calls: dict[frozenset[str], dict[str, int]] = {}
        for index, batch in enumerate(batches):
            if _keys(batch) not in self._calls:
                self._calls[_keys(batch)] = self._trace(index)

    def calls(self, batch: Mapping[str, Any], path: str) -> int:
        """How often the module is called in a forward of this kind of batch."""
        return self._calls[_keys(batch)][path]

    def _trace(self, index: int) -> dict[str, int]:
        units = {unit.path for unit in self.units}
        blocks = {unit.path for unit in self.units if unit.stack is not None}  # the many: shapes alone are kept
        shapes: dict[str, list[Any]] = {path: [] for path in [*self.owners, *units]}
        active: list[str] = []

        def follow(path: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                for owner in [o for o, inside in self.owners.items() if path in inside and o not in active]:
                    del self.owners[owner]
                active.append(path)
                try:
                    out = original(*args, **kwargs)
                finally:
                    active.remove(path)
                memo = out if path in units else None
                shapes[path].append(hollow(memo, 0.0) if path in blocks else rewrapped(memo))
                return out

            return forward

        modules = {path: self.view.model.get_submodule(path) for path in shapes}
        with evaluating(self.view.model), patched({m: follow(p, m.forward) for p, m in modules.items()}):
            self.run(index)
        self.owners = {owner: inside for owner, inside in self.owners.items() if shapes[owner]}
        outputs = {unit.path: shapes[unit.path] for unit in self.units}
        for path in self.successor:
            if outputs[path] and path not in self.tapped and self._read_elsewhere(index, outputs, path):
                self.tapped.add(path)
        return {path: len(outs) for path, outs in shapes.items()}

    def _read_elsewhere(self, index: int, outputs: dict[str, list[Any]], path: str) -> bool:
        """Run the model with every unit stubbed, this one's output NaN: does NaN reach anything but the successor?"""
        allowed = {self.successor[path]}
        leaked = False

        def stub(name: str) -> Callable[..., Any]:
            rest = iter([hollow(out) for out in outputs[name]] if name == path else outputs[name])

            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal leaked
                leaked = leaked or (name not in allowed and has_nan((args, kwargs)))
                return rewrapped(next(rest))

            return forward

        stubs = {self.view.model.get_submodule(name): stub(name) for name in outputs}
        with evaluating(self.view.model), patched(stubs):
            try:
                final = self.run(index)
            except RuntimeError:  # code between the blocks writes into a block's output
                self.mutates = True
                return True
        return leaked or has_nan(final)


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
        return tree_map(lambda t: t.clone() if copy and isinstance(t, torch.Tensor) else t, out)

    return forward


def recording(module: nn.Module, into: list[Any], keep: bool) -> Callable[..., Any]:
    """The module's forward, each output added to `into`: as it is, or only its shape."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        into.append(rewrapped(out) if keep else hollow(out))
        return out

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
