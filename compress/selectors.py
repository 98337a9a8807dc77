"""Selectors: the little language of `where`.

::

    vision                         a part: vision, connector, language, head
    language.blocks[4:]            blocks of a part: an index, a slice, or a list of indices; -1 is the last one
    language.blocks[0,3].attn      linears of a kind: attn, cross, mlp, other, or one role such as attn.q, mlp.down
    language.mlp   vision.attn.q   the same in every block of a part
    connector.language_projection  a unit by its name
    *.layers.*.mlp.*               an fnmatch pattern over dotted module paths (anything that holds a ``*``)

A list means all that any of its entries selects; None means everything but the head. A part that this model lacks, or
that has no linear layers (Gemma 3's connector), adds nothing to a list; anything else that selects nothing is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from .errors import SelectorError
from .families import PARTS

if TYPE_CHECKING:
    from .anatomy import LinearRef, Unit

Where = str | Sequence[str] | None

_TEXT = re.compile(r"(?P<part>\w+)(?:\.blocks\[(?P<index>[^\]]*)\])?(?:\.(?P<rest>[\w.]+))?")
_KINDS = ("attn", "cross", "mlp", "other")


def select_linears(units: Sequence[Unit], where: Where) -> tuple[LinearRef, ...]:
    """The linears that `where` selects, in forward order.

    Raises:
        SelectorError: an entry, or a list of parts as a whole, selects nothing; the message lists what there is.
    """
    everything = [ref for unit in units for ref in unit.linears]
    if where is None:
        return tuple(ref for ref in everything if ref.unit.part != "head")
    chosen: set[str] = set()
    entries = [where] if isinstance(where, str) else list(where)
    if not entries:
        raise SelectorError("the selector is an empty list", change=_menu(units))
    for entry in entries:
        found = {ref.path for ref in _match(units, everything, entry)}
        if not found and (entry not in PARTS or len(entries) == 1):
            raise SelectorError(f"the selector '{entry}' matches no linear layer", change=_menu(units))
        chosen |= found
    if not chosen:
        raise SelectorError(f"the selector {list(entries)} matches no linear layer", change=_menu(units))
    return tuple(ref for ref in everything if ref.path in chosen)


def _match(units: Sequence[Unit], everything: Iterable[LinearRef], entry: str) -> Iterable[LinearRef]:
    if "*" in entry:
        return [ref for ref in everything if fnmatchcase(ref.path, entry)]
    text = _TEXT.fullmatch(entry)
    if text is None:
        raise SelectorError(f"cannot read the selector '{entry}'", change=_menu(units))
    part, index, rest = text["part"], text["index"], text["rest"]
    of_part = [unit for unit in units if unit.part == part]
    if index is not None:
        blocks = {unit.index: unit for unit in of_part if unit.index is not None}
        of_part = [blocks[i] for i in _indices(index, len(blocks), entry)]
    refs = [ref for unit in of_part for ref in unit.linears]
    if rest is None:
        return refs
    if rest.split(".")[0] in _KINDS:
        return [ref for ref in refs if ref.role == rest or ref.role.startswith(rest + ".")]
    return [ref for ref in refs if ref.unit.name == f"{part}.{rest}"]


def _indices(text: str, count: int, entry: str) -> list[int]:
    every = range(count)
    try:
        if ":" in text:
            return list(every[slice(*(int(t) if t.strip() else None for t in text.split(":")))])
        return sorted({every[int(t)] for t in text.split(",")})
    except (ValueError, TypeError, IndexError) as error:
        raise SelectorError(
            f"the selector '{entry}' asks for blocks that are not there",
            found=f"{count} blocks",
            change="give an index, a slice or a list: blocks[0], blocks[4:], blocks[0,3], blocks[-1]",
        ) from error


def _menu(units: Sequence[Unit]) -> str:
    """What a selector could say about this model."""
    lines = []
    units = [unit for unit in units if unit.linears]
    for part in dict.fromkeys(unit.part for unit in units):
        of_part = [unit for unit in units if unit.part == part]
        blocks = sum(unit.index is not None for unit in of_part)
        kinds = sorted({ref.role.split(".")[0] for unit in of_part for ref in unit.linears} - {"other"})
        names = [unit.name for unit in of_part if unit.index is None and unit.name != part]
        text = [part]
        text += [f"{part}.blocks[0:{blocks}]"] if blocks else []
        text += [f"{part}.{kind}" for kind in kinds] + names
        lines.append(", ".join(text))
    return "; ".join(lines) + "; or a pattern over module paths such as '*.mlp.*'"
