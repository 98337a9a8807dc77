"""Which part of the original a part of the small model stems from: what passes that took something out recorded.

A pass that removes blocks leaves in its record ``kept: {part: [numbers]}``: for each block that stays, in order, its
number among the part's blocks in the ORIGINAL model. A pass that removes hidden channels may leave ``channels: {part:
[numbers]}`` in the same way. The newest record of a part holds; where there is none, nothing was taken out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...compress.anatomy import ModelView, Unit
from ...compress.errors import Unmet


@dataclass(frozen=True)
class Mapped:
    """A unit of the small model and the one that it was in the original.

    Attributes:
        channels: of what the original's unit returns, those that the small one still has; None: all.
    """

    here: Unit
    there: Unit
    channels: tuple[int, ...] | None = None


def mapped(model: ModelView, original: ModelView, units: Sequence[Unit], who: str) -> list[Mapped]:
    """`units` of `model`, each with its origin.

    Args:
        who: the pass that asks, for messages.

    Raises:
        Unmet: the records do not say where a unit comes from, or what it returns has another width.
    """
    kept, channels = _recorded(model, "kept"), _recorded(model, "channels")
    theirs = {unit.name: unit for unit in original.units}
    found = []
    for unit in units:
        name = unit.name
        if unit.index is not None:
            blocks, before = (sum(u.index is not None for u in view.parts[unit.part]) for view in (model, original))
            numbers = kept.get(unit.part, range(before))
            if len(numbers) != blocks or not set(numbers) <= set(range(before)):
                raise Unmet(
                    f"{who} cannot tell which block of the original this one was",
                    where=name,
                    found=f"{blocks} blocks here, {before} in the original, recorded as kept: {list(numbers)}",
                    change="distil the logits alone, or record the kept blocks in the pass that removed the others",
                )
            name = f"{unit.part}.blocks[{numbers[unit.index]}]"
        if name not in theirs:
            raise Unmet(f"{who} finds no such unit in the original", where=name, found=", ".join(theirs))
        there = theirs[name]
        width, wide = (u.linears[-1].module.out_features for u in (unit, there))
        chosen = channels.get(unit.part) if width != wide else None
        if width != wide and (chosen is None or len(chosen) != width):
            raise Unmet(
                f"{who} cannot compare hidden states of different widths",
                where=unit.name,
                found=f"{width} channels here, {wide} in the original, and no pass recorded which were kept",
                change="distil the logits alone: distill.logits",
            )
        found.append(Mapped(unit, there, None if chosen is None else tuple(chosen)))
    return found


def _recorded(model: ModelView, key: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for entry in model.ledger:
        value = entry.record.get(key)
        if isinstance(value, Mapping):
            found |= value
    return found
