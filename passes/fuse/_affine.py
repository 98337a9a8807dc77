"""Moving the scale and the bias of a norm into the linears behind it: what fuse.norms and fuse.connector share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...compress.base import Context, Notes, Pass, evaluating
from ...compress.errors import Unmet, WorkFailed

if TYPE_CHECKING:
    import torch

    from ...compress.anatomy import LinearRef, ModelView, Unit
    from ..quantize._fold import Pair

SAMPLES = 4  # whose logits are compared
TOLERANCE = 1e-3  # of the largest logit: more than rounding, so the anatomy is wrong


@dataclass(frozen=True)
class Fold(Pass):
    """The passes that derive from it say which norms, and explain their settings."""

    def pairs(self, model: ModelView) -> list[Pair]:
        """Each norm with the linears that alone read it, and what stands in the way."""
        raise TypeError(f"{type(self).__name__} does not define pairs")

    def requires(self, model: ModelView, ctx: Context) -> None:
        found = self.pairs(model)
        if all(pair.obstacle is not None for pair in found):
            reasons = Counter(pair.obstacle for pair in found)
            raise Unmet(
                f"{self.name} finds nothing to fold",
                where=f"family {model.family.name}",
                found="; ".join(f"{reason} ({n})" for reason, n in reasons.items()) or self.nothing(model),
                change="leave the pass out for this model",
            )

    def nothing(self, model: ModelView) -> str:
        """Why there is no norm to fold."""
        return "no norm whose output linears alone read"

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ..quantize._fold import fold, gain_offset

        before = _logits(model, ctx)
        done, biases, left = [], 0, Counter[str]()
        for pair in self.pairs(model):
            if pair.obstacle is not None:
                left[pair.obstacle] += 1
                continue
            norm = model.model.get_submodule(pair.source)
            biases += move_bias(model, pair)
            offset = gain_offset(norm)
            assert offset is not None
            fold(model, pair, norm.weight.detach().float() + offset)
            done.append(pair.source)
        numbers = {"norms": len(done), "biases_moved": biases, "left": dict(left)}
        if before is not None:
            after = _logits(model, ctx)
            assert after is not None
            change, largest = float((after - before).abs().max()), float(before.abs().max())
            if not change <= TOLERANCE * largest:
                raise WorkFailed(
                    f"{self.name} changed what the model computes",
                    where=f"family {model.family.name}",
                    found=f"logits moved by {change:.3g}; the largest is {largest:.3g}",
                    change="one of these norms is read elsewhere too: correct the anatomy row (norm, entry)",
                )
            numbers["largest_change_of_a_logit"] = change
        return Notes(numbers, {"norms": done})


def inside(view: ModelView, selected: Sequence[LinearRef]) -> Iterator[Pair]:
    """The norms within units that feed a selected linear, with what stands in the way."""
    from torch import nn

    from ..quantize._fold import pairs_of

    for unit in view.units:
        for pair in pairs_of(view, unit, selected):
            if not isinstance(view.model.get_submodule(pair.source), nn.Linear):
                yield checked(view, pair)


def entering(view: ModelView, unit: Unit) -> Pair | None:
    """The norm in front of a unit that no other reads, with what stands in the way; None where there is none."""
    from ..quantize._fold import Pair, gain_offset

    if unit.entry is None:
        return None
    norm = view.model.get_submodule(unit.entry)
    pair = Pair(unit.entry, unit.stages[0] if unit.stages else (), matrix=unit.matrix)
    if gain_offset(norm) is None:
        return replace(pair, obstacle="the norm does not scale by its weight")
    return checked(view, pair)


def checked(view: ModelView, pair: Pair) -> Pair:
    """`pair` with the obstacle that folding meets, beside those that moving any scale meets."""
    if pair.obstacle is not None:
        return pair
    if any(ref.path in view.grids for ref in pair.targets):
        return replace(pair, obstacle="a linear that reads it is quantized already")
    if view.tied_embeddings and any(ref.unit.part == "head" for ref in pair.targets):
        return replace(pair, obstacle="the head shares its weight with the embedding")
    return pair


def move_bias(view: ModelView, pair: Pair) -> bool:
    """Let the biases of the readers say what the norm's bias says: ``b' = b + W bias``; whether that was done.

    It is where every reader has a bias. What else becomes of the norm's bias is `fold`'s: it is divided by the scale.
    """
    import torch

    bias: torch.Tensor | None = getattr(view.model.get_submodule(pair.source), "bias", None)
    if bias is None or pair.matrix is not None or any(ref.module.bias is None for ref in pair.targets):
        return False
    with torch.no_grad():
        for ref in pair.targets:
            weight = ref.module.weight.double()
            moved = weight @ bias.double().repeat(weight.shape[1] // len(bias))
            ref.module.bias.add_(moved.to(ref.module.bias))
        bias.zero_()
    return True


def _logits(model: ModelView, ctx: Context) -> torch.Tensor | None:
    """Of a few samples; None where there is no data."""
    from ...calib.replay import pieces
    from ..distill._observe import all_logits

    if not len(ctx.fit):
        return None
    with evaluating(model.model):
        return all_logits(model, next(pieces(model, ctx.fit[0], SAMPLES))).float()
