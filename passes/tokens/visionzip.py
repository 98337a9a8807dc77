"""tokens.visionzip: keep the visual tokens that the vision tower attends to, and averages of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ._reduce import Reduce

if TYPE_CHECKING:
    from ...compress.runtime.images import Choice, Images


@dataclass(frozen=True)
class VisionZip(Reduce):
    """Keep the tokens that the vision tower attends to, merge the others by their keys (VisionZip, arXiv 2412.04467).

    Attention and keys are those of the tower's last block but one, computed once more from its queries and keys: the
    class token's row where the tower has one (CLIP, InternViT), else the mean attention that a patch receives (SigLIP,
    Qwen; of the last block that sees the whole picture where others see windows). A visual token made of several
    patches has their mean. The same tokens whatever is asked. The class token itself, which the paper's code keeps as
    one more, is not among the visual tokens of any family.

    Settings:
        keep: fraction of each image's visual tokens that stay, in (0, 1]; rounded, at least one token an image.
        dominant: fraction of those that are kept by attention (54 of 64 in the paper); the others are evenly spaced
            among the rest, each with the tokens whose keys are most like its own merged in.
        merge: ``average``: of all that are merged. ``add``: the mean of the others is added to it, as the paper's code
            does, which doubles the token's length.
    """

    name: ClassVar[str] = "tokens.visionzip"
    summary: ClassVar[str] = "fewer visual tokens: those that the vision tower attends to, the rest merged"
    paper: ClassVar[str] = "VisionZip, arXiv 2412.04467"
    reads_tower: ClassVar[bool] = True

    dominant: float = 54 / 64
    merge: Literal["average", "add"] = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dominant <= 1:
            raise ValueError(f"dominant is a fraction in [0, 1], not {self.dominant}")

    def choose(self, images: Images, k: int) -> Choice:
        from ...compress.runtime.images import Choice
        from ._merge import visionzip

        assert images.attention is not None and images.keys is not None
        return Choice(*visionzip(images.attention, images.keys, k, self.dominant, self.merge == "add"))
