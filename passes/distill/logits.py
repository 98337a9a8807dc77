"""distill.logits: train the small model towards the original's answer distributions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass, evaluating
from ...compress.errors import PromiseBroken, Unmet

if TYPE_CHECKING:
    from torch import nn

    from ...compress.anatomy import LinearRef, ModelView
    from ._train import Batch, Course

VALIDATION = 64  # samples of the fit split that recovery data are validated on


@dataclass(frozen=True)
class Logits(Pass):
    """Heal a changed model: it learns the original's token distribution at every answer token (masked forward KL).

    AdamW with linear warm-up and a cosine, gradients clipped at 1. Dropout stays off, so a run with the same seed
    repeats itself bit for bit. A tenth of the fit split is held out; the weights that do best on it are kept, the
    untrained ones included, so that training never leaves the model worse there. A loss that is not finite, or three
    times that of the first steps, ends the training early. Weights are trained before quantizing, or they would leave
    their grid; scales after it.

    Settings:
        steps: optimizer steps.
        lr: peak learning rate. About 1e-4 for ``full``; ``lora`` and ``scales`` want ten times as much.
        batch_size: samples a step. Batches whose tensors cannot be split by sample (the patches of all images in one
            tensor) are taken as the fit split gives them.
        train: ``full``: all weights of the selected blocks. ``lora``: a low-rank update of each selected linear, merged
            at the end. ``scales``: of the selected linears that are quantized, the scales, as shares of themselves; the
            integers stay (EfficientQAT's second phase).
        lora_rank: rank of that update.
        temperature: both distributions are softened by it.
        warmup: share of the steps in which the learning rate rises.
        where: selector of what trains; null: everything but embeddings and head. Blocks that are selected as a whole
            train their norms too.
        weight_decay: AdamW's.
        seed: of the order of batches and of LoRA's start.
        data: ``fit``: the fit split, again and again. ``recovery``: fresh samples without end, from a source that makes
            them (the demo's generator). ``auto``: recovery where the data has it, else fit.
    """

    name: ClassVar[str] = "distill.logits"
    summary: ClassVar[str] = "heal: train towards the original's answer distributions"
    paper: ClassVar[str] = "Minitron, arXiv 2407.14679; LoRA, arXiv 2106.09685; EfficientQAT, arXiv 2407.11062"

    steps: int = 200
    lr: float = 1e-4
    batch_size: int = 16
    train: Literal["full", "lora", "scales"] = "full"
    lora_rank: int = 16
    temperature: float = 1.0
    warmup: float = 0.1
    where: tuple[str, ...] | str | None = None
    weight_decay: float = 0.0
    seed: int = 0
    data: Literal["auto", "fit", "recovery"] = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        for name in ("lr", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is above 0, not {getattr(self, name)}")
        if not 0 <= self.warmup <= 1 or self.weight_decay < 0:
            raise ValueError("warmup is a share in [0, 1], weight_decay is not negative")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ...compress.runtime.codebook import integer_grids

        linears = model.linears(self.where)
        gridded = [ref.path for ref in linears if ref.path in model.grids]
        if self.train == "scales" and not any(path in integer_grids(model.grids) for path in gridded):
            raise Unmet(
                f"{self.name} finds no scales to train",
                where=f"where: {self.where}",
                found="no linear with integers and scales",
                change="put a quantizing pass before it, or train: full",
            )
        if self.train != "scales" and gridded:
            raise Unmet(
                f"{self.name} would take quantized weights off their grid",
                where=gridded[0],
                found=f"{len(gridded)} quantized linears among those to train",
                change="train: scales, or put the quantizing pass last, or choose 'where' so that it leaves them out",
            )
        if self.train != "full" and model.tied_embeddings and any(ref.unit.part == "head" for ref in linears):
            raise Unmet(
                f"train: {self.train} of a head that shares its weight with the embedding would change both",
                change="leave the head out of 'where', or train: full",
            )
        if self.data == "recovery" and ctx.recovery is None:
            raise Unmet(
                f"{self.name} finds no recovery data",
                where="data: recovery",
                found="the calibration data has only its fit samples",
                change="data: fit, or calibrate with a source that generates samples (demo)",
            )
        if not len(ctx.fit):
            raise Unmet(f"{self.name} needs fit samples to validate on", change="raise calibration: fit")

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        import torch

        from ...calib.balance import frozen
        from ...compress.runtime.codebook import integer_grids
        from ._lora import adapted, merge
        from ._scales import loosened, settle
        from ._train import Plan, Teacher, train

        generator = torch.Generator().manual_seed(ctx.seed + self.seed)
        batches, validation, again, share = self._batches(model, ctx)
        linears = model.linears(self.where)
        plan = Plan(self.steps, self.lr, self.warmup, self.weight_decay, self.temperature)
        with ctx.teacher() as original, evaluating(model.model), frozen(model.model):
            teacher = Teacher(original, again)
            if self.train == "lora":
                with adapted([ref.module for ref in linears], self.lora_rank, generator) as adapters:
                    trained = [p for adapter in adapters for p in (adapter.down, adapter.up)]
                    course = train(model, teacher, trained, batches, validation, plan, ctx.progress)
                    if course.best[0] > 0:
                        merge(adapters)
            elif self.train == "scales":
                grids = integer_grids(model.grids)
                paths = [ref.path for ref in linears if ref.path in grids]
                modules = [model.linear(path).module for path in paths]
                with loosened(modules, [grids[path] for path in paths]) as loose:
                    trained = [one.move for one in loose]
                    course = train(model, teacher, trained, batches, validation, plan, ctx.progress)
                    if course.best[0] > 0:
                        settle(loose)
            else:
                trained = self._parameters(model, linears)
                for parameter in trained:
                    parameter.requires_grad_(True)
                course = train(model, teacher, trained, batches, validation, plan, ctx.progress)
        used = "fit" if self.data == "fit" or ctx.recovery is None else "recovery"
        return Notes({"data": used} | self._numbers(course, trained, share), {})

    def ensures(self, model: ModelView) -> None:
        import torch

        for name, parameter in model.model.named_parameters():
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                raise PromiseBroken(f"{self.name} promised finite weights", where=name)

    def brief(self) -> Self:
        return replace(self, steps=min(self.steps, 2))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _parameters(self, model: ModelView, linears: tuple[LinearRef, ...]) -> list[nn.Parameter]:
        """What `train: full` trains: whole units where all of a unit's linears are selected, else the linears alone."""
        chosen = {ref.path for ref in linears}
        found: dict[int, nn.Parameter] = {}
        for unit in model.units:
            mine = [ref for ref in unit.linears if ref.path in chosen]
            bare = self.where is None and not unit.linears and unit.part != "head"
            whole = bare or (bool(mine) and len(mine) == len(unit.linears))
            modules = [unit.module] if whole else [ref.module for ref in mine]
            found |= {id(p): p for module in modules for p in module.parameters() if p.is_floating_point()}
        return list(found.values())

    def _batches(self, model: ModelView, ctx: Context) -> tuple[Iterator[Batch], list[Batch], list[Batch], float]:
        """Training batches, validation batches, those that come more than once, the share of answer tokens."""
        from ._train import endless, epochs, has_answer, held_out, split

        fit = [part for batch in ctx.fit for part in split(batch, self.batch_size) if has_answer(model, part)]
        if not fit:
            raise Unmet(f"{self.name} finds no answer token in the fit split", where="labels")
        real = answers = 0
        for batch in fit:
            masks = model.token_masks(batch)
            real, answers = real + int((~masks.padding).sum()), answers + int(masks.answer.sum())
        share = answers / max(1, real)
        recovery = ctx.recovery
        if self.data != "fit" and recovery is not None:
            fresh = endless(lambda: recovery(self.batch_size))
            count = max(1, VALIDATION // self.batch_size)
            return (b for b in fresh if has_answer(model, b)), fit[:count], fit[:count], share
        learn, validation = held_out(fit)
        return epochs(learn, ctx.seed + self.seed), validation, fit, share

    def _numbers(self, course: Course, trained: list[nn.Parameter], share: float) -> dict[str, Json]:
        step, loss = course.best
        return {
            "kl_first": course.checks[0],
            "kl_last": list(course.checks.values())[-1],
            "kl_best": loss,
            "best_step": step,
            "steps": len(course.losses),
            "diverged_at": course.diverged_at,
            "trained_parameters": sum(p.numel() for p in trained),
            "answer_tokens_seen": course.tokens,
            "share_of_answer_tokens": round(share, 4),
            "training_loss_first": course.losses[0],
            "training_loss_last": course.losses[-1],
            "course": {str(k): v for k, v in course.checks.items()},
        }
