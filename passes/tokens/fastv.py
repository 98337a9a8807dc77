"""tokens.fastv: visual tokens that the prompt hardly looks at leave after the first blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from ...compress.base import Json
from ._inside import Inside
from ._reduce import CONTROLS, LADDER


@dataclass(frozen=True)
class FastV(Inside):
    """From one block on, keep the visual tokens to which the prompt's last token pays the most attention (FastV).

    The attention is that of the block before, mean over heads; one row of it is computed, attention kernels stay as
    they are. The cache of the later blocks holds the kept tokens alone. Which tokens these are depends on the question:
    in a conversation, images of earlier turns keep the choice made when they came, as long as the cache is kept.

    Settings:
        keep: fraction of each image's visual tokens that stay, in (0, 1]; rounded, at least one token an image.
        block: the first block without the others, counted from 0; at least 1.
        against_controls: also measure `tokens.random`, `tokens.grid` and `tokens.resolution` in this pass's place, at
            the same `keep` but for all blocks, on the check split. Takes a measurement each.
    """

    name: ClassVar[str] = "tokens.fastv"
    summary: ClassVar[str] = "fewer visual tokens after the first blocks: those that the prompt attends to"
    paper: ClassVar[str] = "FastV, arXiv 2403.06764"

    keep: float = 0.5
    block: int = 2
    against_controls: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a fraction in (0, 1], not {self.keep}")
        if self.block < 1:
            raise ValueError(f"block is at least 1, not {self.block}")

    def stages(self, blocks: int) -> tuple[list[int], dict[int, float]]:
        return [self.block - 1], {self.block: self.keep}

    def controls(self) -> tuple[tuple[str, dict[str, Json]], ...]:
        return tuple((name, {"keep": self.keep}) for name in CONTROLS) if self.against_controls else ()

    def weaker(self) -> Self | None:
        higher = [keep for keep in LADDER if keep > self.keep]
        return replace(self, keep=higher[0]) if higher else None
