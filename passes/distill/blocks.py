"""distill.blocks: each block in turn learns what the original's block returned for the same samples."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...compress.base import Context, Json, Notes, Silent
from ...compress.errors import Unmet
from ._common import Distill

if TYPE_CHECKING:
    from torch import Tensor

    from ...calib.walk import WalkUnit
    from ...compress.anatomy import ModelView
    from ..quantize._parts import Part
    from ._mapping import Mapped

SAME = 1e-9  # mean square of the difference over that of the output: nothing to learn


@dataclass(frozen=True)
class Blocks(Distill):
    """Heal a changed model block by block: each learns to return what the original returned at the same place.

    Blocks are walked in forward order. What a block is given comes from the blocks before it as they now are, what it
    learns is what its origin returned in the original for the same samples, so that it makes up for what was lost
    before it. A tenth of the samples is held out in every block, and what does best on it is kept, the block as it was
    included; a block that returns the same already is left alone. Only one block is trained at a time: it takes the
    memory of a block, not of a model. It never suffices alone: let `distill.logits` follow.

    Settings:
        steps: optimizer steps in every block.
        lr: peak learning rate. About 1e-4 for ``full``; the others, which train less, want ten times as much.
        batch_size: samples a step.
        train: of the block at hand. ``full``: all its weights; ``lora``: a low-rank update of each selected linear,
            merged at the end; ``scales``: of its selected linears that are quantized, the scales; ``norms``: norms,
            biases and layer scales; ``connector``: the connector alone, whole.
        lora_rank: rank of that update.
        warmup: share of the steps in which the learning rate rises.
        where: selector of what trains; null: everything but embeddings and head.
        weight_decay: the optimizer's.
        optimizer: ``adamw`` or ``muon``, as in `distill.logits`.
        average: of the weights over the last steps, as in `distill.logits`.
        seed: of the order of samples and of LoRA's start.
        token_weights: how visual and text tokens count in the difference of a block's outputs: ``balanced`` (half
            each), ``uniform``, ``text``, or ``gradient``, which weighs a visual token by MBQ's ratio of gradients. A
            token's squared difference counts as a share of its square in the original. In the vision tower and the
            connector every token counts the same.
    """

    name: ClassVar[str] = "distill.blocks"
    summary: ClassVar[str] = "heal: each block in turn learns what the original's block returned"
    paper: ClassVar[str] = "block-wise: BRECQ, arXiv 2102.05426; its inputs: GPTAQ, arXiv 2504.02692"

    token_weights: Literal["balanced", "gradient", "uniform", "text"] = "balanced"

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ...calib.shown import differs

        super().requires(model, ctx)
        if not self.selected(model):
            raise Unmet(f"{self.name} finds no linear to walk to", where=f"train: {self.train}", found="none")
        if differs(ctx.fit):
            raise Unmet(
                f"{self.name} compares blocks token by token",
                found="the original is shown other pictures, so its tokens are others",
                change="distill.logits, or distill.features of the language model",
            )
        with ctx.teacher() as original:
            self._mapped(model, original)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ...calib.walk import Walk
        from ..quantize._parts import parts_of

        walk = ctx.walk("connector" if self.train == "connector" else self.where, name="blocks")
        with ctx.teacher() as original:
            origins = self._mapped(model, original)
            theirs = iter(Walk(original, ctx.fit, [unit.there.name for unit in origins.values()], name="original"))
            for unit in walk:
                origin = origins[unit.name]
                there = next(other for other in theirs if other.name == origin.there.name)
                wanted = _outputs(there, origin, unit)
                parts, whole = parts_of(unit, self.batch_size, self.token_weights, relative=True, targets=wanted)
                unit.notes |= {"whole_batches": whole} | self._learn(model, unit, parts, ctx)
        return Notes(_numbers(walk.notes), {})

    def _mapped(self, model: ModelView, original: ModelView) -> dict[str, Mapped]:
        from ._mapping import mapped

        chosen = {ref.unit for ref in self.selected(model)}
        units = [unit for unit in model.units if unit in chosen]
        return {one.here.name: one for one in mapped(model, original, units, self.name)}

    def _learn(self, model: ModelView, unit: WalkUnit, parts: list[Part], ctx: Context) -> dict[str, Json]:
        """Train one block; for its notes, how that went."""
        import torch

        from ...compress.runtime.codebook import integer_grids
        from ._feed import Feed, epochs, held_out
        from ._train import train
        from ._trained import training

        if not parts:
            return {"why": "none of its tokens counts"}
        grids = integer_grids(model.grids)
        linears = [ref for ref in unit.linears if self.train != "scales" or ref.path in grids]
        if not linears:
            return {"why": "nothing of it is quantized"}
        seed = zlib.crc32(f"{ctx.seed} {self.seed} {unit.name}".encode())  # of the block: a resumed walk draws the same
        learn, validation = held_out(parts)
        with torch.no_grad():
            if max(float(_lost(unit, part)) for part in validation) <= SAME:
                return {"why": "it returns the same already"}
        feed = Feed(lambda start: epochs(learn, seed, start))
        generator = torch.Generator().manual_seed(seed)
        with training(model, self.train, linears, (), self.lora_rank, generator) as trained:
            course = train(
                trained.parameters,
                lambda part: (_lost(unit, part), part.target.shape[:-1].numel()),
                lambda part: _lost(unit, part),
                feed,
                validation,
                self.plan(),
                Silent(),
            )
            if course.best[0] > 0:
                trained.settle()
        numbers = {"first": course.checks[0], "best": course.best[1]}
        return numbers | {"parameters": sum(p.numel() for p in trained.parameters)} | self.numbers(course)


def _outputs(there: WalkUnit, origin: Mapped, here: WalkUnit) -> Iterator[Tensor]:
    """What the original's unit returned for each of the inputs of `here`: tokens and channels that are still there."""
    import torch

    from ..quantize._parts import first

    for output, kept in zip(there.outputs(), here.kept(), strict=True):
        target = first(output)
        if kept is not None:
            target = target.gather(1, kept[0].to(target.device)[..., None].expand(-1, -1, target.shape[-1]))
        if origin.channels is not None:
            target = target.index_select(-1, torch.tensor(origin.channels, device=target.device))
        yield target


