"""What the distilling passes share: the settings of training, what they refuse, what they promise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

from ...compress.base import Context, Json, Pass
from ...compress.errors import PromiseBroken, Unmet

if TYPE_CHECKING:
    from ...compress.anatomy import LinearRef, ModelView, Unit
    from ._train import Course, Plan


@dataclass(frozen=True)
class Distill(Pass):
    """Settings of training; the passes that derive from it explain them."""

    steps: int = 200
    lr: float = 1e-4
    batch_size: int = 16
    train: Literal["full", "lora", "scales", "connector", "norms"] = "full"
    lora_rank: int = 16
    warmup: float = 0.1
    where: tuple[str, ...] | str | None = None
    weight_decay: float = 0.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    average: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr is above 0, not {self.lr}")
        if not 0 <= self.warmup <= 1 or self.weight_decay < 0:
            raise ValueError("warmup is a share in [0, 1], weight_decay is not negative")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is a share in [0, 1), not {self.average}")
        if self.train == "connector" and self.where is not None:
            raise ValueError("train: connector says by itself what trains; leave 'where' out")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ...compress.runtime.codebook import integer_grids
        from ._trained import sparse

        if self.train == "connector" and "connector" not in model.parts:
            raise Unmet(f"{self.name} finds no connector to train", where=f"family {model.family.name}")
        linears = self.selected(model)
        gridded = [ref.path for ref in linears if ref.path in model.grids]
        if self.train == "scales" and not any(path in integer_grids(model.grids) for path in gridded):
            raise Unmet(
                f"{self.name} finds no scales to train",
                where=f"where: {self.where}",
                found="no linear with integers and scales",
                change="put a quantizing pass before it, or train: full",
            )
        if self.train not in ("scales", "norms") and gridded:
            raise Unmet(
                f"{self.name} would take quantized weights off their grid",
                where=gridded[0],
                found=f"{len(gridded)} quantized linears among those to train",
                change="train: scales or norms, or put the quantizing pass last, or choose a 'where' that leaves them "
                "out",
            )
        if self.train in ("lora", "scales") and model.tied_embeddings and any(r.unit.part == "head" for r in linears):
            raise Unmet(
                f"train: {self.train} of a head that shares its weight with the embedding would change both",
                change="leave the head out of 'where', or train: full",
            )
        culprit = "train: lora" if self.train == "lora" else "optimizer: muon" if self.optimizer == "muon" else ""
        filled = sparse(model, linears) if culprit and self.train in ("full", "lora", "connector") else []
        if filled:
            raise Unmet(
                f"{culprit} would fill the zeros that an earlier pass promised",
                where=filled[0].path,
                found=f"{len(filled)} sparse linears among those to train",
                change="train: full with optimizer: adamw, which keeps them",
            )
        if not len(ctx.fit):
            raise Unmet(f"{self.name} needs fit samples to validate on", change="raise calibration: fit")

    def ensures(self, model: ModelView) -> None:
        import torch

        for name, parameter in model.model.named_parameters():
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                raise PromiseBroken(f"{self.name} promised finite weights", where=name)

    def brief(self) -> Self:
        return replace(self, steps=min(self.steps, 2))

    # -- for the passes ------------------------------------------------------------------------------------------------

    def selected(self, model: ModelView) -> tuple[LinearRef, ...]:
        """The linears that train, or whose units' norms do."""
        if self.train == "connector":
            return tuple(ref for unit in model.parts["connector"] for ref in unit.linears)
        return model.linears(self.where)

    def bare(self, model: ModelView) -> list[Unit]:
        """Units without linears: they train with all the others, since no selector can name them."""
        if self.train == "connector":
            return [unit for unit in model.parts["connector"] if not unit.linears]
        everything = self.where is None
        return [unit for unit in model.units if everything and not unit.linears and unit.part != "head"]

    def plan(self) -> Plan:
        from ._train import Plan

        return Plan(self.steps, self.lr, self.warmup, self.weight_decay, self.optimizer, self.average)

    def numbers(self, course: Course) -> dict[str, Json]:
        """How training went."""
        return {
            "best_step": course.best[0],
            "steps": len(course.losses),
            "diverged_at": course.diverged_at,
            "training_loss_first": course.losses[0],
            "training_loss_last": course.losses[-1],
            "course": {str(step): loss for step, loss in course.checks.items()},
        }


def remarks(course: Course) -> list[str]:
    """What a reader of the report has to know beside the figures."""
    said = []
    if course.diverged_at is not None:
        said.append(f"training diverged at step {course.diverged_at} and was ended; a lower lr may help")
    if course.best[0] == 0:
        said.append("training made nothing better: the weights are those from before")
    return said
