"""A model with some of its parts taken back from its original, by reference, and both as they were afterwards.

Every module belongs to one part: what lies in the vision tower to ``vision``, what lies in the decoder to ``language``,
but for the token ``embeddings`` and for what the connector or the head alone reads (the norm before it, by the family's
row). What is left between these belongs to the ``connector``. Three parts are no modules: ``tokens`` is the mechanism
that takes visual tokens away before the decoder (with the blocks that `fuse.prefuse` put there), ``cache`` the packing
of keys and values, ``pictures`` the size in which pictures are shown. A mechanism inside the tower or the decoder
(merging, rules on blocks, rounded inputs) goes with its part.

A part that was made narrower fits no part that was not: such parts are one `Group`, and so is a head that shares its
weight with the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from torch import nn

from .anatomy import ModelView
from .blueprint import config_tree
from .origins import origin
from .runtime import kv_cache, prefusion, reduce
from .runtime.hooks import owner
from .runtime.layered import Layered
from .runtime.rules import RULE
from .runtime.tower import Reader, Watch
from .units import Unit

ORDER = ("pictures", "vision", "connector", "tokens", "language", "embeddings", "head", "cache")
LAYER = "layer_idx"  # attribute of an attention module: its layer in the cache
STATES = ("vision_feature_layer",)  # settings of a whole model that number the tower's blocks
HOOKS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}


@dataclass(frozen=True)
class Group:
    """Parts that can only be taken back together.

    Attributes:
        parts: of `ORDER`. why: what keeps them together, a sentence for each reason; none for a part by itself.
    """

    parts: tuple[str, ...]
    why: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``vision``, or ``connector + language``."""
        return " + ".join(self.parts)


