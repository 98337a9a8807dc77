"""fuse.bypass: visual tokens go around the decoder; text reads them in some blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from ...compress.base import Context, Json, Notes
from ...compress.errors import Unmet
from ._blocks import Blocks

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView


@dataclass(frozen=True)
class Bypass(Blocks):
    """Visual tokens skip every block; text attends to them in chosen blocks only, and elsewhere to text alone (ViCA).

    Their state stays what the connector made of the image, so in a chosen block their keys and values are projections
    of that. No weight is added or changed, and the other blocks' caches hold no visual token. A model that was not
    trained so loses most of what it saw: heal it with `distill.logits` right afterwards (the gradients reach the
    connector, too), and quantize after that.

    Settings:
        share: of the decoder's blocks in which text attends to visual tokens, rounded half up, at least one.
        count: how many such blocks instead of a share.
        blocks: their numbers from 0, where nothing is to be chosen.
        criterion: ``greedy``: one block after the other, by the KL divergence of the answers' tokens from the
            original's with it open as well, all scored anew each time. ``kl``: the same with each block open alone,
            once. ``random``: the control.
        samples: questions of the fit split that are asked to choose.
        seed: of ``random``.
    """

    name: ClassVar[str] = "fuse.bypass"
    summary: ClassVar[str] = "visual tokens skip the decoder; text reads them in a few blocks"
    paper: ClassVar[str] = "ViCA, arXiv 2602.07574"

    share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count == 0 or not self.share:
            raise ValueError("text has to read visual tokens in one block at least: share above 0, count at least 1")

    def number(self, blocks: int) -> int:
        return max(1, super().number(blocks))

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ..tokens._layered import check, decoder_blocks

        check(self, model)
        self.check_blocks(model, ctx)
        fused = [unit.name for unit in decoder_blocks(model) if unit.attention and unit.attention.q is None]
        if fused:
            raise Unmet(
                f"{self.name} would compute queries of visual tokens",
                where=fused[0],
                found="one projection of queries, keys and values",
                change="leave the pass out for this model",
            )

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ..tokens._layered import decoder_blocks, held, rules_of

        units, rules = decoder_blocks(model), rules_of(model)
        names = {unit.name: unit.path for unit in units}

        def put(chosen: Iterable[str]) -> None:
            crossing = {names[name] for name in chosen}
            for path, rule in rules.items():
                rule.frozen, rule.hidden = True, path not in crossing

        chosen, rounds = self.chosen(model, ctx, list(names), put)
        record = {"visual_tokens": "bypass", "crossing": [names[name] for name in chosen]}
        self.rebuild(model, record)
        numbers = {"crossing": chosen, "blocks": len(units), "kl": [row["scores"] for row in rounds], **held(model)}
        return Notes(numbers, record)

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        from ..tokens._layered import rules_of

        for path, rule in rules_of(model).items():
            rule.frozen, rule.hidden = True, path not in record["crossing"]
        model.refresh()

    def ensures(self, model: ModelView) -> None:
        from ..tokens._layered import broken, promised

        crossing = model.ledger.record_of(self)["crossing"]
        for path, rule in promised(self, model).items():
            if not rule.frozen or rule.hidden != (path not in crossing):
                raise broken(self, "visual tokens that bypass the decoder", path)

    def weaker(self) -> Self | None:
        """The next larger share of 0.25, 0.5, 0.75 and 1; nothing where blocks or their number are given."""
        if self.blocks or self.count is not None:
            return None
        higher = [share for share in (0.25, 0.5, 0.75, 1.0) if share > self.share]
        return replace(self, share=higher[0]) if higher else None

    def brief(self) -> Self:
        return replace(self, criterion="random")
