"""tokens.grid: the control that knows nothing but the picture's geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ._reduce import Reduce

if TYPE_CHECKING:
    from ...compress.runtime.images import Choice, Images


@dataclass(frozen=True)
class Grid(Reduce):
    """Keep visual tokens evenly spaced over the picture (a control of UniPruneBench's kind, arXiv 2511.02650).

    Settings:
        keep: fraction of each image's visual tokens that stay, in (0, 1]; rounded, at least one token an image.
    """

    name: ClassVar[str] = "tokens.grid"
    summary: ClassVar[str] = "fewer visual tokens: an even grid of them (a control)"
    paper: ClassVar[str] = "UniPruneBench, arXiv 2511.02650"

    def choose(self, images: Images, k: int) -> Choice:
        from ...compress.runtime.images import Choice
        from ._select import grid_positions

        return Choice(images.same(grid_positions(images.shape, k)))
