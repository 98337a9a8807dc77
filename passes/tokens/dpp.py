"""tokens.dpp: keep visual tokens that differ from each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from ...compress.base import Context, Json, Notes
from ._reduce import Select

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView
    from ...compress.runtime.images import Choice, Images


@dataclass(frozen=True)
class DPP(Select):
    """Keep the most diverse visual tokens: greedy MAP of a determinantal point process (CDPruner, arXiv 2506.10967).

    Settings:
        keep: fraction of each image's visual tokens that stay, in (0, 1]; rounded, at least one token an image.
        against_controls: also measure tokens.random, tokens.grid and tokens.resolution in this pass's place, at the
            same `keep`, on the check split; the report says where they are as good. Takes a measurement each.
        relevance: ``none``: diversity of the connector's outputs alone, the same tokens whatever is asked (several
            questions about one image share them). ``prompt``: tokens are weighted by their mean cosine with the
            language model's embeddings of the prompt's text, scaled to (0, 1] in each image; more alike is more
            relevant. (The paper takes CLIP's text tower, which no family's checkpoint holds, and its code a negative
            sign.) ``calibrated``: as ``prompt``, with the sign, or none of it, under which the fit answers are most
            likely; takes three forwards over the fit split.
    """

    name: ClassVar[str] = "tokens.dpp"
    summary: ClassVar[str] = "fewer visual tokens: those that differ most from each other (DPP)"
    paper: ClassVar[str] = "CDPruner, arXiv 2506.10967"

    relevance: Literal["none", "prompt", "calibrated"] = "none"

    def choose(self, images: Images, k: int, sign: int = 1) -> Choice:
        from ...compress.runtime.images import Choice
        from ._select import dpp

        relevance = images.relevance if sign else None
        return Choice(dpp(images.features, k, relevance if relevance is None else sign * relevance))

    def wants_relevance(self) -> bool:
        return self.relevance != "none"

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        if self.relevance != "calibrated":
            return super().apply(model, ctx)
        from ...compress.runtime.reduce import remove

        losses = {}
        for sign in (1, -1, 0):
            self._install(model, partial(self.choose, sign=sign))
            losses[sign] = _loss(model, ctx)
            remove(model.model)
        best = min(losses, key=losses.__getitem__)
        notes = super().apply(model, ctx)
        remove(model.model)
        record = notes.record | {"sign": best}
        self.rebuild(model, record)
        told = {"relevance_sign": best, "loss_by_sign": {str(sign): loss for sign, loss in losses.items()}}
        return Notes(notes.numbers | told | {"text_agnostic": best == 0}, record)

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        self._install(model, partial(self.choose, sign=record["sign"]) if "sign" in record else self.choose)


def _loss(model: ModelView, ctx: Context) -> float:
    """Mean cross-entropy of the fit answers' tokens, nats."""
    from torch.nn.functional import cross_entropy

    from ...calib.balance import answer_logits
    from ...compress.base import evaluating

    total, tokens = 0.0, 0
    with evaluating(model.model):
        for batch in ctx.fit:
            logits, labels = answer_logits(model, batch)
            total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
            tokens += int((labels != -100).sum())
    return total / max(tokens, 1)
