"""tokens.pyramid: fewer visual tokens, and fewer again, as the decoder goes deeper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from ._inside import Inside

LADDER = (0.25, 0.5, 0.7, 0.85)


@dataclass(frozen=True)
class Pyramid(Inside):
    """At several blocks, keep a share of the visual tokens left: those that the prompt attends to (PyramidDrop).

    Each of these blocks ranks them by the attention that the prompt's last token pays them there (mean over heads; one
    row is computed), before it runs. Its cache and those of later blocks hold the kept tokens alone. Which tokens these
    are depends on the question: in a conversation, images of earlier turns keep the choice made when they came.

    Settings:
        ratio: share of the visual tokens left that stay at each of the blocks, in (0, 1]: 0.5 leaves a half, then a
            quarter, then an eighth of each image's; rounded, at least one token an image.
        blocks: numbers of these blocks from 0, ascending, at least 1; none given: at a quarter, half and three quarters
            of the depth.
    """

    name: ClassVar[str] = "tokens.pyramid"
    summary: ClassVar[str] = "fewer visual tokens the deeper the block: those that the prompt attends to"
    paper: ClassVar[str] = "PyramidDrop, arXiv 2410.17247"

    ratio: float = 0.5
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is a fraction in (0, 1], not {self.ratio}")
        if any(a >= b for a, b in zip((0, *self.blocks), self.blocks)):
            raise ValueError(f"blocks are ascending and at least 1, not {list(self.blocks)}")

    def stages(self, blocks: int) -> tuple[list[int], dict[int, float]]:
        at = self.blocks or sorted({max(1, round(blocks * part / 4)) for part in (1, 2, 3)} - {blocks})
        return list(at), {number: self.ratio**step for step, number in enumerate(at, start=1)}

    def weaker(self) -> Self | None:
        higher = [ratio for ratio in LADDER if ratio > self.ratio]
        return replace(self, ratio=higher[0]) if higher else None
