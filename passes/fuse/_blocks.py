"""What the passes share that choose blocks in which visual tokens are treated differently."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...compress.base import Context, Pass
from ...compress.errors import Unmet

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView


@dataclass(frozen=True)
class Blocks(Pass):
    """Settings that say which blocks, or how they are chosen; the passes that derive from it explain them."""

    names_blocks: ClassVar[bool] = True

    share: float = 0.5
    count: int | None = None
    blocks: tuple[int, ...] = ()
    criterion: Literal["greedy", "kl", "random"] = "greedy"
    samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is a fraction in [0, 1], not {self.share}")
        if self.count is not None and self.count < 0:
            raise ValueError(f"count is at least 0, not {self.count}")
        if len(set(self.blocks)) < len(self.blocks) or any(number < 0 for number in self.blocks):
            raise ValueError(f"blocks are different numbers from 0 on, not {list(self.blocks)}")
        if self.samples < 1:
            raise ValueError(f"samples is at least 1, not {self.samples}")

    def number(self, blocks: int) -> int:
        """How many of a decoder's `blocks` are to be chosen."""
        if self.blocks:
            return len(self.blocks)
        return math.floor(self.share * blocks + 0.5) if self.count is None else self.count

    def chosen(
        self, model: ModelView, ctx: Context, names: Sequence[str], put: Callable[[Iterable[str]], None]
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """The chosen ones of the decoder's blocks `names`, and for the notes what was tried; see `_choose.choose`."""
        from ._choose import choose

        if self.blocks:
            return [names[number] for number in sorted(self.blocks)], []
        count = self.number(len(names))
        return choose(model, ctx, names, count, put, self.criterion, self.samples, self.seed)

    def check_blocks(self, model: ModelView, ctx: Context) -> None:
        """Raise Unmet where there are not so many blocks, or nothing to choose them by."""
        from ..tokens._layered import decoder_blocks

        there = len(decoder_blocks(model))
        if self.number(there) > there or any(number >= there for number in self.blocks):
            raise Unmet(
                f"{self.name} asks for blocks that the decoder does not have",
                where=f"family {model.family.name}",
                found=f"{list(self.blocks) or self.number(there)} of {there} blocks, 0 to {there - 1}",
                change="a smaller count, or name other blocks",
            )
        if not self.blocks and self.criterion != "random" and not len(ctx.fit):
            raise Unmet(f"criterion '{self.criterion}' needs fit samples", change="give data, or name the blocks")
