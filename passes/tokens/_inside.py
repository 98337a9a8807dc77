"""What the passes share that drop visual tokens inside the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import Unmet

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView


@dataclass(frozen=True)
class Inside(Pass):
    """Drop visual tokens at some blocks; compress/runtime/layered.py does it, `stages` says where and how many."""

    names_blocks: ClassVar[bool] = True

    def stages(self, blocks: int) -> tuple[list[int], dict[int, float]]:
        """Of a decoder with that many blocks those that rank; and block -> the share of each image left from there."""
        raise TypeError(f"{type(self).__name__} does not define stages")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ._layered import FROZEN, check, decoder_blocks

        check(self, model, FROZEN)
        blocks = len(decoder_blocks(model))
        ranks, keep = self.stages(blocks)
        outside = [number for number in [*ranks, *keep] if not 0 <= number < blocks]
        if outside or not keep:
            raise Unmet(
                f"{self.name} names a block that the decoder does not have",
                where=f"family {model.family.name}",
                found=f"block {max(outside, default=0)}; it has 0 to {blocks - 1}",
                change="name other blocks",
            )

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ...compress.runtime.reduce import kept_count
        from ._layered import decoder_blocks, held
        from ._reduce import image_sizes

        paths = [unit.path for unit in decoder_blocks(model)]
        ranks, keep = self.stages(len(paths))
        record: dict[str, Json] = {"visual_tokens": "dropped", "ranks": [paths[i] for i in ranks]}
        record["keep"] = {paths[i]: share for i, share in keep.items()}
        self.rebuild(model, record)
        counts = sorted({tokens for batch in ctx.fit for tokens in image_sizes(model, batch)})
        left = {str(i): [kept_count(tokens, share) for tokens in counts] for i, share in keep.items()}
        return Notes({"tokens_per_image": counts, "kept_per_image_from_block": left, **held(model)}, record)

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        from ._layered import rules_of

        rules = rules_of(model)
        for path in record["ranks"]:
            rules[path].ranks = True
        for path, share in record["keep"].items():
            rules[path].keep = share
        model.refresh()

    def ensures(self, model: ModelView) -> None:
        from ._layered import broken, promised

        rules, record = promised(self, model), model.ledger.record_of(self)
        for path, rule in rules.items():
            if rule.ranks != (path in record["ranks"]) or rule.keep != record["keep"].get(path):
                raise broken(self, "to drop visual tokens by the prompt's attention at certain blocks", path)