class Parts:
    """What a small model is made of, beside its original.

    Args:
        small: the model that is changed inside `restored`. original: gives the parts; it speaks the same tokens
            (`vocabulary.speaking`). Both have run once: transformers puts hooks onto a model when it first runs.
    """

    def __init__(self, small: ModelView, original: ModelView) -> None:
        self.small, self.original = small, original
        self._mine, self._theirs = (dict(v.model.named_modules(remove_duplicate=False)) for v in (small, original))
        self._owners = _owners(original) | _owners(small)
        self._roots = {
            path: part
            for path, part in sorted(self._owners.items(), key=lambda item: item[0].count("."))
            if part and path and part != self._owners[path.rpartition(".")[0]]
        }
        self._shell = [path for path, part in self._owners.items() if not part]

    # -- which parts there are -----------------------------------------------------------------------------------------

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The parts of the small model, those together that fit only together; in forward order."""
        there = set(self._owners.values()) - {""}
        there |= {"connector"} if self._bare(self._mine) else set()
        there |= {"pictures"} if self.small.sight != self.original.sight else set()
        there |= {"cache"} if kv_cache.installed(self.small.model) is not None else set()
        groups = [Group((part,)) for part in ORDER if part in there]
        for parts, why in self._ties(there):
            joined = [group for group in groups if set(group.parts) & parts]
            members = {part for group in joined for part in group.parts}
            reasons = [*(reason for group in joined for reason in group.why), why]
            merged = Group(tuple(part for part in ORDER if part in members), tuple(dict.fromkeys(reasons)))
            groups = [merged if group is joined[0] else group for group in groups if group not in joined[1:]]
        return tuple(groups)

    def _ties(self, there: Collection[str]) -> Iterator[tuple[set[str], str]]:
        """Parts that are there and meet in another shape than in the original, and that shape."""
        both = (self.small, self.original)
        reader = {"connector"} & set(there) or {"language"}
        if any(view.tied_embeddings for view in both):
            yield {"embeddings", "head"} & set(there), "the embedding and the head are one tensor"
        widths: list[tuple[str, set[str], Callable[[ModelView], int | None]]] = [
            ("the vision tower's tokens", {"vision", *reader}, lambda view: _width(view, "vision")),
            ("an embedding", {"embeddings", "language", *reader}, lambda view: view.table.module.embedding_dim),
            ("the language model's states", {"language", "head"}, lambda view: _width(view, "language")),
            ("what the head reads", {"language", "head"}, _head),
        ]
        for what, parts, measure in widths:
            here, before = map(measure, both)
            if here != before:
                tokens = {"tokens"} if "language" in parts and prefusion.SLOT in self._mine else set()
                found = f"{what}: {here} channels here, {before} in the original"
                yield (parts | tokens) & set(there), found
        if "pictures" in there and any("side" in entry for entry in self.small.sight):
            yield {"pictures", "vision", "connector"} & set(there), "tables of positions have the size of the pictures"

    def unchanged(self, group: Group) -> bool:
        """Whether these parts are bit for bit those of the original, with nothing put onto them."""
        if {"tokens", "cache", "pictures"} & set(group.parts):
            return False
        paths = [
            {path for path in modules if self._owners.get(path) in group.parts}
            for modules in (self._mine, self._theirs)
        ]
        bare = "connector" in group.parts
        return (
            paths[0] == paths[1]
            and all(_same(self._mine[path], self._theirs[path]) for path in paths[0])
            and (not bare or all(_equal(t, self._bare(self._theirs).get(k)) for k, t in self._bare(self._mine).items()))
        )

    def _bare(self, modules: Mapping[str, nn.Module]) -> dict[tuple[str, str, str], torch.Tensor]:
        """Tensors that lie between the parts, outside of their modules: the connector's."""
        return {
            (path, slots, key): tensor
            for path in self._shell
            for slots in ("_parameters", "_buffers")
            for key, tensor in vars(modules[path])[slots].items()
            if tensor is not None
        }

    def inside(self, part: str) -> tuple[str, ...]:
        """The parts that have modules inside those of `part`, itself among them."""
        paths = [path for path, mine in self._roots.items() if mine == part]
        found = {mine for path, mine in self._roots.items() if any(f"{path}.".startswith(f"{p}.") for p in paths)}
        return tuple(part for part in ORDER if part in found)

    def blocks(self, part: str) -> list[tuple[Unit, Unit]]:
        """The units of a part, each with the one that it was in the original. Unmet where nobody recorded it."""
        units = [unit for unit in self.small.parts.get(part, ()) if not unit.added]
        return [(unit, origin(self.small, self.original, unit, "attribution")) for unit in units]

    def gone(self, part: str) -> list[str]:
        """Names of the original's units of a part that the small model lacks."""
        stayed = {there.name for _, there in self.blocks(part)}
        return [unit.name for unit in self.original.parts.get(part, ()) if unit.name not in stayed]

    @staticmethod
    def fits(here: Unit, there: Unit) -> bool:
        """Whether one could stand in the other's place: what enters and what leaves is as wide."""

        def ends(unit: Unit) -> list[Any]:
            if not unit.linears:
                return [tuple(tensor.shape) for tensor in unit.module.parameters()]
            crossed = [ref.module.in_features for ref in unit.linears if ref.role == "cross.k"]
            return [unit.linears[0].module.in_features, unit.linears[-1].module.out_features, *crossed]

        return ends(here) == ends(there)

    @staticmethod
    def same(here: Unit, there: Unit) -> bool:
        """Whether they are bit for bit the same, with nothing put onto either."""
        pair = [dict(unit.module.named_modules()) for unit in (here, there)]
        return pair[0].keys() == pair[1].keys() and all(_same(pair[0][path], pair[1][path]) for path in pair[0])

    # -- taking them back ----------------------------------------------------------------------------------------------

    @contextmanager
    def restored(self, parts: Collection[str] = (), blocks: Iterable[tuple[Unit, Unit]] = ()) -> Iterator[None]:
        """Inside, the small model has these parts of the original; afterwards both are exactly as they were.

        Args:
            parts: whole groups of them, for it to run. ``pictures`` is left to the caller, who makes the batches.
            blocks: pairs of `blocks`. The original's stands in for the small one's; where the part is restored, it is
                the other way round and the small one's stays.
        """
        with undone(self.small.model, self.original.model):
            self._take(set(parts))
            for here, there in blocks:
                if here.part in parts:
                    new, old, path = here.module, there.module, there.path
                else:
                    new, old, path = there.module, here.module, here.path
                _carry(old, new)
                _number(new, old)
                self._put(path, new)
            yield

    def _take(self, parts: set[str]) -> None:
        model, reduction = self.small.model, reduce.installed(self.small.model)
        form = kv_cache.installed(model)
        if "tokens" in parts:
            reduce.remove(model)
        for path, part in self._roots.items():
            self._put(path, (self._theirs if part in parts else self._mine).get(path))
        if "connector" in parts:
            for (path, slots, key), tensor in self._bare(self._theirs).items():
                vars(self._mine[path])[slots][key] = tensor
        for part, path in (("vision", self.small.tower_path), ("language", self.small.decoder_path)):
            config = self._theirs[path].__dict__.get("config")
            if part in parts and config is not None:
                self._configure(part, type(config))
        if "pictures" in parts:
            self._count()
        if reduction is not None and "tokens" not in parts:
            if "language" in parts:
                _carry(self._mine[self.small.decoder_path], self._theirs[self.small.decoder_path])
            if "vision" in parts and reduction.watch is not None:
                read = reduction.watch.reader
                hooks = self._mine[read.path]._forward_pre_hooks
                for key in [key for key, hook in hooks.items() if owner(hook) is reduction.watch]:
                    del hooks[key]
                stack = [unit for unit in self.original.parts["vision"] if unit.stack is not None]
                reduction.watch = Watch(Reader.of(self.original.tower_path, stack, read.cells))
                reduction.watch.install(model)
        if "cache" in parts:
            kv_cache.remove(model)
        elif form is not None:
            kv_cache.install(model, form)

    def _put(self, path: str, module: nn.Module | None) -> None:
        parent, _, name = path.rpartition(".")
        children = self.small.model.get_submodule(parent)._modules
        if module is None:
            children.pop(name, None)
        else:
            children[name] = module

    def _configure(self, part: str, kind: type) -> None:
        """What the modules around a part are told of it, numbers of layers above all, is what the original's are."""
        for path in self._shell:
            mine, theirs = (modules[path].__dict__ for modules in (self._mine, self._theirs))
            if mine.get("config") is None:
                continue
            settings: dict[str, Any] = vars(mine["config"])
            if type(mine["config"]) is kind:
                mine["config"] = theirs["config"]
                continue
            for key, value in settings.items():
                if type(value) is kind or (part == "vision" and key in STATES):
                    settings[key] = vars(theirs["config"])[key]

    def _count(self) -> None:
        """What the modules around the parts count, pictures' patches and tokens, is what the original's count."""
        for path in self._shell:
            mine, theirs = (modules[path].__dict__ for modules in (self._mine, self._theirs))
            pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [(mine, theirs)]
            if mine.get("config") is not None:
                pairs.append((vars(mine["config"]), vars(theirs["config"])))
            for old, new in pairs:
                old.update({key: new[key] for key, value in old.items() if type(value) is int and key in new})


