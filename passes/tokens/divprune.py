"""tokens.divprune: keep the visual tokens that are farthest from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ._reduce import Reduce

if TYPE_CHECKING:
    from ...compress.runtime.images import Choice, Images


@dataclass(frozen=True)
class DivPrune(Reduce):
    """Keep the visual tokens whose smallest distance to each other is largest, greedily (DivPrune, arXiv 2503.02175).

    Distances are 1 - cosine of the connector's outputs. The same tokens whatever is asked.

    Settings:
        keep: fraction of each image's visual tokens that stay, in (0, 1]; rounded, at least one token an image.
    """

    name: ClassVar[str] = "tokens.divprune"
    summary: ClassVar[str] = "fewer visual tokens: those that are farthest from each other"
    paper: ClassVar[str] = "DivPrune, arXiv 2503.02175"

    def choose(self, images: Images, k: int) -> Choice:
        from ...compress.runtime.images import Choice
        from ._select import divprune

        return Choice(divprune(images.features, k))
