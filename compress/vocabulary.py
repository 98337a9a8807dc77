"""A model that speaks fewer tokens: which rows its tables lose, and how its config numbers the rest.

The rows that stay keep their order, so a token's new id is the rank of its old one among them. Ids beyond the table
(placeholders of images, in some families) stay as far beyond its end as they were. `ModelView.vocabulary` says which
ids the rows of a narrowed model have in the original.

No table of families: vocabulary sizes and ids are edited wherever the configs say them, the model of the edited config
is built on the meta device, and whatever dimension became shorter there is cut. So a stock `from_pretrained` loads the
result.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .anatomy import ModelView
from .base import Json
from .blueprint import blueprint, config_tree, shapes_of
from .errors import Unmet, UsageError
from .runtime import layered
from .runtime.grid import Grid
from .runtime.reduce import installed

SIZE = "vocab_size"
ID_KEY = re.compile(r"(^|_)tokens?_(ids?|index|indices)$")
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
UNNUMBERED = ("sequence_bias", "forced_decoder_ids")  # ids between other numbers


@dataclass(frozen=True)
class Numbering:
    """Old ids to new ones.

    Attributes:
        kept: old ids of the rows that stay, ascending. rows: of the table before.
    """

    kept: tuple[int, ...]
    rows: int

    @cached_property
    def _ranks(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.kept)}

    def __call__(self, old: int) -> int:
        """KeyError where that row goes. Negative numbers stand for no token and stay."""
        if old < 0:
            return old
        return self._ranks[old] if old < self.rows else old - self.rows + len(self.kept)


def is_id_key(key: str) -> bool:
    """Whether a setting of this name holds ids of tokens."""
    return bool(ID_KEY.search(key)) or key in ID_LISTS


def each_id(value: Json, number: Callable[[int], int]) -> Json:
    """`value` with `number` applied to every whole number in it."""
    if isinstance(value, (list, tuple)):
        return type(value)(each_id(entry, number) for entry in value)
    return number(value) if type(value) is int else value


def table_rows(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def named_ids(model: Any) -> set[int]:
    """Every id that the model's configs refer to, generation's included.

    Raises:
        Unmet: a setting of generation that no numbering is known for.
    """
    found: set[int] = set()

    def note(i: int) -> int:
        found.add(i)
        return i

    for part, key in _id_places(model, table_rows(model)):
        each_id(vars(part)[key], note)
    for generation in _generation_configs(model):
        for key in UNNUMBERED:
            value = vars(generation).get(key)
            if value:
                raise Unmet(f"generation_config.{key} holds ids that cannot be renumbered", found=str(value)[:80])
    return {i for i in found if i >= 0}


def _configs(model: Any, rows: int) -> Iterator[Any]:
    """Every config on the model once, also the copies that modules keep; not those of another vocabulary."""
    seen: set[int] = set()
    for module in model.modules():
        config = vars(module).get("config")
        if config is None or not hasattr(config, "sub_configs"):
            continue
        for _, part in config_tree(config):
            if id(part) not in seen and vars(part).get(SIZE, rows) == rows:
                yield part
            seen.add(id(part))


def _generation_configs(model: Any) -> Iterator[Any]:
    found = (vars(module).get("generation_config") for module in model.modules())
    yield from {id(config): config for config in found if config is not None}.values()


def _id_places(model: Any, rows: int) -> Iterator[tuple[Any, str]]:
    """(config, name) of every setting that holds ids."""
    for part in (*_configs(model, rows), *_generation_configs(model)):
        for key, value in list(vars(part).items()):
            if is_id_key(key) and value is not None:
                yield part, key


@dataclass(frozen=True)
class Cut:
    """What a model loses.

    Attributes:
        numbering: of the tokens. axes: name of a tensor -> the dimension that becomes shorter.
        counts: (module, attribute) -> the number that it holds afterwards.
    """

    numbering: Numbering
    axes: dict[str, int]
    counts: dict[tuple[str, str], int]


def find_cut(view: ModelView, kept: Sequence[int]) -> Cut:
    """What goes when only the rows `kept` of the token embedding stay, `named_ids` among them; touches nothing.

    Raises:
        Unmet: no stock config says the shapes that would be left, or a weight is quantized in blocks that span rows.
    """
    model = view.model
    rows = table_rows(model)
    numbering = Numbering(tuple(kept), rows)
    edited = copy.deepcopy(model.config)
    for _, part in config_tree(edited):
        if vars(part).get(SIZE, rows) == rows:
            for key, value in list(vars(part).items()):
                if is_id_key(key) and value is not None:
                    setattr(part, key, each_id(value, numbering))
            if SIZE in vars(part):
                setattr(part, SIZE, len(kept))
    try:
        before, after = blueprint(model, model.config), blueprint(model, edited)
    except Exception as error:  # configs refuse sizes in their own ways
        raise Unmet(
            f"the config does not take a vocabulary of {len(kept)} tokens", found=f"{type(error).__name__}: {error}"
        ) from error
    axes = _axes(before, after, rows, len(kept))
    new: Any = after
    tables = {"the token embedding": new.get_input_embeddings(), "the head": new.get_output_embeddings()}
    for what, table in tables.items():
        if table is None or table.weight.shape[0] != len(kept):
            found = "none" if table is None else f"{table.weight.shape[0]} rows for {len(kept)} tokens"
            raise Unmet(f"the config's vocabulary size does not decide about {what}", found=found)
    theirs, counts = dict(after.named_modules()), {}
    for name, mine in before.named_modules():
        for key, value in vars(mine).items():
            other = vars(theirs[name]).get(key)
            if type(value) is int and type(other) is int and other != value:
                counts[name, key] = other
    cut = Cut(numbering, axes, counts)
    _grids(view, cut)
    return cut


def _axes(before: nn.Module, after: nn.Module, rows: int, left: int) -> dict[str, int]:
    old, new = shapes_of(before), shapes_of(after)
    axes = {}
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        pairs = list(zip(old.get(name, ()), new.get(name, ())))
        changed = [axis for axis, (a, b) in enumerate(pairs) if a != b]
        if len(changed) != 1 or pairs[changed[0]] != (rows, left):
            raise Unmet(
                "another vocabulary size would also change what is no vocabulary",
                where=name,
                found=f"{old.get(name)} would become {new.get(name)}",
            )
        axes[name] = changed[0]
    return axes


def narrow(view: ModelView, cut: Cut) -> None:
    """Take the rows off `view` in place: embedding, head, grids, config, and what later passes ask for by id."""
    numbering, model = cut.numbering, view.model
    kept = torch.tensor(numbering.kept)
    places = list(_id_places(model, numbering.rows))
    sized = [part for part in _configs(model, numbering.rows) if SIZE in vars(part)]
    old = {id(t): cut.axes[name] for name, t in model.state_dict(keep_vars=True).items() if name in cut.axes}
    for path, grid in _grids(view, cut):
        zero = None if grid.zero is None else grid.zero[kept]
        view.grids[path] = replace(grid, scale=grid.scale[kept], zero=zero)
    fresh: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for key, tensor in slots.items():
                if id(tensor) in old:
                    if id(tensor) not in fresh:
                        fresh[id(tensor)] = _rows(tensor, kept, old[id(tensor)])
                    slots[key] = fresh[id(tensor)]
    for part, key in places:
        setattr(part, key, each_id(vars(part)[key], numbering))
    for part in sized:
        setattr(part, SIZE, len(numbering.kept))
    for (path, key), value in cut.counts.items():
        setattr(model.get_submodule(path), key, value)
    for mechanism in (installed(model), layered.installed(model)):
        if mechanism is not None:
            mechanism.image_token_id = numbering(mechanism.image_token_id)
    view.vocabulary = composed(view.vocabulary, numbering.kept)
    view.refresh()


def _grids(view: ModelView, cut: Cut) -> list[tuple[str, Grid]]:
    """The grids that lose rows.

    Raises:
        Unmet: a weight's blocks span its rows.
    """
    found = []
    for path, grid in view.grids.items():
        if f"{path}.weight" in cut.axes:
            if not isinstance(grid, Grid):
                raise Unmet(
                    "the rows of this weight share their scales",
                    where=path,
                    found=f"a {type(grid).__name__.lower()}",
                    change="put prune.vocabulary before the quantizing pass, or leave the head out of that",
                )
            found.append((path, grid))
    return found


def _rows(tensor: Any, kept: torch.Tensor, axis: int) -> torch.Tensor:
    chosen = tensor.detach().index_select(axis, kept.to(tensor.device))
    return nn.Parameter(chosen, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else chosen


def composed(first: Sequence[int] | None, second: Sequence[int]) -> tuple[int, ...]:
    """Ids in the original of the rows that stay after two cuts."""
    return tuple(second) if first is None else tuple(first[i] for i in second)


def speaking(original: ModelView, vocabulary: tuple[int, ...] | None, processor: Any) -> ModelView:
    """The original with the rows of `vocabulary` alone; it shares every other tensor with `original`.

    Its logits of those tokens are the original's. A softmax over them leaves out what the original gave to others.

    Raises:
        UsageError: the original lacks some of the tokens.
    """
    mine = original.vocabulary or range(table_rows(original.model))
    kept = [bisect_left(mine, token) for token in vocabulary or ()]
    if not kept or any(i == len(mine) or mine[i] != token for i, token in zip(kept, vocabulary or ())):
        raise UsageError(
            "the model speaks tokens that its original lacks",
            where=str(original.source),
            change="compare it with the original that it was made from",
        )
    shared = {id(t): t for t in (*original.model.parameters(), *original.model.buffers())}
    view = ModelView(copy.deepcopy(original.model, shared), processor, original.family, original.source)
    view.storage_dtype, view.vocabulary, view.sight = original.storage_dtype, original.vocabulary, original.sight
    view.ledger, view.grids = original.ledger, dict(original.grids)
    narrow(view, find_cut(view, kept))
    return view


def ranges(ids: Sequence[int]) -> str:
    """Ascending ids as text: ``0-258 300 412-415``."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def from_ranges(text: str) -> tuple[int, ...]:
    """The inverse of `ranges`."""
    pairs = (run.split("-") for run in text.split())
    return tuple(i for pair in pairs for i in range(int(pair[0]), int(pair[-1]) + 1))
