"""The residual stream of a part: which dimension of which tensor carries its channels, and what an edit does to them.

A stream's channels run through embeddings, norms, every linear that reads or writes it, and the modules beside it (the
connector, the head). No list names them all: the model is built from the edited config, and every dimension that
became smaller carries the stream, or the inner channels of an MLP or of an attention that the config ties to it. What
the anatomy says to read or write the stream must be among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...compress.blueprint import Shapes
from ...compress.errors import ModelError
from ...compress.units import find_anchors, find_units
from ._groups import Cuts, Target, mlp_of

if TYPE_CHECKING:
    from ...compress.anatomy import AttentionGeometry, LinearRef, ModelView, Unit

Dim = tuple[str, int]  # name of a parameter or buffer, and its dimension

READERS = ("attn.q", "attn.k", "attn.v", "attn.qkv", "cross.q", "mlp.gate", "mlp.up", "mlp.gate_up")
WRITERS = ("attn.o", "cross.o", "mlp.down")


@dataclass(frozen=True)
class Wish:
    """The residual stream of `part`, now `width` channels wide, is to become narrower.

    Attributes:
        sizes: that it may have, the most wanted first; multiples of `multiple`.
    """

    part: str
    width: int
    sizes: tuple[int, ...]
    multiple: int


@dataclass(frozen=True)
class Stream:
    """A residual stream that becomes narrower.

    Attributes:
        slices: (tensor, dimension) -> how often the channels lie in it one after the other: 1, or more where tokens or
            layers are joined (pixel shuffle, patch mergers).
        readers: the linears of its blocks that read it. writers: those that write it.
    """

    part: str
    width: int
    size: int
    slices: Mapping[Dim, int]
    readers: tuple[str, ...]
    writers: tuple[str, ...]

    def cuts(self, chosen: Sequence[int]) -> Cuts:
        """Indices that stay in every tensor. `chosen`: channels that stay, ascending."""
        index = torch.tensor(list(chosen), dtype=torch.long)
        return {dim: joined(index, self.width, copies) for dim, copies in self.slices.items()}


def joined(index: Tensor, width: int, copies: int) -> Tensor:
    """The places of channels `index` in `copies` runs of `width` channels."""
    return (torch.arange(copies)[:, None] * width + index).flatten()


def blocks_of(view: ModelView, part: str) -> list[Unit]:
    return [unit for unit in view.parts.get(part, ()) if unit.stack is not None]


def stream_linears(view: ModelView, part: str) -> tuple[list[LinearRef], list[LinearRef]]:
    """The linears of a part's blocks that read its residual stream, and those that write it."""
    refs = [ref for unit in blocks_of(view, part) for ref in unit.linears]
    return [ref for ref in refs if ref.role in READERS], [ref for ref in refs if ref.role in WRITERS]


def stream_width(view: ModelView, part: str) -> int | None:
    """Its channels; None where the blocks have no stream of one width."""
    readers, writers = stream_linears(view, part)
    widths = {ref.module.in_features for ref in readers} | {ref.module.out_features for ref in writers}
    return widths.pop() if len(widths) == 1 else None


@dataclass
class Tally:
    """What a change of shapes means for the anatomy."""

    slices: dict[Dim, int] = field(default_factory=dict)
    implied: list[Target] = field(default_factory=list)


