"""Taking blocks out of a stack, and which change of the model's config says so.

As in `_shapes.py` there is no table of families: the few keys that configs use for numbers of blocks are tried, the
model of the edited config is built on the meta device, and its shapes are compared with those of what is left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ...compress.anatomy import ModelView, Unit
from ...compress.base import Json
from ...compress.blueprint import Shapes, blueprint, config_tree, shapes_of
from ...compress.errors import Unmet
from ._shapes import alike, differing, edit

COUNT_KEYS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "depth")
BLOCK_KEYS = ("fullatt_block_indexes", "deepstack_visual_indexes")  # numbers of blocks
STATE_KEYS = ("vision_feature_layer",)  # numbers of hidden states: 0 comes before the first block, -1 is the last

Positions = Mapping[str, Sequence[int]]  # path of a ModuleList -> places in it, ascending


@dataclass(frozen=True)
class Removal:
    """What makes a model the same without some blocks.

    Attributes:
        positions: the blocks that go. edits: of the config. built: the model of that config, on the meta device.
    """

    positions: Positions
    edits: dict[str, Json]
    built: nn.Module


def place(unit: Unit) -> tuple[str, int]:
    """The list that holds a block, and its place there."""
    path, _, number = unit.path.rpartition(".")
    return path, int(number)


def lists(view: ModelView, units: Sequence[Unit]) -> dict[str, list[Unit]]:
    """The blocks among `units` by the ModuleList that the model calls one after the other."""
    found: dict[str, list[Unit]] = {}
    for unit in units:
        path, _, number = unit.path.rpartition(".")
        if unit.stack is None or not number.isdigit():
            continue
        holder = view.model.get_submodule(path)
        same_kind = {type(block) for block in holder} if isinstance(holder, nn.ModuleList) else set()
        if len(same_kind) == 1:
            found.setdefault(path, []).append(unit)
    return found


def without(model: Any, positions: Positions) -> Removal:
    """How `model` loses the blocks at `positions`.

    Raises:
        Unmet: no stock config says what would be left.
    """
    config: Any = copy.deepcopy(model.config)
    edits: dict[str, Json] = {}
    built = None
    wanted = shapes_of(model)
    for path, removed in positions.items():
        wanted = _renumbered(wanted, path, removed)
        for trial in _candidates(config, _config_class(model, path), len(model.get_submodule(path)), removed):
            edited = edit(copy.deepcopy(config), trial)
            try:
                attempt = blueprint(model, edited)
            except Exception:  # configs refuse numbers of layers in their own ways
                continue
            if shapes_of(attempt) == wanted:
                edits |= trial
                config, built = edited, attempt
                break
        else:
            uneven = shapes_of(blueprint(model, copy.deepcopy(model.config))) != shapes_of(model)
            raise Unmet(
                "its blocks have different widths (allocation: global), put prune.layers before that pass"
                if uneven
                else "no stock config expresses the model without this block, so `from_pretrained` could not load it",
                where=", ".join(f"{path}.{i}" for i in removed),
                change="select other blocks, or fewer",
            )
    if built is None:
        built = blueprint(model, config)
    if _uncached(built) > 0 >= _uncached(model):
        raise Unmet(
            "transformers would make a cache of fewer layers than the decoder has",
            where=", ".join(f"{path}.{i}" for path, removed in positions.items() for i in removed),
            change="select the blocks of the decoder",
        )
    return Removal(positions, edits, built)


def _uncached(model: Any) -> int:
    """How many attention layers the cache that `generate` makes from the config is short of."""
    from transformers import DynamicCache

    numbers = [vars(module)["layer_idx"] for module in model.modules() if type(vars(module).get("layer_idx")) is int]
    held = len(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)
    return max(numbers, default=-1) + 1 - held if held else 0


def _renumbered(shapes: Shapes, path: str, removed: Sequence[int]) -> Shapes:
    rename = renumbering(path, removed)
    return {new: shape for name, shape in shapes.items() if (new := rename(name)) is not None}


def renumbering(path: str, removed: Sequence[int]) -> Callable[[str], str | None]:
    """What a dotted name is called when blocks are gone from the list at `path`; None for what lies in one of them."""

    def rename(name: str) -> str | None:
        if not name.startswith(path + "."):
            return name
        number, dot, rest = name[len(path) + 1 :].partition(".")
        if not number.isdigit():
            return name
        if int(number) in removed:
            return None
        return f"{path}.{int(number) - sum(i < int(number) for i in removed)}{dot}{rest}"

    return rename


def _config_class(model: Any, path: str) -> type:
    """Of the config of the module around the list."""
    while path:
        path = path.rpartition(".")[0]
        config = vars(model.get_submodule(path)).get("config")
        if config is not None:
            return type(config)
    return type(model.config)


def _candidates(config: Any, likely: type, length: int, removed: Sequence[int]) -> Iterator[dict[str, Json]]:
    """Edits worth trying, those of a `likely` config first: a number of blocks, and all that counts the same blocks."""
    for spot, part in sorted(config_tree(config), key=lambda item: type(item[1]) is not likely):
        for key in COUNT_KEYS:
            if vars(part).get(key) != length:
                continue
            trial: dict[str, Json] = {f"{spot}{key}": length - len(removed)}
            for name, value in vars(part).items():
                if name in BLOCK_KEYS and value:
                    if any(i in removed for i in value):
                        break
                    trial[f"{spot}{name}"] = [i - sum(r < i for r in removed) for i in value]
                elif isinstance(value, (list, tuple)) and "layer" in name and len(value) == length:
                    trial[f"{spot}{name}"] = [entry for i, entry in enumerate(value) if i not in removed]
            else:
                if part is vars(config).get("vision_config"):
                    trial |= _states(config, length, removed)
                yield trial


def _states(config: Any, length: int, removed: Sequence[int]) -> dict[str, Json]:
    """The hidden states of the tower that the connector reads, numbered anew."""

    def moved(state: int) -> int:
        before = state if state >= 0 else length + 1 + state
        after = before - sum(r < before for r in removed)
        return after if state >= 0 else after - (length - len(removed) + 1)

    found: dict[str, Json] = {}
    for key in STATE_KEYS:
        value = vars(config).get(key)
        if value is not None:
            found[key] = moved(value) if isinstance(value, int) else [moved(state) for state in value]
    return found


def take_out(model: Any, removal: Removal) -> Callable[[], None]:
    """Take the blocks out in place, config and all that modules count with it. Returns what puts everything back."""
    undo: list[Callable[[], None]] = []

    def put(owner: Any, key: str, value: Any) -> None:
        before = vars(owner)[key] if key in vars(owner) else getattr(owner, key)
        undo.append(lambda: setattr(owner, key, before))
        setattr(owner, key, value)

    for path, removed in removal.positions.items():
        holder = model.get_submodule(path)
        blocks = list(holder)
        undo.append(partial(_fill, holder, blocks))
        _fill(holder, [block for i, block in enumerate(blocks) if i not in removed])
    keys = {path.rpartition(".")[2] for path in removal.edits}
    for _, mine, other in alike(model, removal.built):
        for owner, key, value in differing(mine, other, keys, _counts):
            put(owner, key, value)

    def back() -> None:
        for one in reversed(undo):
            one()

    return back


def _counts(value: Any) -> bool:
    return type(value) is int or (isinstance(value, (list, tuple)) and all(type(i) is int for i in value))


def _fill(holder: nn.ModuleList, blocks: Sequence[nn.Module]) -> None:
    holder._modules.clear()
    holder.extend(blocks)


@contextmanager
def lacking(model: Any, removal: Removal) -> Iterator[None]:
    """The model without the blocks inside; exactly as it was afterwards."""
    back = take_out(model, removal)
    try:
        yield
    finally:
        back()
