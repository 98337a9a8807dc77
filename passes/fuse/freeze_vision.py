"""fuse.freeze_vision: in some blocks visual tokens are read, not worked on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from ...compress.base import Context, Json, Notes
from ._blocks import Blocks

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView


@dataclass(frozen=True)
class FreezeVision(Blocks):
    """In chosen blocks visual tokens stay as they are: no queries, no output projection, no MLP for them (ShortV).

    Text attends to them as before: their keys and values are computed from their unchanged hidden states. Nothing is
    trained and no weight changes; what is saved is computation. The blocks chosen are those in which the answers miss
    the work on visual tokens least.

    Settings:
        share: of the decoder's blocks, rounded half up.
        count: how many blocks instead of a share.
        blocks: their numbers from 0, where nothing is to be chosen.
        criterion: ``greedy``: one block after the other, by the KL divergence of the answers' tokens from the
            original's with it frozen as well, all scored anew each time. ``kl``: the same with each block frozen alone,
            once (the paper's way). ``random``: the control.
        samples: questions of the fit split that are asked to choose.
        seed: of ``random``.
    """

    name: ClassVar[str] = "fuse.freeze_vision"
    summary: ClassVar[str] = "visual tokens skip queries, output projection and MLP in chosen blocks"
    paper: ClassVar[str] = "ShortV, arXiv 2504.00502"

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ..tokens._layered import DROPPED, check

        check(self, model, DROPPED)
        self.check_blocks(model, ctx)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ..tokens._layered import decoder_blocks, rules_of

        units, rules = decoder_blocks(model), rules_of(model)
        names = {unit.name: unit.path for unit in units}

        def put(chosen: Iterable[str]) -> None:
            frozen = {names[name] for name in chosen}
            for path, rule in rules.items():
                rule.frozen = path in frozen

        chosen, rounds = self.chosen(model, ctx, list(names), put)
        record = {"visual_tokens": "frozen", "frozen": [names[name] for name in chosen]}
        self.rebuild(model, record)
        return Notes({"frozen": chosen, "blocks": len(units), "kl": [row["scores"] for row in rounds]}, record)

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        from ..tokens._layered import rules_of

        for path, rule in rules_of(model).items():
            rule.frozen = path in record["frozen"]
        model.refresh()

    def ensures(self, model: ModelView) -> None:
        from ..tokens._layered import broken, promised

        frozen = model.ledger.record_of(self)["frozen"]
        for path, rule in promised(self, model).items():
            if rule.frozen != (path in frozen) or rule.hidden:
                raise broken(self, "visual tokens that are frozen in certain blocks", path)

    def weaker(self) -> Self | None:
        """One block fewer; of a share, the next smaller of 0.75, 0.5, 0.25 and 0.125."""
        if self.blocks:
            return None
        if self.count is not None:
            return replace(self, count=self.count - 1) if self.count > 1 else None
        lower = [share for share in (0.75, 0.5, 0.25, 0.125) if share < self.share]
        return replace(self, share=lower[0]) if lower else None

    def brief(self) -> Self:
        return replace(self, criterion="random")
