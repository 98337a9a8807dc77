"""Which change of a model's config gives it the wanted shapes.

No table of families: a handful of keys that configs use for widths and head counts are tried (for a residual stream
those that the anatomy row names), the model is built from the edited config on the meta device (no memory, no data),
and its shapes are compared with the wanted ones. What passes is what a stock `from_pretrained` will build; what does
not is refused with the tensor that stands in the way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from ...compress.blueprint import Shapes, blueprint, config_tree, shapes_of
from ...compress.errors import Unmet
from ._groups import Target, mlp_of
from ._hidden import Dim, Reading, Stream, Wish, stream_linears
from ._shapes import BIAS_KEYS, DIM_KEY, HEAD_KEYS, KV_KEY, MLP_KEYS, Edits, config_place, edit

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView


@dataclass(frozen=True)
class Fit:
    """What becomes narrower, and how the config says it.

    Attributes:
        targets: those that were asked for, then `implied` more that the same config keys decide (an MLP whose inner
            width is a residual stream's).
        edits: of the config. built: the model of the edited config, on the meta device; None where no config is to say
            the shapes, and the targets are still whole.
        idle: dimensions of modules that the anatomy ignores, which the same keys make narrower: any channels may go.
        shifted: the linears whose bias makes up for the mean of what they read no more; `unshifted` cannot hold one.
    """

    targets: list[Target]
    streams: list[Stream]
    edits: Edits
    built: nn.Module | None
    implied: int = 0
    idle: Mapping[Dim, int] = field(default_factory=dict)
    shifted: tuple[str, ...] = ()
    unshifted: tuple[str, ...] = ()


def find_fit(view: ModelView, targets: Sequence[Target], wishes: Sequence[Wish] = ()) -> Fit:
    """The config edits after which the model has the shapes of `targets` and `wishes`.

    Raises:
        Unmet: no stock config says these shapes.
    """
    model = view.model
    now = shapes_of(model)
    search = _Search(view, copy.deepcopy(model.config), now, list(targets))
    for wish in wishes:
        search.narrow(wish)
    search.resize()
    missing = sorted(place for place, size in search.claims.items() if search.current[place[0]][place[1]] != size)
    if missing:
        name, dim = missing[0]
        found = f"{name} {now[name]} to become {search.claims[missing[0]]} wide in dimension {dim}"
        raise Unmet(
            "no stock config expresses these shapes, so `from_pretrained` could not load them",
            found="; ".join([found, *search.obstacles]),
            change="select all blocks of the part, or another 'what' or 'where'"
            + (", or heads and hidden together" if any(t.kind == "heads" for t in targets) and not wishes else ""),
        )
    implied = len(search.targets) - len(targets)
    return Fit(search.targets, search.streams, search.edits, search.built, implied, search.idle)


class _Search:
    """Edits accepted so far, and the model that they give."""

    def __init__(self, view: ModelView, config: Any, now: Shapes, targets: list[Target]) -> None:
        self.view, self.config, self.targets = view, config, targets
        self.claims = claims_of(targets, now)
        self.built = blueprint(view.model, config)
        self.current = shapes_of(self.built)
        self.edits: Edits = {}
        self.idle: dict[Dim, int] = {}
        self.streams: list[Stream] = []
        self.obstacles: list[str] = []

    def _attempt(self, trial: Edits) -> tuple[Any, nn.Module] | None:
        """The config after `trial` and its model; None where transformers refuses."""
        config = edit(copy.deepcopy(self.config), trial)
        try:
            return config, blueprint(self.view.model, config)
        except Exception as error:  # configs refuse head counts in their own ways
            self.obstacles.append(f"{_say(trial)}: {str(error).strip().splitlines()[-1].strip()}")
            return None

    def _accept(self, trial: Edits, config: Any, built: nn.Module) -> None:
        self.edits |= trial
        self.config, self.built, self.current = config, built, shapes_of(built)

    def _ignored(self, name: str) -> bool:
        """Whether the tensor belongs to what the anatomy leaves out: nothing reads what it computes."""
        return any(fnmatchcase(name.rpartition(".")[0], pattern) for pattern in self.view.family.ignored)

    def resize(self) -> None:
        """Try the keys of MLP widths and head counts, one after the other."""
        for trial in _candidates(self.config, self.targets):
            if all(self.current[name][dim] == size for (name, dim), size in self.claims.items()):
                break
            attempt = self._attempt(trial)
            if attempt is None:
                continue
            shapes = shapes_of(attempt[1])
            changed = changes(self.current, shapes)
            others = {place: size for place, size in changed.items() if self.claims.get(place) != size}
            idle = {(name, dim): size for (name, dim), size in others.items() if size > 0 and self._ignored(name)}
            wrong = sorted(name for name, _ in others.keys() - idle.keys())
            if wrong:
                self.obstacles.append(f"{_say(trial)} would also change {wrong[0]}")
            elif changed:
                self._accept(trial, *attempt)
                self.idle |= idle
            else:
                self.obstacles.append(f"{_say(trial)} would change nothing")

    def narrow(self, wish: Wish) -> None:
        """Try the keys of a residual stream: alone, with the heads' width said, and with the part's heads.

        Raises:
            Unmet: none of these says it.
        """
        reading = Reading(self.view)
        readers, writers = stream_linears(self.view, wish.part)
        anchors = {(f"{ref.path}.weight", 1) for ref in readers} | {(f"{ref.path}.weight", 0) for ref in writers}
        if wish.part == "language":
            anchors.add((f"{self.view.table.path}.weight", 1))
        failed: list[str] = []
        hopeless = set()
        for kind, size, trial, tied in _widths(self.view, self.config, wish, self.targets):
            if kind in hopeless:
                continue
            attempt = self._attempt(trial)
            if attempt is None:
                failed.append(self.obstacles.pop())
                continue
            hopeless.add(kind)  # the config bears it: what its shapes lack now, they lack at every size
            shapes = shapes_of(attempt[1])
            try:
                tally = reading.explain(self.current, shapes, self.claims, wish.width, size, tied)
            except ValueError as error:
                failed.append(f"{_say(trial)} {error}")
                continue
            wrong = reading.held_heads(attempt[1], [*self.targets, *tally.implied])
            silent = sorted(name for name, dim in anchors - set(tally.slices))
            if wrong or silent:
                failed.append(f"{_say(trial)} {wrong or f'would not change {silent[0]}'}")
                continue
            self._accept(trial, *attempt)
            self.targets += tally.implied
            self.claims |= claims_of(tally.implied, shapes_of(self.view.model))
            paths = tuple(ref.path for ref in readers), tuple(ref.path for ref in writers)
            self.streams.append(Stream(wish.part, wish.width, size, tally.slices, *paths))
            return
        keys = self.view.family.widths.get(wish.part, ())
        raise Unmet(
            f"no stock config expresses a narrower residual stream of the {wish.part} part",
            where=", ".join(keys) or f"widths of the anatomy row '{self.view.family.name}'",
            found="; ".join(failed[:4]) or f"no config key that says {wish.width}",
            change="prune mlp or heads of this part" if "heads" in str(failed) else "take another 'what'",
        )


def with_biases(view: ModelView, fit: Fit) -> Fit:
    """The fit with a bias in each linear that reads a target's channels, where a stock config can say that.

    What a config key adds besides (biases of queries, keys and values) holds zeros.
    """
    readers = [target.reader for target in fit.targets]
    if fit.built is None:
        return replace(fit, shifted=tuple(readers))
    config = edit(copy.deepcopy(view.model.config), fit.edits)
    edits, built = dict(fit.edits), fit.built
    shapes = shapes_of(built)
    for place, part in [*config_tree(config)]:
        for key in BIAS_KEYS:
            lacking = {f"{path}.bias" for path in readers} - set(shapes)
            if not lacking or vars(part).get(key) is not False:
                continue
            setattr(part, key, True)
            attempt = blueprint(view.model, config)
            after = shapes_of(attempt)
            more = set(after) - set(shapes)
            if more & lacking and all(name.endswith(".bias") for name in more) and shapes.items() <= after.items():
                edits[f"{place}{key}"], built, shapes = True, attempt, after
            else:
                setattr(part, key, False)
    shifted = tuple(path for path in readers if f"{path}.bias" in shapes)
    unshifted = tuple(path for path in readers if path not in shifted)
    return replace(fit, edits=edits, built=built, shifted=shifted, unshifted=unshifted)


def check_uncounted(view: ModelView, targets: Sequence[Target]) -> None:
    """Refuse heads whose number a block keeps in places other than the shapes of its linears.

    Raises:
        Unmet: no stock config says fewer heads at all, or attention modules hold the number.
    """
    parts = {t.unit.part for t in targets if t.kind == "heads"}
    fewer = [
        Target(unit, "heads", (a.n_kv_heads - 1) * (a.n_heads // a.n_kv_heads), a.n_kv_heads - 1)
        for part in parts
        for unit in view.parts[part]
        if (a := unit.attention) is not None and a.n_kv_heads > 1
    ]
    if not fewer:
        return
    built = find_fit(view, fewer).built
    assert built is not None
    for target in fewer:
        path = target.attention.module
        theirs = vars(built.get_submodule(path))
        for key, value in vars(view.model.get_submodule(path)).items():
            if type(value) is int and theirs.get(key, value) != value:
                raise Unmet(
                    "blocks of this model count their heads, so they cannot lose different numbers of them",
                    where=f"{path}.{key}",
                    change="allocation: uniform, or leave heads out of 'what'",
                )


def claims_of(targets: Sequence[Target], names: Mapping[str, Any]) -> dict[Dim, int]:
    """The dimensions of `targets`' linears that change, with their sizes afterwards."""
    claims: dict[Dim, int] = {}
    for target in targets:
        for (path, axis), index in target.keep(target.first()).items():
            claims[f"{path}.weight", 0 if axis == "out" else 1] = len(index)
            if axis == "out" and f"{path}.bias" in names:
                claims[f"{path}.bias", 0] = len(index)
    return claims


def changes(before: Shapes, after: Shapes) -> dict[Dim, int]:
    """The dimensions that differ, with their sizes afterwards; -1 where a tensor comes, goes or turns."""
    found: dict[Dim, int] = {}
    for name in {*before, *after}:
        old, new = before.get(name, ()), after.get(name, ())
        if len(old) != len(new):
            found[name, 0] = -1
        else:
            found |= {(name, dim): now for dim, (was, now) in enumerate(zip(old, new)) if was != now}
    return found


def _widths(
    view: ModelView, config: Any, wish: Wish, targets: Sequence[Target]
) -> Iterator[tuple[str, int, Edits, tuple[int, int]]]:
    """(kind, channels that stay, edits, heads that these edits leave) worth trying for a stream, the best first."""
    keys = [
        kept
        for key in view.family.widths.get(wish.part, ())
        if (kept := _kept_name(config, key)) and _value(config, kept) == wish.width
    ]
    if not keys:
        return
    first = keys[0]
    place = first.rpartition(".")[0]
    place += "." if place else ""
    heads = [t for t in targets if t.kind == "heads" and t.unit.part == wish.part]
    dims = {unit.attention.head_dim for unit in view.parts[wish.part] if unit.attention}
    width = {f"{place}{DIM_KEY}": next(iter(dims))} if len(dims) == 1 else {}
    counts = {(t.size, t.groups, t.attention.n_heads, t.attention.n_kv_heads) for t in heads}
    count: Edits = {}
    n = kv = 0
    if width and len(counts) == 1:
        ((n, kv, n_before, kv_before),) = counts
        count = {place + key: n for key in HEAD_KEYS if _value(config, place + key) == n_before}
        if _value(config, place + KV_KEY) == kv_before:
            count[place + KV_KEY] = kv
    for size in wish.sizes:
        trial: Edits = dict.fromkeys(keys, size)
        yield "plain", size, trial, (0, 0)
        if width:
            yield "with the heads' width", size, trial | width, (0, 0)
        if count:  # configs that want the one to be a multiple of the other
            yield "with the heads' number and width", size, trial | count | width, (n, kv)
    tied = n * next(iter(dims), 0)
    if count and tied < wish.width and tied % wish.multiple == 0:
        yield "with the heads", tied, dict.fromkeys(keys, tied) | count, (n, kv)


def _kept_name(config: Any, path: str) -> str | None:
    """A dotted place under the name that the config keeps it by; None where it has no such sub-config."""
    place, dot, _ = path.rpartition(".")
    if place + dot not in dict(config_tree(config)):
        return None
    return place + dot + config_place(config, path)[1]


def _value(config: Any, path: str) -> Any:
    """What the config keeps at a dotted place; None where it keeps nothing there."""
    place, dot, key = path.rpartition(".")
    return vars(dict(config_tree(config))[place + dot]).get(key)


def _candidates(config: Any, targets: Sequence[Target]) -> Iterator[Edits]:
    """Edits of widths and head counts worth trying, each on top of those accepted before."""
    widths = {(mlp_of(t.unit).width, t.size) for t in targets if t.kind == "mlp"}
    for old, new in sorted(widths):
        for place, part in config_tree(config):
            for key in MLP_KEYS:
                if vars(part).get(key) == old:
                    yield {f"{place}{key}": new}
    heads = {(t.attention.n_heads, t.attention.n_kv_heads, t.attention.head_dim, t.size, t.groups)
             for t in targets if t.kind == "heads"}  # fmt: skip
    for n_heads, n_kv, head_dim, new_heads, new_kv in sorted(heads):
        for place, part in config_tree(config):
            for key in HEAD_KEYS:
                if vars(part).get(key) != n_heads:
                    continue
                trial = {f"{place}{key}": new_heads, f"{place}{DIM_KEY}": head_dim}
                if vars(part).get(KV_KEY) == n_kv:
                    trial[f"{place}{KV_KEY}"] = new_kv
                yield trial


def _say(trial: Edits) -> str:
    return ", ".join(f"{key}={value}" for key, value in trial.items())
