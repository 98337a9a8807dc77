"""tokens.random: the control that every choice of tokens has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ._reduce import Reduce

if TYPE_CHECKING:
    from ...compress.runtime.images import Choice, Images


@dataclass(frozen=True)
class Random(Reduce):
    """Keep random visual tokens: a strong baseline (UniPruneBench, arXiv 2511.02650).

    Settings:
        keep: fraction of each image's visual tokens that stay, in (0, 1]; rounded, at least one token an image.
        seed: of the draw; images with the same number of tokens keep the same positions.
    """

    name: ClassVar[str] = "tokens.random"
    summary: ClassVar[str] = "fewer visual tokens: random ones (a control)"
    paper: ClassVar[str] = "UniPruneBench, arXiv 2511.02650"

    seed: int = 0

    def choose(self, images: Images, k: int) -> Choice:
        from ...compress.runtime.images import Choice
        from ._select import random_positions

        return Choice(images.same(random_positions(images.tokens, k, self.seed)))