def _lost(unit: WalkUnit, part: Part) -> Tensor:
    """Mean squared difference of the tokens that count, as a share of what the original returned."""
    size = part.total if part.weights is not None else float(part.target.float().square().sum())
    return part.loss(unit, {}) / max(size, 1e-30)


def _numbers(units: dict[str, dict[str, Json]]) -> dict[str, Json]:
    rows = [notes for notes in units.values() if "best" in notes]
    reasons = [notes["why"] for notes in units.values() if "why" in notes]
    diverged, unmoved = sum(r["diverged_at"] is not None for r in rows), sum(r["best_step"] == 0 for r in rows)
    remarks = [f"training diverged in {diverged} of {len(rows)} blocks; a lower lr may help"] if diverged else []
    remarks += [f"{unmoved} of {len(rows)} blocks are as they were: training made nothing better"] if unmoved else []
    remarks += [] if rows else [f"no block was trained: {', '.join(sorted(set(reasons)))}"]
    return {
        "remarks": remarks,
        "blocks": len(units),
        "blocks_trained": len(rows),
        "blocks_left_alone": {why: reasons.count(why) for why in sorted(set(reasons))},
        "blocks_kept_at_start": unmoved,
        "blocks_diverged": diverged,
        "batches_not_split": sum(notes["whole_batches"] for notes in units.values()),
        "mean_loss_left": sum(row["best"] / row["first"] for row in rows) / len(rows) if rows else 1.0,
        "trained_parameters": sum(row["parameters"] for row in rows),
        "loss": {name: [notes["first"], notes["best"]] for name, notes in units.items() if "best" in notes},
    }
