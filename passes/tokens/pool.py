"""tokens.pool: fewer visual tokens by averaging neighbours, the control of all that chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ._reduce import Reduce

if TYPE_CHECKING:
    from ...compress.runtime.images import Choice, Images


@dataclass(frozen=True)
class Pool(Reduce):
    """Average the visual tokens of neighbouring cells: nothing is chosen, nothing is lost but detail.

    A picture is cut into about as many rows of cells as columns; where its shape is not known (a number of tokens that
    is no square, and no M-RoPE), neighbours in the sequence are averaged. A pooled token has the position of its cell's
    middle token.

    Settings:
        keep: fraction of each image's visual tokens that stay, in (0, 1]; rounded, at least one token an image.
    """

    name: ClassVar[str] = "tokens.pool"
    summary: ClassVar[str] = "fewer visual tokens: averages of neighbours (a control)"
    paper: ClassVar[str] = "UniPruneBench, arXiv 2511.02650"

    def choose(self, images: Images, k: int) -> Choice:
        from ...compress.runtime.images import Choice
        from ._merge import cells

        return Choice(*map(images.same, cells(images.shape, k)))
