"""What all passes share that choose among the visual tokens before the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import ModelError, PromiseBroken, Unmet

if TYPE_CHECKING:
    from torch import Tensor

    from ...compress.anatomy import ModelView
    from ...compress.runtime.images import Choice, Images
    from ...compress.runtime.reduce import Reduction
    from ...compress.runtime.tower import Reader

LADDER = (0.125, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Reduce(Pass):
    """Keep a fraction of each image's tokens; compress/runtime/reduce.py does it, `choose` says which.

    Settings:
        keep: fraction of each image's visual tokens that stay, in (0, 1]; rounded, at least one token an image.
    """

    reads_tower: ClassVar[bool] = False  # whether `choose` is given the vision tower's attention and keys

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a fraction in (0, 1], not {self.keep}")

    def choose(self, images: Images, k: int) -> Choice:
        """Which k tokens of each image stay, and what they become where they are merged."""
        raise TypeError(f"{type(self).__name__} does not define choose")

    def wants_relevance(self) -> bool:
        """Whether `choose` is to be given the tokens' relevance to the prompt."""
        return False

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ...compress.runtime.reduce import obstacle

        if model.image_token_id is None:
            reason = "its language model sees the image through cross-attention, not as tokens of its sequence"
        else:
            reason = obstacle(model.model, model.decoder_path)
        if reason:
            raise Unmet(
                f"{self.name} cannot reduce the visual tokens of this model",
                where=f"family {model.family.name}",
                found=reason,
                change="leave the pass out for this model",
            )
        if self.reads_tower:
            self._reader(model)
            self._check_images(model, ctx)

    def _reader(self, model: ModelView) -> Reader:
        """Where the vision tower is read.

        Raises:
            Unmet: which patches become which visual token is not known, or the tower's attention is not.
        """
        from ...compress.runtime.tower import Reader

        cells = model.cells()
        reason = "which of the tower's patches become one visual token is not known from the model's config"
        if cells is not None:
            try:
                return Reader.of(model.tower_path, [u for u in model.parts["vision"] if u.stack is not None], cells)
            except ModelError as error:
                reason = str(error)
        raise Unmet(
            f"{self.name} cannot read this model's vision tower",
            where=f"family {model.family.name}",
            found=reason,
            change="choose visual tokens by their features: tokens.divprune, tokens.dpp, tokens.apet",
        )

    def _check_images(self, model: ModelView, ctx: Context) -> None:
        """The prompts' images have as many visual tokens as the config says."""
        from ...compress.runtime.images import runs

        per_image = model.per_image()
        if per_image is None:
            return
        for batch in ctx.fit[:1]:
            found = {places.shape[1] for places in runs(batch["input_ids"] == model.image_token_id, per_image)}
            if found - {per_image}:
                raise Unmet(
                    f"{self.name} cannot tell which patches become which visual token",
                    where=f"family {model.family.name}",
                    found=f"images of {sorted(found)} tokens in the prompts, {per_image} by the config",
                    change="choose visual tokens by their features: tokens.divprune, tokens.dpp, tokens.apet",
                )

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        reduction = self._install(model)
        counts = sorted({tokens for batch in ctx.fit for tokens in _image_sizes(reduction, batch)})
        kept = [reduction.kept(tokens) for tokens in counts]
        record: dict[str, Json] = {"keep": self.keep, "kept_per_image": kept[0] if len(set(kept)) == 1 else None}
        numbers: dict[str, Json] = {"tokens_per_image": counts, "kept_per_image": kept}
        return Notes(numbers | {"text_agnostic": not self.wants_relevance()}, record)

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        self._install(model)

    def _install(self, model: ModelView) -> Reduction:
        from ...compress.runtime.reduce import Reduction, install
        from ...compress.runtime.tower import Watch

        if model.image_token_id is None:
            raise Unmet(f"{self.name}: this model has no image token", where=f"family {model.family.name}")
        reduction = Reduction(
            self.choose,
            self.keep,
            model.image_token_id,
            self._label(),
            prompt=self.wants_relevance(),
            per_image=model.per_image() or 0,
            watch=Watch(self._reader(model)) if self.reads_tower else None,
        )
        install(model.model, model.decoder_path, reduction)
        return reduction

    def ensures(self, model: ModelView) -> None:
        from ...compress.runtime.reduce import installed

        reduction = installed(model.model)
        if reduction is None:
            found = "no reduction on the model"
        elif reduction.label != self._label():
            found = f"another one: {reduction.label}"
        elif not reduction.attached_to(model.model, model.decoder_path):
            found = "its hooks on the model are gone"
        elif reduction.watch is not None and reduction.watch.reader != self._reader(model):
            found = f"it reads {reduction.watch.reader.path}, no longer the tower's last block but one"
        else:
            return
        raise PromiseBroken(
            f"{self.name} promised that the language model sees {self.keep:.1%} of the visual tokens", found=found
        )

    def weaker(self) -> Self | None:
        higher = [keep for keep in LADDER if keep > self.keep]
        return replace(self, keep=higher[0]) if higher else None

    def _label(self) -> dict[str, Json]:
        return {"pass": self.name, **self.settings()}


def _image_sizes(reduction: Reduction, batch: Mapping[str, Tensor]) -> set[int]:
    """Tokens of the images in a batch."""
    rows = reduction.image_lengths(batch["input_ids"].eq(reduction.image_token_id))
    return {tokens for row in rows for tokens in row}
