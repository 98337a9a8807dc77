"""distill.features: train the small model towards the original's hidden states and answer distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...compress.base import Context
from ...compress.errors import Unmet
from .logits import Logits

if TYPE_CHECKING:
    from torch import Tensor

    from ...compress.anatomy import ModelView
    from ._mapping import Mapped
    from ._observe import Batch, Seen


@dataclass(frozen=True)
class Features(Logits):
    """Heal a changed model by its hidden states: what each block returns comes near what its origin returns.

    The loss is the mean distance of the hidden states of mapped blocks, on tokens that are no padding, plus `weight`
    times the loss of `distill.logits`. A block is compared with the block of the original that it once was, whatever
    blocks around it were removed; after a token pass the tokens that are left are compared with the same ones of the
    original, and where the original is shown larger pictures (`tokens.resolution`), those of text. Training, validation
    and what is kept are those of `distill.logits`.

    Settings:
        features: selector of the blocks (and connectors) whose outputs are compared.
        distance: ``mse``: squared difference of a token's state over its square in the original, so that tokens with
            huge states count like all others; ``cosine``: directions alone.
        weight: of the loss on answer distributions, which is far smaller than the distance of states once a model says
            nearly what the original says; 0: hidden states alone. What is kept is chosen by the answers' KL all the
            same.
        steps: optimizer steps.
        lr: peak learning rate. About 1e-4 for ``full``; the others, which train less, want ten times as much.
        batch_size: samples a step. Batches whose tensors cannot be split by sample are taken as the fit split gives
            them.
        train: ``full``, ``lora``, ``scales``, ``connector`` or ``norms``, as in `distill.logits`.
        lora_rank: rank of LoRA's update.
        loss: on answer distributions: ``forward``, ``reverse``, ``skewed`` or ``skewed_reverse``, as in
            `distill.logits`.
        skew: of the skewed ones.
        vision, vision_weight: the loss at visual tokens, as in `distill.logits`.
        temperature: both distributions are softened by it.
        warmup: share of the steps in which the learning rate rises.
        where: selector of what trains; null: everything but embeddings and head.
        weight_decay: the optimizer's.
        optimizer: ``adamw`` or ``muon``, as in `distill.logits`.
        average: of the weights over the last steps, as in `distill.logits`.
        seed: of the order of batches and of LoRA's start.
        data: ``fit``, ``recovery``, ``auto`` or other data, as in `distill.logits`.
    """

    name: ClassVar[str] = "distill.features"
    summary: ClassVar[str] = "heal: train towards the original's hidden states and answer distributions"
    paper: ClassVar[str] = "Minitron, arXiv 2407.14679; FitNets, arXiv 1412.6550; DistiLLM, arXiv 2402.03898"

    features: tuple[str, ...] | str = ("language",)
    distance: Literal["mse", "cosine"] = "mse"
    weight: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0:
            raise ValueError(f"weight is not negative, not {self.weight}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ...calib.shown import differs

        super().requires(model, ctx)
        with ctx.teacher() as original:
            watched = self.watched(model, original)
        pictures = [unit.here.name for unit in watched if unit.here.tokens == "image"]
        if pictures and differs(ctx.fit):
            raise Unmet(
                f"{self.name} finds nothing to compare these states with",
                where=pictures[0],
                found="the original is shown other pictures, so its visual tokens are others",
                change="features: language",
            )

    def watched(self, model: ModelView, original: ModelView) -> list[Mapped]:
        from ._mapping import mapped

        return mapped(model, original, model.select(self.features), self.name)

    def lost(self, model: ModelView, batch: Batch, watched: list[Mapped], seen: Seen, wanted: Seen) -> Tensor:
        import torch

        from ._losses import state_distance
        from ._observe import pair

        pairs = [pair(model, batch, unit, seen, wanted, i) for i, unit in enumerate(watched)]
        apart = torch.stack([state_distance(mine, theirs, self.distance) for mine, theirs in pairs]).mean()
        return apart + self.weight * super().lost(model, batch, watched, seen, wanted) if self.weight else apart
