"""tokens.apet: keep the visual tokens that few others explain, merge the rest into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ._reduce import Reduce

if TYPE_CHECKING:
    from ...compress.runtime.images import Choice, Images


@dataclass(frozen=True)
class ApET(Reduce):
    """Keep the visual tokens with the largest approximation error, merge the others into them (ApET, CVPR 2026).

    A few tokens, spread by farthest-point sampling, are a basis; every other token is written as their combination by
    least squares. Those that this explains worst stay; each other one is averaged into the kept token that it is most
    alike. Needs no attention, and gives the same tokens whatever is asked.

    Settings:
        keep: fraction of each image's visual tokens that stay, in (0, 1]; rounded, at least one token an image.
        basis: tokens of the basis (at most as many as go).
    """

    name: ClassVar[str] = "tokens.apet"
    summary: ClassVar[str] = "fewer visual tokens: those that others explain worst, the rest merged into them"
    paper: ClassVar[str] = "ApET, CVPR 2026"

    basis: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis < 1:
            raise ValueError(f"basis is at least 1, not {self.basis}")

    def choose(self, images: Images, k: int) -> Choice:
        from ...compress.runtime.images import Choice
        from ._merge import apet

        return Choice(*apet(images.features, k, self.basis))
