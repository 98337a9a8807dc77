"""tokens.dpp: keep visual tokens that differ from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ._reduce import Reduce

if TYPE_CHECKING:
    from ...compress.runtime.images import Choice, Images


@dataclass(frozen=True)
class DPP(Reduce):
    """Keep the most diverse visual tokens: greedy MAP of a determinantal point process (CDPruner, arXiv 2506.10967).

    Settings:
        keep: fraction of each image's visual tokens that stay, in (0, 1]; rounded, at least one token an image.
        relevance: ``none``: diversity of the connector's outputs alone, the same tokens whatever is asked (several
            questions about one image share them). ``prompt``: tokens are weighted by their mean cosine with the
            language model's embeddings of the prompt's text, scaled to (0, 1] in each image; the sign is positive, more
            alike is more relevant. (The paper takes CLIP's text tower, for which its code has a negative sign.)
    """

    name: ClassVar[str] = "tokens.dpp"
    summary: ClassVar[str] = "fewer visual tokens: those that differ most from each other (DPP)"
    paper: ClassVar[str] = "CDPruner, arXiv 2506.10967"

    relevance: Literal["none", "prompt"] = "none"

    def choose(self, images: Images, k: int) -> Choice:
        from ...compress.runtime.images import Choice
        from ._select import dpp

        return Choice(dpp(images.features, k, images.relevance))

    def wants_relevance(self) -> bool:
        return self.relevance == "prompt"