class Reading:
    """The anatomy of a model, as names of tensors, to explain changes of shape with."""

    def __init__(self, view: ModelView) -> None:
        self.view = view
        names = [name for name, _ in view.model.state_dict(keep_vars=True).items()]
        self.inner: dict[Dim, tuple[Unit, str]] = {}  # -> ("mlp", "heads", "cross") of which it is an inner dimension
        self.foreign: set[str] = set()  # other tensors inside an attention
        for unit in view.units:
            if unit.mlp:
                mlp = mlp_of(unit)
                self._inside(unit, "mlp", [p for p in (mlp.gate, mlp.up) if p], mlp.down)
            for kind, a in (("heads", unit.attention), ("cross", unit.cross_attention)):
                if a is not None:
                    self._inside(unit, kind, [p for p in (a.q, a.k, a.v, a.qkv) if p], a.o)
                    known = {p for p in (a.q, a.k, a.v, a.qkv, a.o) if p}
                    inside = (n for n in names if n.startswith(a.module + "."))
                    self.foreign |= {n for n in inside if n.rpartition(".")[0] not in known}
        self.heads = {
            (unit.name, kind): a
            for unit in view.units
            for kind, a in (("heads", unit.attention), ("cross", unit.cross_attention))
            if a is not None
        }

    def _inside(self, unit: Unit, kind: str, rows: Sequence[str], columns: str) -> None:
        for path in rows:
            self.inner[f"{path}.weight", 0] = self.inner[f"{path}.bias", 0] = unit, kind
        self.inner[f"{columns}.weight", 1] = unit, kind

    def explain(
        self, before: Shapes, after: Shapes, claims: Mapping[Dim, int], width: int, size: int, tied: tuple[int, int]
    ) -> Tally:
        """Every change between two sets of shapes as the stream's (`width` to `size`), a claim's, or an implied MLP's.

        Args:
            claims: dimensions that are to change in any case, with their sizes.
            tied: query heads and key-value heads of the part that the same edit leaves; (0, 0): it touches none.

        Raises:
            ValueError: the first change that is none of these, in words.
        """
        if set(before) != set(after):
            raise ValueError(f"would make or remove {min(set(before) ^ set(after))}")
        tally, seen = Tally(), set()
        for name, old in before.items():
            if len(old) != len(after[name]):
                raise ValueError(f"would also change {name}")
            for dim, (was, now) in enumerate(zip(old, after[name])):
                if was == now:
                    continue
                place = (name, dim)
                if place in claims:
                    if claims[place] != now:
                        raise ValueError(f"would make {name} {now} wide, not {claims[place]}")
                elif place in self.inner:
                    unit, kind = self.inner[place]
                    if (unit.name, kind) not in seen:
                        seen.add((unit.name, kind))
                        tally.implied.append(self._implied(unit, kind, place, was, now, tied))
                elif name in self.foreign or was % width or now * width != was * size:
                    raise ValueError(f"would also change {name}")
                else:
                    tally.slices[place] = was // width
        return tally

    def _implied(self, unit: Unit, kind: str, place: Dim, was: int, now: int, tied: tuple[int, int]) -> Target:
        if kind == "mlp":
            share = 2 if mlp_of(unit).fused and place[1] == 0 else 1
            return Target(unit, "mlp", now // share)
        if kind == "cross" and tied != (0, 0):
            return Target(unit, "heads", *tied, cross=True)
        raise ValueError(f"ties the attention's width to it ({place[0]}): add heads to 'what'")

    def held_heads(self, attempt: nn.Module, targets: Sequence[Target]) -> str | None:
        """Whether attentions keep the width of their heads, and change their number only as `targets` say."""
        paths = dict(attempt.named_modules())
        wanted = {(t.unit.name, t.key): t.size for t in targets if t.kind == "heads"}
        try:
            units = find_units(attempt, self.view.family, paths, find_anchors(attempt, self.view.family, paths))
        except ModelError as error:
            return str(error)
        for unit in units:
            found: tuple[tuple[str, AttentionGeometry | None], ...]
            found = (("heads", unit.attention), ("cross", unit.cross_attention))
            for kind, now in found:
                was = self.heads.get((unit.name, kind))
                if now is None or was is None:
                    continue
                if now.head_dim != was.head_dim:
                    return f"would make heads {now.head_dim} channels wide, not {was.head_dim} ({unit.name})"
                if now.n_heads not in (was.n_heads, wanted.get((unit.name, kind))):
                    return f"would leave {now.n_heads} heads in {unit.name}"
        return None