# --------------------------------------------------------------------------------------------------------- small tools


@contextmanager
def undone(*models: nn.Module) -> Iterator[None]:
    """What is done inside to modules, their attributes, hooks and configs is undone afterwards, also after an error.

    Values of tensors are not looked after.
    """
    from transformers import PreTrainedConfig

    found: dict[int, Any] = {}
    for model in models:
        for module in model.modules():
            found[id(module)] = module
            config = vars(module).get("config")
            if isinstance(config, PreTrainedConfig):
                found |= {id(part): part for _, part in config_tree(config)}
    held = [
        (vars(one), dict(vars(one)), [(value, dict(value)) for value in vars(one).values() if isinstance(value, dict)])
        for one in found.values()
    ]
    try:
        yield
    finally:
        for values, before, inside in held:
            values.clear()
            values.update(before)
            for inner, was in inside:
                inner.clear()
                inner.update(was)


def _owners(view: ModelView) -> dict[str, str]:
    """Dotted path of every module -> its part; "" for a module that several parts lie in."""
    paths = dict(view.model.named_modules(remove_duplicate=False))
    marks = {view.tower_path: "vision", view.decoder_path: "language"}
    marks |= {unit.path: "tokens" if unit.added else unit.part for unit in view.units}
    for unit in view.units:
        if unit.part in ("connector", "head") and unit.entry and not unit.entry.startswith(f"{unit.path}."):
            marks[unit.entry] = unit.part
    table = view.model.get_input_embeddings().weight
    marks |= {path: "embeddings" for path, m in paths.items() if isinstance(m, nn.Embedding) and m.weight is table}
    marks |= {path: "tokens" for path in paths if path.rpartition(".")[2] in (reduce.SLOT, prefusion.SLOT)}
    owners = {}
    for path in paths:
        above = path
        while above and above not in marks:
            above = above.rpartition(".")[0]
        below = {part for marked, part in marks.items() if marked.startswith(f"{path}." if path else "")}
        owners[path] = marks[above] if above in marks else "" if not path or below - {"connector"} else "connector"
    return owners


def _width(view: ModelView, part: str) -> int | None:
    """Channels of a part's states: what its last block returns."""
    blocks = [unit for unit in view.parts.get(part, ()) if unit.index is not None]
    return blocks[-1].linears[-1].module.out_features if blocks else None


def _head(view: ModelView) -> int | None:
    heads = view.parts.get("head", ())
    return heads[0].linears[0].module.in_features if heads else None


def _mechanism(hook: Any) -> bool:
    return isinstance(owner(hook), (reduce.Reduction, Layered, Watch))


def _carry(old: nn.Module, new: nn.Module) -> None:
    """What a mechanism did to `old`, it does to `new`: hooks, a forward, a rule, a child of its own."""
    mine, theirs = vars(old), vars(new)
    for name, flags in HOOKS.items():
        for key, hook in mine[name].items():
            if _mechanism(hook):
                theirs[name][key] = hook
                for flag in flags:
                    if key in mine[flag]:
                        theirs[flag][key] = mine[flag][key]
    if isinstance(mine.get("forward"), MethodType):
        theirs["forward"] = MethodType(mine["forward"].__func__, new)
    if RULE in mine:
        theirs[RULE] = mine[RULE]
    for name, child in old._modules.items():
        if name not in new._modules:
            new._modules[name] = child


def _number(new: nn.Module, old: nn.Module) -> None:
    """The places in the cache of what stood here before."""
    before = dict(old.named_modules())
    for path, module in new.named_modules():
        if LAYER in vars(module) and path in before and LAYER in vars(before[path]):
            vars(module)[LAYER] = vars(before[path])[LAYER]


def _same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules do the same, their children aside."""

    def put_on(module: nn.Module) -> list[Any]:
        hooks = [hook for name in HOOKS for hook in vars(module)[name].values()]
        inner = [owner(hook) for hook in hooks if not isinstance(owner(hook), (reduce.Reduction, Watch))]
        return [inner, "forward" in vars(module), RULE in vars(module)]

    tensors = [{**module._parameters, **module._buffers} for module in (a, b)]
    return (
        put_on(a) == put_on(b)
        and tensors[0].keys() == tensors[1].keys()
        and all(_equal(t, tensors[1][key]) for key, t in tensors[0].items())
    )


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)
