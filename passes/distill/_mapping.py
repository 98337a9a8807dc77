"""Units of the small model beside what they were in the original, channel by channel.

`compress/origins.py` knows which unit that was. A pass that removes hidden channels may leave in its record
``channels: {part: [numbers]}``: those of the original that stay; where there is none, all did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...compress.anatomy import ModelView, Unit
from ...compress.errors import Unmet
from ...compress.origins import origin, recorded


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
    channels = recorded(model, "channels")
    found = []
    for unit in units:
        there = origin(model, original, unit, who)
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
