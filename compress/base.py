"""What a pass is: a frozen dataclass of settings with four verbs.

::

    requires(model, ctx)      raise Unmet before any weight is touched
    apply(model, ctx)         change the model in place; return Notes (every fallback counted)
    ensures(model)            raise PromiseBroken; asked again after EVERY later pass
    rebuild(model, record)    the same change of shape or code on a fresh model, without data

A pass holds settings only. What it measures lives in locals of `apply`; what the model *is* lives in the ledger that is
saved with the model (`Notes.record`); what *happened* lives in the report (`Notes.numbers`).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from .errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from .anatomy import ModelView

Json = Any  # str, int, float, bool, None, and lists and dicts of these
Batches = Callable[[int, int], Iterator[Mapping[str, Any]]]  # (batch size, number of the first) -> model-ready batches


@dataclass
class Notes:
    """What `apply` returns: `numbers` go to the report, `record` goes to the ledger (all that `rebuild` needs)."""

    numbers: dict[str, Json] = field(default_factory=dict)
    record: dict[str, Json] = field(default_factory=dict)


class Progress(Protocol):
    """Where long work tells how far it is; the command line draws it, tests ignore it."""

    def start(self, what: str, total: int) -> None: ...

    def step(self, n: int = 1, note: str = "") -> None: ...

    def done(self) -> None: ...


class Silent:
    """The progress of nobody watching."""

    def start(self, what: str, total: int) -> None: ...

    def step(self, n: int = 1, note: str = "") -> None: ...

    def done(self) -> None: ...


@dataclass(frozen=True)
class Context:
    """What a pass may use besides the model: fit data, a walk over blocks, the original model, a seed, a folder.

    Attributes:
        fit: model-ready batches of the fit split (dicts of tensors with `labels`, -100 outside the answer).
        walk: `walk(where, name)` streams the fit split block by block; see calib/walk.py. Resumes at the last finished
            block when `scratch` is set.
        teacher: context manager that lends the ORIGINAL model (eval mode, no gradients).
        seed: every random choice of the pass derives from it.
        progress: see `Progress`.
        scratch: a folder of this pass, kept across a kill; None where nothing is to be resumed.
        recovery: `recovery(batch_size, start)` yields fresh training batches from number `start` on, always the same
            ones, without end, where the data has such a source.
        source: `source(spec)` gives such batches from other data (a file, a folder; calib/sources.py), which may end.
        seconds: where the time of the walks goes (calib/clock.py); it ends up in the notes.
    """

    fit: Sequence[Mapping[str, Any]]
    walk: Callable[..., Any]
    teacher: Callable[[], Any]
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    scratch: Path | None = None
    recovery: Batches | None = None
    source: Callable[[str], Batches] | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """Base of every pass. Settings are the fields; see the module's docstring for the verbs."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs_data: ClassVar[bool] = True
    removes_blocks: ClassVar[bool] = False
    names_blocks: ClassVar[bool] = False  # its settings name blocks by number: a model with two would not do

    def requires(self, model: ModelView, ctx: Context) -> None:
        """Raise `Unmet` if this pass cannot do its work on `model`; touches nothing."""

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        raise TypeError(f"{type(self).__name__} does not define apply")

    def ensures(self, model: ModelView) -> None:
        """Raise `PromiseBroken` if what this pass promised no longer holds of `model`."""

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        """Redo the change of shape or code on a fresh model. Passes that only change weights need nothing."""

    def weaker(self) -> Self | None:
        """The next rung of the ladder that `on_fail: retry` walks: a milder copy, or None at the end."""
        return None

    def controls(self) -> tuple[tuple[str, dict[str, Json]], ...]:
        """Passes (name, settings) to be measured in this one's place: it has to beat them. Costs a measurement each."""
        return ()

    def brief(self) -> Self:
        """The same pass with the least work, for the rehearsal before a long run."""
        return self

    def settings(self) -> dict[str, Json]:
        """The settings as plain YAML/JSON values; `from_settings` turns them back."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Json], *, where: str = "") -> Self:
        """Build the pass from recipe values.

        Raises:
            RecipeError: an unknown setting or a value of the wrong kind.
        """
        place = where or f"pass {cls.name}"
        known = {f.name for f in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        values = {}
        for key, value in settings.items():
            if key not in known:
                raise RecipeError(f"{cls.name} has no setting '{key}'", where=place, change=did_you_mean(key, known))
            values[key] = _fit_type(value, hints[key], key, place)
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{cls.name}: {error}", where=place, found=str(dict(settings))) from error


def _plain(value: Any) -> Json:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _fit_type(value: Any, hint: Any, key: str, place: str) -> Any:
    """`value` as the annotation `hint` wants it (int to float, list to tuple), or a RecipeError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = RecipeError(
        f"'{key}' has a value of the wrong kind", where=place, found=repr(value), change=f"give {_spell(hint)}"
    )
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _fit_type(value, option, key, place)
            except RecipeError:
                continue
        raise wrong
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        if isinstance(value, str):
            wrong.change = did_you_mean(value, [str(a) for a in args])
        raise RecipeError(wrong.what, where=place, found=repr(value), change=wrong.change)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else None
        if items is None:
            raise wrong
        return tuple(_fit_type(v, args[0], key, place) for v in items)
    if hint is type(None):
        if value is None:
            return None
        raise wrong
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise wrong


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin is tuple:
        return f"a list (each {_spell(args[0])})"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(a) for a in args)
    return {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}.get(hint, "null")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; the former mode afterwards."""
    import torch

    was, changed = model.training, any(module.training for module in model.modules())
    if changed:  # setting the mode of every module costs more than many a block's forward
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if changed:
            model.train(was)
