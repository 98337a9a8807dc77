"""tokens.merge: merge tokens that are alike inside the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import PromiseBroken, Unmet
from ._reduce import LADDER

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView, Unit


@dataclass(frozen=True)
class Merge(Pass):
    """Merge tokens that are alike inside the vision tower (ToMe): its later blocks work on fewer of them.

    In chosen blocks, between attention and MLP, the patches are split alternately into two sets; each one of the first
    finds the one of the second whose key is most alike (cosine, mean over heads), and the most similar pairs become
    one token, the average weighed by how many patches each stands for. CLS and the like are never merged. No weight
    changes.

    The connector is given as many features as before, each patch in its place and with what its token has, since grids,
    pixel shuffles and tiles need them; a pass like `tokens.grid` or `tokens.dpp` after this one cuts what the language
    model sees. What gets cheaper here is the tower.

    Settings:
        keep: share of the patches that is left at the end of the tower, in (0, 1]; rounded.
        schedule: how many are merged in which of the chosen blocks. ``early``: as many in each of the first half (of
            more, where each would have to merge more than half of what is there), none in the others; the cheapest.
            ``decreasing``: fewer from block to block, in a line. ``constant``: as many in each.
        where: selector; blocks of the vision tower that may merge (``vision.blocks[4:]``).
        proportional: a merged token weighs in attention as the patches that it stands for: the logarithm of their
            number is added to the logits.
    """

    name: ClassVar[str] = "tokens.merge"
    summary: ClassVar[str] = "a cheaper vision tower: tokens that are alike are merged inside it (ToMe)"
    paper: ClassVar[str] = "ToMe, arXiv 2210.09461"

    keep: float = 0.5
    schedule: Literal["early", "constant", "decreasing"] = "early"
    where: tuple[str, ...] | str = ("vision",)
    proportional: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a fraction in (0, 1], not {self.keep}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ...compress.runtime.merge import installed
        from ._tower import obstacle, tokens_and_patches

        if installed(model.model):
            raise self._unmet(model, "its tokens are merged already")
        for unit in model.units:
            if unit.part == "vision" and unit.index is not None and (reason := obstacle(unit, self.proportional)):
                raise self._unmet(model, reason)
        units = self._blocks(model)
        left = self._left(units)
        if any(after < before / 2 - 1e-9 for before, after in pairwise([1.0, *left.values()])):
            raise Unmet(
                f"{self.name}: a block merges half of its tokens at most",
                where=f"where: {self.where}",
                found=f"{len(units)} blocks are to leave {self.keep:.1%}",
                change="a larger keep, schedule: decreasing, or select more blocks",
            )
        tokens_and_patches(model, units[0].module, self._example(ctx))

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ...compress.runtime.merge import counts
        from ._tower import tokens_and_patches

        units = self._blocks(model)
        tokens, patches = tokens_and_patches(model, units[0].module, self._example(ctx))
        left = self._left(units)
        after = counts(patches, list(left.values()))
        record: dict[str, Json] = {
            "left": left,
            "prefix": tokens - patches,
            "patches": patches,
            "patches_left": after[-1],
        }
        self.rebuild(model, record)
        by_block = {unit.name: count for unit, count in zip(units, after)}
        return Notes({"patches": patches, "patches_left": after[-1], "by_block": by_block}, record)

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        from ...compress.runtime.merge import install
        from ._tower import inside

        numbers = {path: int(path.rpartition(".")[2]) for path in record["left"]}
        parent = next(iter(numbers)).rpartition(".")[0]
        stack: Any = model.model.get_submodule(parent)
        units = {unit.path: unit for unit in model.units}
        first = min(numbers.values())
        install(
            stack,
            {number: inside(units[f"{parent}.{number}"]) for number in range(first, len(stack))},
            {number: record["left"][path] for path, number in numbers.items()},
            prefix=record["prefix"],
            proportional=self.proportional,
        )

    def ensures(self, model: ModelView) -> None:
        from ...compress.runtime.merge import counts, merging_of

        record = model.ledger.record_of(self)
        there: list[float] = []
        for path, share in record["left"].items():
            merging = merging_of(model.model.get_submodule(path))
            if merging is None or merging.left != share:
                found = "it merges none" if merging is None else f"{merging.left} instead of {share} are left"
                raise PromiseBroken(f"{self.name} promised that this block merges tokens", where=path, found=found)
            there.append(share)
        found_left = counts(record["patches"], there)[-1] if there else record["patches"]
        if found_left > record["patches_left"]:
            raise PromiseBroken(
                f"{self.name} promised that {record['patches_left']} of {record['patches']} patches are left",
                found=f"{found_left}: a block that merges was taken out",
            )

    def weaker(self) -> Self | None:
        higher = [keep for keep in LADDER if keep > self.keep]
        return replace(self, keep=higher[0]) if higher else None

    def brief(self) -> Self:
        """What the two blocks of a shrunken copy can do."""
        return replace(self, keep=max(self.keep, 0.5))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _blocks(self, model: ModelView) -> list[Unit]:
        """The blocks that may merge, in order."""
        units = list(model.select(self.where))
        strange = [unit.name for unit in units if unit.part != "vision" or unit.index is None]
        parents = {unit.path.rpartition(".")[0] for unit in units}
        if strange or len(parents) > 1:
            raise Unmet(
                f"{self.name} merges in blocks of one stack of the vision tower",
                where=f"where: {self.where}",
                found=", ".join(strange or sorted(parents)),
                change="where: vision, or vision.blocks[2:]",
            )
        return units

    def _left(self, units: list[Unit]) -> dict[str, float]:
        """By path of a block, the share of patches left after it; those that merge none are left out."""
        from ...compress.runtime.tome import shares

        wanted = shares(len(units), self.keep, self.schedule)
        before = [1.0, *wanted]
        found = {unit.path: share for unit, share, last in zip(units, wanted, before) if share < last}
        return found or {units[-1].path: self.keep}

    def _example(self, ctx: Context) -> Mapping[str, Any]:
        found = next((batch for batch in ctx.fit if batch.get("pixel_values") is not None), None)
        if found is None:
            raise Unmet(f"{self.name} looks at how the tower cuts a picture", found="no fit sample with a picture")
        return found

    def _unmet(self, model: ModelView, reason: str) -> Unmet:
        return Unmet(
            f"{self.name} cannot merge tokens in the vision tower of this model",
            where=f"family {model.family.name}",
            found=reason,
            change="leave the pass out for this model",
        )
