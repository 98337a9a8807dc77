"""prune.layers: fewer transformer blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass, evaluating
from ...compress.errors import PromiseBroken, Unmet, WorkFailed

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView
    from ._depth import Positions, Removal

FILE = "removed.json"  # in the pass's scratch: the rounds that are done


@dataclass(frozen=True)
class Layers(Pass):
    """Take out the blocks that the answers miss least; config, layer numbers and caches follow.

    ``kl`` tries every block: the model runs without it, and the KL divergence of its answer tokens from the original's
    is measured on the fit split. The one that costs least goes, and all others are tried again. A cosine between a
    block's input and output, which is all that ``influence`` looks at, does not see what later blocks make of the
    difference. Neither sees what training can bring back: deeper blocks heal better, and ``where`` can be kept to them
    (`language.blocks[2:]`; after Gromov et al., arXiv 2403.17887).

    A block stays where no stock config says the model without it (the notes list such blocks and why), and the last
    one of a stack always stays. Train back what was lost with `distill.logits` or `distill.features`.

    Settings:
        count: blocks to remove, over all stacks that `where` selects.
        where: selector; blocks of which it selects a linear may go.
        criterion: ``kl``: greedy, by the KL of answer tokens, scored anew after every removal. ``influence``: one minus
            the mean cosine of a block's input and output (ShortGPT), once for all. ``random``: the control.
        samples: questions of the fit split that ``kl`` asks; the more, the surer and the slower.
        token_weights: of visual tokens beside text in ``influence``: ``balanced``, ``text`` or ``uniform``.
        seed: of ``random``.
    """

    name: ClassVar[str] = "prune.layers"
    summary: ClassVar[str] = "shallower: fewer blocks, chosen by what the answers lose without them"
    paper: ClassVar[str] = "ShortGPT, arXiv 2403.03853 (influence); greedy KL as in ShortV, arXiv 2504.00502"

    removes_blocks: ClassVar[bool] = True

    count: int = 1
    where: tuple[str, ...] | str = ("language",)
    criterion: Literal["kl", "influence", "random"] = "kl"
    samples: int = 128
    token_weights: Literal["balanced", "text", "uniform"] = "balanced"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is at least 1, not {self.count}")
        if self.samples < 1:
            raise ValueError(f"samples is at least 1, not {self.samples}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ._shapes import refuse_added

        refuse_added(self, model)
        candidates, pinned = self._candidates(model, {})
        if len(candidates) < self.count:
            raise Unmet(
                f"{self.name} cannot remove {self.count} blocks",
                where=f"where: {self.where}",
                found=f"{len(candidates)} that may go" + "".join(f"; {name}: {why}" for name, why in pinned.items()),
                change="a smaller count, or select more blocks",
            )
        if self.criterion != "random" and not len(ctx.fit):
            raise Unmet(f"criterion '{self.criterion}' needs fit samples", change="give data, or take 'random'")

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ._depth import place, take_out, without

        candidates, pinned = self._candidates(model, {})
        if self.criterion == "kl":
            rounds = self._greedy(model, ctx, candidates)
            chosen = [row["removed"] for row in rounds]
            numbers: dict[str, Json] = {"kl": [row["scores"] for row in rounds]}
        else:
            chosen, numbers = self._ranked(model, ctx, list(candidates))
        by_name = {unit.name: unit for unit in model.units}
        positions: dict[str, list[int]] = {}
        for path, i in sorted(place(by_name[name]) for name in chosen):
            positions.setdefault(path, []).append(i)
        removal = without(model.model, positions)
        kept = self._kept(model, set(chosen))
        before = sum(p.numel() for p in model.model.parameters())
        take_out(model.model, removal)
        self._rename(model, removal)
        model.refresh()
        lengths = {path: len(model.model.get_submodule(path)) for path in positions}
        numbers |= {
            "removed": chosen,
            "blocks": {path: [len(removed) + lengths[path], lengths[path]] for path, removed in positions.items()},
            "stay": pinned,
            "config": removal.edits,
            "parameters_before": before,
            "parameters": sum(p.numel() for p in model.model.parameters()),
        }
        return Notes(numbers, {"removed": positions, "lengths": lengths, "config": removal.edits, "kept": kept})

    def ensures(self, model: ModelView) -> None:
        for path, length in model.ledger.record_of(self)["lengths"].items():
            found = len(model.model.get_submodule(path))
            if found > length:
                raise PromiseBroken(
                    f"{self.name} promised fewer blocks", where=path, found=f"{found}, at most {length}"
                )

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        """Nothing where the model was built from the shorter config."""
        from ._depth import take_out, without

        positions = {
            path: removed
            for path, removed in record["removed"].items()
            if len(model.model.get_submodule(path)) > record["lengths"][path]
        }
        if positions:
            take_out(model.model, without(model.model, positions))
            model.refresh()

    def weaker(self) -> Self | None:
        """One block fewer, down to one."""
        return replace(self, count=self.count - 1) if self.count > 1 else None

    def brief(self) -> Self:
        """Some blocks, whichever: scoring them all would take the time of the pass itself."""
        return replace(self, criterion="random")

    # -- inside --------------------------------------------------------------------------------------------------------

    def _candidates(
        self, model: ModelView, gone: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, Removal], dict[str, str]]:
        """Each block that may go next, with its removal and that of those `gone`; the blocks that stay, and why."""
        from ...compress.runtime.rules import pinned as bound_blocks
        from ._depth import lists, place, without

        found: dict[str, Removal] = {}
        pinned: dict[str, str] = {}
        units = [unit for unit in model.select(self.where) if unit.index is not None]
        stacks, bound = lists(model, units), bound_blocks(model.model)
        listed = {unit.name for held in stacks.values() for unit in held}
        pinned |= {unit.name: "its stack is no plain list of equal blocks" for unit in units if unit.name not in listed}
        for path, held in stacks.items():
            left = len(model.model.get_submodule(path)) - len(gone.get(path, ()))
            for unit in held:
                _, i = place(unit)
                if i in gone.get(path, ()):
                    continue
                if left == 1 or unit.path in bound:
                    pinned[unit.name] = bound.get(unit.path, "it is the last one")
                    continue
                try:
                    found[unit.name] = without(model.model, {**gone, path: sorted([*gone.get(path, ()), i])})
                except Unmet as error:
                    pinned[unit.name] = error.what
        return found, pinned

    def _greedy(self, model: ModelView, ctx: Context, candidates: dict[str, Removal]) -> list[dict[str, Any]]:
        """One round a removal: {removed: name, scores: {name: KL}}, names as they are before the first."""
        from ...compress.disk import read_json, write_json
        from ._depth import place

        kept = ctx.scratch / FILE if ctx.scratch else None
        rounds: list[dict[str, Any]] = read_json(kept) if kept and kept.is_file() else []
        by_name = {unit.name: unit for unit in model.units}
        while len(rounds) < self.count:
            gone: dict[str, list[int]] = {}
            for path, i in sorted(place(by_name[row["removed"]]) for row in rounds):
                gone.setdefault(path, []).append(i)
            if gone:
                candidates, _ = self._candidates(model, gone)
            if not candidates:
                raise WorkFailed(f"{self.name} finds no further block that may go", found=f"{len(rounds)} removed")
            scores = self._scores(model, ctx, gone, candidates, f"block {len(rounds) + 1} of {self.count}")
            rounds.append({"removed": min(scores, key=lambda name: scores[name]), "scores": scores})
            if kept:
                write_json(kept, rounds)
        return rounds

    def _scores(
        self, model: ModelView, ctx: Context, gone: Positions, candidates: Mapping[str, Removal], title: str
    ) -> dict[str, float]:
        """Mean KL of an answer token from the original's, with each removal."""
        import torch

        from ...calib.balance import answer_logits
        from ...calib.metrics.divergence import kl, log_probabilities
        from ...calib.replay import patched, recording, replaying, samples
        from ...calib.shown import as_original
        from ._depth import lacking, without

        def answers(view: ModelView, batch: Any) -> torch.Tensor:
            logits, labels = answer_logits(view, batch)
            return log_probabilities(logits[labels != -100])

        tower = model.tower
        replayed = not any(unit.part == "vision" for unit in model.units if unit.name in candidates)
        total, tokens, asked = dict.fromkeys(candidates, 0.0), 0, 0
        base = without(model.model, gone)
        batches = []
        for batch in ctx.fit:
            if asked < self.samples:
                batches.append(batch)
                asked += samples(batch)
        ctx.progress.start(title, len(batches) * len(candidates))
        with ctx.teacher() as original, evaluating(model.model):
            answers(model, batches[0])  # transformers hooks the blocks that are there when a model first runs
            for batch in batches:
                wanted = answers(original, as_original(batch))
                tokens += len(wanted)
                seen: list[Any] = []
                if replayed:
                    with lacking(model.model, base), patched({tower: recording(tower, seen, True)}):
                        answers(model, batch)
                for name, removal in candidates.items():
                    again = {tower: replaying(model.tower_path, seen, True)} if replayed else {}
                    with lacking(model.model, removal), patched(again):
                        total[name] += float(kl(wanted, answers(model, batch)).double().sum())
                    ctx.progress.step(note=name)
        ctx.progress.done()
        if not tokens:
            raise WorkFailed("the fit split has no answer token", change="give answers, or criterion: influence")
        return {name: value / tokens for name, value in total.items()}

    def _ranked(self, model: ModelView, ctx: Context, candidates: list[str]) -> tuple[list[str], dict[str, Json]]:
        """The blocks to remove by one ranking, and for the notes the scores."""
        import torch

        if self.criterion == "random":
            order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(ctx.seed + self.seed))
            scores = {name: float(rank) for name, rank in zip(candidates, order)}
        else:
            from ._importance import influence

            walk = ctx.walk(self.where, name="influence")
            for block in walk:
                pairs = zip(block.inputs(), block.outputs(), block.rows(self.token_weights), strict=True)
                states = ((_taken(call), _returned(out), weights) for call, out, (_, weights) in pairs)
                block.notes["influence"] = influence(states)
            scores = {name: walk.notes[name]["influence"] for name in candidates}
        chosen: list[str] = []
        by_name = {unit.name: unit for unit in model.units}
        for name in sorted(scores, key=lambda name: scores[name]):
            if len(chosen) == self.count:
                break
            stack = by_name[name].stack
            assert stack is not None
            if sum(by_name[other].stack is stack for other in chosen) + 1 < stack.length:
                chosen.append(name)
        return chosen, {"influence": scores} if self.criterion == "influence" else {}

    def _kept(self, model: ModelView, removed: set[str]) -> dict[str, list[int]]:
        """Part -> for each block that stays its number in the model before any pass of this kind."""
        before: dict[str, list[int]] = {}
        for entry in model.ledger:
            if entry.name == self.name:
                before = before | entry.record["kept"]
        found: dict[str, list[int]] = {}
        for part, units in model.parts.items():
            blocks = [unit for unit in units if unit.index is not None]
            if blocks:
                first = before.get(part, list(range(len(blocks))))
                found[part] = [
                    first[unit.index] for unit in blocks if unit.name not in removed and unit.index is not None
                ]
        return found

    def _rename(self, model: ModelView, removal: Removal) -> None:
        """What is known by path of the blocks that stay goes on being known, by their new paths."""
        from ._depth import renumbering

        for path, removed in removal.positions.items():
            rename = renumbering(path, removed)
            model.grids = {new: grid for old, grid in model.grids.items() if (new := rename(old)) is not None}
            model.ledger.rename(rename)


def _taken(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The hidden states that a block is given."""
    args, named = call
    return args[0] if args else named["hidden_states"]


def _returned(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out
