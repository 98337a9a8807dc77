"""Which unit of the original a unit of a small model once was: what passes that took something out recorded.

A pass that removes blocks leaves in its record ``kept: {part: [numbers]}``: for each block that stays, in order, its
number among the part's blocks in the ORIGINAL model. The newest record of a part holds; where there is none, nothing
was taken out.
"""

from __future__ import annotations

from collections.abc import Mapping

from .anatomy import ModelView, Unit
from .errors import Unmet


def origin(model: ModelView, original: ModelView, unit: Unit, who: str) -> Unit:
    """The unit of `original` that `unit` of `model` was.

    Args:
        who: asks, for messages.

    Raises:
        Unmet: the records do not say where the unit comes from.
    """
    name = unit.name
    if unit.index is not None:
        blocks, before = (sum(u.index is not None for u in view.parts[unit.part]) for view in (model, original))
        numbers = recorded(model, "kept").get(unit.part, range(before))
        if len(numbers) != blocks or not set(numbers) <= set(range(before)):
            raise Unmet(
                f"{who} cannot tell which block of the original this one was",
                where=name,
                found=f"{blocks} blocks here, {before} in the original, recorded as kept: {list(numbers)}",
                change="distil the logits alone, or record the kept blocks in the pass that removed the others",
            )
        name = f"{unit.part}.blocks[{numbers[unit.index]}]"
    theirs = {other.name: other for other in original.units}
    if name not in theirs:
        raise Unmet(f"{who} finds no such unit in the original", where=name, found=", ".join(theirs))
    return theirs[name]


def recorded(model: ModelView, key: str) -> dict[str, list[int]]:
    """What the passes recorded under `key`, by part."""
    found: dict[str, list[int]] = {}
    for entry in model.ledger:
        value = entry.record.get(key)
        if isinstance(value, Mapping):
            found |= value
    return found
