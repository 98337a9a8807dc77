"""fuse.connector: the affine part of the norm in front of the connector moves into its first linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ._affine import Fold, entering

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView
    from ..quantize._fold import Pair


@dataclass(frozen=True)
class Connector(Fold):
    """Fold the norm that enters the connector into its projection, through pixel shuffle or patch merging.

    Such a step puts the channels of several positions side by side, so column j of the projection takes the scale of
    channel ``j mod width``: the tower's last norm (Idefics3, SmolVLM, PaliGemma), the merger's own (Qwen2-VL,
    Qwen2.5-VL, Qwen3-VL), that before Gemma3's matrix, the last of BLIP-2's Q-Former. Scales, biases and what it is
    good for: as in `fuse.norms`, which takes the norms that feed a linear without a change of shape (InternVL's).

    These are all the exact folds between tower and language model. No family has two linears there with nothing in
    between; LLaVA and its kin read the tower before its last norm and have none to fold, which is said at plan time.
    """

    name: ClassVar[str] = "fuse.connector"
    summary: ClassVar[str] = "exact: the norm in front of the connector goes into its first linears"
    paper: ClassVar[str] = "QuaRot, arXiv 2404.00456 (section 4, stage 1)"
    needs_data: ClassVar[bool] = False

    def pairs(self, model: ModelView) -> list[Pair]:
        found = (entering(model, unit) for unit in model.parts.get("connector", ()))
        return [pair for pair in found if pair is not None]

    def nothing(self, model: ModelView) -> str:
        if "connector" not in model.parts:
            return "no connector"
        plain = any(ref.norm for unit in model.parts["connector"] for ref in unit.linears)
        return (
            "the connector's norms feed its linears as they are: fuse.norms folds them"
            if plain
            else "no norm enters the connector's linears"
        )
