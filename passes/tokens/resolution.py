"""tokens.resolution: as many visual tokens by smaller pictures, the control that a choice among tokens has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import PromiseBroken, Unmet, WorkFailed
from ._reduce import LADDER

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView


@dataclass(frozen=True)
class Resolution(Pass):
    """Show the model smaller pictures, so that it has fewer visual tokens: the cheapest way to have fewer of them.

    Where pictures have one size, it becomes that whose number of patches is nearest to `keep` times as many; position
    embeddings are resized (bicubic), tiles become smaller by as much, and there are as many of them. Where the
    processor fits pictures of any size under a limit of pixels (Qwen-VL), the limit becomes that under which the
    pictures of the fit split have `keep` times as many tokens; pictures far below it are left as they are. Config and
    processor say it all: stock `from_pretrained` loads the result. The vision tower works less, too, which no choice
    among its outputs achieves.

    Everything after this pass is measured, calibrated and trained with the smaller pictures. The original that it is
    compared with, and learns from, is shown the large ones.

    Settings:
        keep: fraction of the visual tokens that is aimed at, in (0, 1]; the notes say what came of it.
    """

    name: ClassVar[str] = "tokens.resolution"
    summary: ClassVar[str] = "fewer visual tokens: smaller pictures (a control)"
    paper: ClassVar[str] = "position embeddings: ViT, arXiv 2010.11929"

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a fraction in (0, 1], not {self.keep}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ._pictures import find_change, find_limit, find_sides, limited, with_limit, with_sides

        if model.image_token_id is None:
            raise Unmet(
                f"{self.name} has no visual tokens to count",
                where=f"family {model.family.name}",
                found="its language model sees the image through cross-attention, not as tokens of its sequence",
                change="leave the pass out for this model",
            )
        if getattr(model.processor, "image_processor", None) is None:
            raise Unmet(
                f"{self.name} needs the processor that makes the pictures",
                where=f"family {model.family.name}",
                found="none" if model.processor is None else type(model.processor).__name__,
                change="put the processor's files beside the weights: processor.save_pretrained(folder)",
            )
        if limited(model):
            with_limit(model, find_limit(model, ctx.fit, self.keep))
            return
        sides = find_sides(model, self.keep)
        find_change(model, sides)
        for batch in ctx.fit:
            shown = batch["pixel_values"].shape[-1] if "pixel_values" in batch else sides.pixels[0]
            if shown != sides.pixels[0]:
                raise Unmet(
                    f"{self.name} does not know how pictures become {shown} pixels wide",
                    where="the processor",
                    found=f"its config says {sides.pixels[0]}",
                    change="leave the pass out for this model",
                )
        with_sides(model, sides)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ._pictures import find_change, find_limit, find_sides, limited, shrink, with_limit, with_sides

        if limited(model):
            limit = find_limit(model, ctx.fit, self.keep)
            sight: dict[str, Json] = {"most_pixels": limit.pixels[1]}
            before, after = limit.tokens
            processor = with_limit(model, limit)
        else:
            sides = find_sides(model, self.keep)
            sight = {"side": sides.pixels[1]}
            before, after = sides.tokens
            processor = with_sides(model, sides)
            if after != before:
                shrink(model, find_change(model, sides))
        if after == before:
            remark = f"no smaller picture comes nearer to {self.keep:.1%} of its tokens: nothing was changed"
            return Notes({"share_of_tokens": 1.0, "remarks": [remark] if self.keep < 1 else []}, {"sight": None})
        model.processor = processor
        record: dict[str, Json] = {"sight": sight}
        self.rebuild(model, record)
        _try(self.name, model)
        numbers = {"tokens_before": before, "tokens": after, "share_of_tokens": after / before}
        return Notes(numbers | sight, record)

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        """Sizes are in the config and the processor's files; that they are smaller than the original's is told here."""
        if record["sight"] is not None:
            model.sight = (*model.sight, record["sight"])

    def ensures(self, model: ModelView) -> None:
        sight = model.ledger.record_of(self)["sight"] or {}
        found = {}
        if "side" in sight:
            size = model.model.config.vision_config.image_size
            found["side"] = max(size) if isinstance(size, (list, tuple)) else size
        elif "most_pixels" in sight and model.processor is not None:
            found["most_pixels"] = model.processor.image_processor.size["longest_edge"]
        for what, value in found.items():
            if value > sight[what]:
                raise PromiseBroken(f"{self.name} promised smaller pictures", found=f"{what} {value} > {sight[what]}")

    def weaker(self) -> Self | None:
        higher = [keep for keep in LADDER if keep > self.keep]
        return replace(self, keep=higher[0]) if higher else None


def _try(name: str, model: ModelView) -> None:
    """Processor and model agree: a question about a picture goes through.

    Raises:
        WorkFailed: they do not.
    """
    from ...calib.ask import example_prompt
    from ...compress.base import evaluating

    try:
        with evaluating(model.model):
            model.model(**{k: v.to(model.model.device) for k, v in example_prompt(model).items()})
    except Exception as error:  # models find out in their own ways
        raise WorkFailed(
            f"{name} left a processor and a model that do not fit",
            where=f"family {model.family.name}",
            found=f"{type(error).__name__}: {error}",
            change="leave the pass out for this model",
        ) from error
