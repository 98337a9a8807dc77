"""Smaller pictures: which settings of config and processor say how large they are, and which weights follow.

No table of families. A model that takes pictures of one size says so in ``vision_config.image_size``; settings that
depend on it are known by their names (numbers of tokens, sizes in pixels, the grids that pictures are tiled into). The
models of both configs are built on the meta device: what differs between them are the position embeddings and the
numbers that modules keep. A processor that fits pictures of any size under a limit of pixels gets a lower limit.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...compress.anatomy import ModelView
from ...compress.base import Json
from ...compress.blueprint import blueprint, config_tree, shapes_of
from ...compress.errors import Unmet
from ...compress.processors import picture_settings, remade, write_picture_settings
from ._positions import resized

COUNTS = ("image_seq_length", "image_seq_len", "mm_tokens_per_image", "num_image_tokens")  # tokens of a picture
PIXELS = ("size", "crop_size", "max_image_size", "video_size")  # of a processor
GRIDS = "image_grid_pinpoints"  # sizes that pictures are tiled into
LIMITS = ("shortest_edge", "longest_edge"), ("min_pixels", "max_pixels")  # least and most pixels of a picture
GRID = "image_grid_thw"  # patches of each picture of a batch: (time, height, width)


@dataclass(frozen=True)
class Sides:
    """Pictures of one size become smaller.

    Attributes:
        pixels, patches, tokens: of a picture's side, of a side, of a picture; before and after.
    """

    pixels: tuple[int, int]
    patches: tuple[int, int]
    tokens: tuple[int, int]

    def scaled(self, pixels: int) -> int:
        """A size in pixels that depends on the picture's side."""
        old, new = self.pixels
        return pixels // old * new if pixels % old == 0 else max(1, round(pixels * new / old))

    def counted(self, tokens: int) -> int:
        """A number of tokens, with or without the class token, or of patches; any other number as it is."""
        for old, new in (self.tokens, (self.patches[0] ** 2, self.patches[1] ** 2)):
            if 0 <= tokens - old <= 1:
                return tokens - old + new
        return tokens


# ------------------------------------------------------------------------------------------------ pictures of one size


def find_sides(view: ModelView, keep: float) -> Sides:
    """The size whose number of patches is nearest to `keep` times as many; of two, the larger.

    Raises:
        Unmet: pictures of this model have no one size, or its visual tokens do not depend on it.
    """
    told = view.model.config.to_dict().get("vision_config") or {}
    sides = {*_pair(told.get("image_size")), *_pair(told.get("patch_size"))}
    if told.get("image_size") is None or told.get("patch_size") is None or len(sides) > 2:
        raise _unmet(view, f"its config gives no square picture: image_size {told.get('image_size')}")
    (size, *_), (patch, *_) = _pair(told["image_size"]), _pair(told["patch_size"])
    side = size // patch
    tokens = view.per_image() or side**2
    block = math.isqrt(side**2 // tokens)
    if block < 1 or (side // block) ** 2 != tokens:
        raise _unmet(view, f"its connector makes {tokens} tokens of {side} x {side} patches, whatever the picture")
    choices = range(block, side + 1, block)
    best = min(choices, key=lambda p: (abs(p**2 - keep * side**2), -p))
    if best // block == side // block:
        return Sides((size, size), (side, side), (tokens, tokens))
    return Sides((size, best * patch), (side, best), (tokens, (best // block) ** 2))


def _pair(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _unmet(view: ModelView, found: str) -> Unmet:
    return Unmet(
        "this model cannot be shown smaller pictures",
        where=f"family {view.family.name}",
        found=found,
        change="leave tokens.resolution out for this model",
    )


@dataclass(frozen=True)
class Change:
    """What another size of pictures changes in a model.

    Attributes:
        settings: (class name of a config, setting, value before) -> value after.
        tables: name of a position embedding -> its axis of positions. counters: names of buffers that hold 0, 1, 2, ...
        numbers: (module, attribute) -> what it holds afterwards.
    """

    sides: Sides
    settings: dict[tuple[str, str, Any], Json]
    tables: dict[str, int]
    counters: tuple[str, ...]
    numbers: dict[tuple[str, str], Any]


def find_change(view: ModelView, sides: Sides) -> Change:
    """What follows from `sides`; touches nothing.

    Raises:
        Unmet: a stock config does not say it, or weights depend on the size that are no position embedding.
    """
    model = view.model
    edited, settings = copy.deepcopy(model.config), {}
    for place, part in config_tree(edited):
        for key, old in list(vars(part).items()):
            new = _resized_setting(place, key, old, sides)
            if new != old:
                settings[type(part).__name__, key, _fixed(old)] = new
                setattr(part, key, new)
    try:
        before, after = blueprint(model, model.config), blueprint(model, edited)
    except Exception as error:  # configs and models refuse sizes in their own ways
        raise _unmet(view, f"{type(error).__name__}: {error}") from error
    if after.config.vision_config.image_size != edited.vision_config.image_size:  # type: ignore[union-attr]
        raise _unmet(view, "its config does not keep another image_size")
    tables = {}
    old_shapes, new_shapes = shapes_of(before), shapes_of(after)
    for name in sorted(old_shapes.keys() | new_shapes.keys()):
        pair = old_shapes.get(name, ()), new_shapes.get(name, ())
        if pair[0] != pair[1]:
            tables[name] = _axis(view, name, *pair, sides)
    counters = []
    theirs = dict(after.named_buffers())
    for name, buffer in before.named_buffers():
        if name not in old_shapes and buffer.shape != theirs[name].shape:
            mine = model.get_buffer(name)
            if not torch.equal(mine.flatten(), torch.arange(mine.numel(), device=mine.device, dtype=mine.dtype)):
                raise _unmet(view, f"{name} depends on the size and does not count positions")
            counters.append(name)
    others, numbers = dict(after.named_modules()), {}
    for path, module in before.named_modules():
        for key, value in vars(module).items():
            new = vars(others[path]).get(key)
            if _is_number(value) and _is_number(new) and new != value:
                numbers[path, key] = new
    return Change(sides, settings, tables, tuple(counters), numbers)


def _resized_setting(place: str, key: str, old: Any, sides: Sides) -> Any:
    if place == "vision_config." and key == "image_size":
        return type(old)([sides.pixels[1]] * 2) if isinstance(old, (list, tuple)) else sides.pixels[1]
    if key in COUNTS and type(old) is int:
        return sides.counted(old)
    return _grids(old, sides) if key == GRIDS and old else old


def _grids(value: Any, sides: Sides) -> list[list[int]]:
    return [[sides.scaled(pixels) for pixels in pair] for pair in value]


def _fixed(value: Any) -> Any:
    """`value` as something that a dict can be keyed by."""
    return tuple(map(_fixed, value)) if isinstance(value, (list, tuple)) else value


def _is_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, (list, tuple)) and all(type(v) is int for v in value))


def _axis(view: ModelView, name: str, old: tuple[int, ...], new: tuple[int, ...], sides: Sides) -> int:
    """The axis of positions of a tensor that changes its shape."""
    changed = [axis for axis, (a, b) in enumerate(zip(old, new)) if a != b]
    few, many = (p**2 for p in sorted(sides.patches))
    if len(old) == len(new) and len(changed) == 1:
        a, b = old[changed[0]], new[changed[0]]
        if 0 <= a - many == b - few:
            return changed[0]
    raise _unmet(view, f"{name} would change from {old} to {new}, which is no table of positions")


def shrink(view: ModelView, change: Change) -> None:
    """Make `view`, in place, a model of smaller pictures; its processor is not touched."""
    model, sides = view.model, change.sides
    with torch.no_grad():
        for name, axis in change.tables.items():
            path, _, key = name.rpartition(".")
            module = model.get_submodule(path)
            old: Tensor = getattr(module, key)
            table = resized(old.detach(), *sides.patches, axis)
            setattr(module, key, nn.Parameter(table, old.requires_grad) if isinstance(old, nn.Parameter) else table)
        for name in change.counters:
            path, _, key = name.rpartition(".")
            old = model.get_buffer(name)
            count = old.numel() - sides.patches[0] ** 2 + sides.patches[1] ** 2
            counted = torch.arange(count, dtype=old.dtype, device=old.device)
            setattr(model.get_submodule(path), key, counted.reshape(*old.shape[:-1], -1))
    for (path, key), value in change.numbers.items():
        setattr(model.get_submodule(path), key, value)
    seen: set[int] = set()
    for module in model.modules():
        config = vars(module).get("config")
        for _, part in config_tree(config) if hasattr(config, "sub_configs") else ():
            for key, value in list(vars(part).items()) if id(part) not in seen else ():
                held = _fixed(value)
                known = (type(part).__name__, key, held)
                if _hashable(held) and known in change.settings:
                    setattr(part, key, change.settings[known])
            seen.add(id(part))
    view.refresh()


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def with_sides(view: ModelView, sides: Sides) -> Any:
    """The processor of `view` for pictures of the new size.

    Raises:
        Unmet: it is not of the old size, or stock transformers do not load the new one.
    """

    def edit(folder: Path) -> None:
        write_picture_settings(folder, _told_anew(picture_settings(folder), sides))

    return remade(view.processor, view.model.config, edit)


def _told_anew(value: Json, sides: Sides, pixels: bool = False) -> Json:
    """A processor's settings for pictures of the new size; `pixels`: inside a setting that is a size in pixels."""
    if isinstance(value, dict):
        return {
            key: _grids(entry, sides)
            if key == GRIDS and entry
            else sides.counted(entry)
            if key in COUNTS and type(entry) is int
            else _told_anew(entry, sides, pixels or key in PIXELS)
            for key, entry in value.items()
        }
    return sides.scaled(value) if pixels and type(value) is int else value


# ------------------------------------------------------------------------------------------------ pictures of any size


@dataclass(frozen=True)
class Limit:
    """Pictures may have fewer pixels.

    Attributes:
        pixels: the most, before and after. tokens: of the pictures of the fit split, all together, before and after.
    """

    pixels: tuple[int, int]
    tokens: tuple[int, int]


def limited(view: ModelView) -> bool:
    """Whether the processor fits pictures of any size under a limit of pixels."""
    pictures = getattr(view.processor, "image_processor", None)
    return GRID in (getattr(pictures, "model_input_names", None) or ()) and hasattr(pictures, "merge_size")


def find_limit(view: ModelView, batches: Sequence[Mapping[str, Any]], keep: float) -> Limit:
    """The limit under which the pictures of `batches` have, all together, `keep` times as many tokens as they have now.

    The nearest there is: a side is a whole number of blocks of patches, and small pictures are left as they are.

    Raises:
        Unmet: the batches have no pictures.
    """
    pictures = view.processor.image_processor
    grids = [grid for batch in batches for grid in (batch[GRID].tolist() if GRID in batch else ())]
    if not grids:
        raise _unmet(view, "the fit split has no picture, so nothing says how many tokens there are")
    sizes = [(t, h * pictures.patch_size, w * pictures.patch_size) for t, h, w in grids]
    least, most = (int(pictures.size[key]) for key in LIMITS[0])
    unit = (pictures.patch_size * pictures.merge_size) ** 2

    def total(pixels: int) -> int:
        options = {"min_pixels": min(least, pixels), "max_pixels": pixels}
        patches = sum(t * pictures.get_number_of_image_patches(h, w, options) for t, h, w in sizes)
        return patches // pictures.merge_size**2

    now = sum(math.prod(grid) for grid in grids) // pictures.merge_size**2
    wanted = keep * now
    largest = max(h * w for _, h, w in sizes)
    if keep == 1 or largest <= unit:
        return Limit((most, most), (now, now))
    steps = range(unit, largest + 1, unit)
    first = bisect_right(steps, wanted, key=total)
    best = min(steps[max(first - 1, 0) : first + 1], key=lambda pixels: abs(total(pixels) - wanted))
    return Limit((most, best), (now, total(best)))


def with_limit(view: ModelView, limit: Limit) -> Any:
    """The processor of `view` with the new limit."""

    def edit(folder: Path) -> None:
        told = picture_settings(folder)
        pictures = told["image_processor"]
        new = limit.pixels[1]
        for low, high in LIMITS:
            for holder in (pictures, pictures.get("size") or {}):
                if holder.get(high) is not None:
                    holder[high] = new
                if holder.get(low) is not None:
                    holder[low] = min(holder[low], new)
        write_picture_settings(folder, told)

    return remade(view.processor, view.model.config, edit)
