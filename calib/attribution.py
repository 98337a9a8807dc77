"""Which part of a small model lost what it lost: parts of the original are put back one at a time, and it is measured.

For each part (`compress/parts.py`) two models are made by swapping modules: the small one with this part of the
original (``restored``: what comes back), and the original with this part of the small one (``alone``: what this part
costs by itself). Both are asked the same questions, so a few dozen tell: the share of the KL divergence that a part
brings back is a ratio of two sums over the same questions, with a bootstrap interval over pictures. Inside a part that
brings back enough, single blocks are put back in the same way.

Where parts do not act on each other, what they bring back adds up to the whole, and so does what they cost alone. Where
it does not, that is said.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from ..compress.anatomy import ModelView, Unit
from ..compress.base import Json, Progress, Silent, evaluating
from ..compress.errors import SvlmError
from ..compress.parts import Group, Parts
from ..compress.report.attribution import share
from ..compress.report.words import points
from ..compress.runtime.reduce import installed
from .judge import Judge
from .metrics.paired import compared
from .metrics.shares import interval, resampled_shares
from .replay import replaying, rewrapped
from .workbench import Workbench

QUESTIONS = 128
GUILTY = 0.2  # blocks are looked at in parts that bring back this share of the KL
MOST = 0.5  # a cause is named if it brings back more than this share, and more than any other
ADDS_UP = 0.1  # shares that add up to within this of the whole are said to
FEATURE_BYTES = 1 << 30  # what the towers returned is kept up to this size
NAMES = {
    "pictures": "the size of the pictures",
    "vision": "the vision tower",
    "connector": "the connector",
    "tokens": "the choice of visual tokens",
    "language": "the language model",
    "embeddings": "the token embedding",
    "head": "the head",
    "cache": "the packed cache",
}

Items = list[dict[str, Json]]
Pair = tuple[Unit, Unit]


def attribute(
    bench: Workbench, small: ModelView, *, questions: int = QUESTIONS, progress: Progress | None = None
) -> dict[str, Json]:
    """Which part of `small` lost what it lost against `bench`'s original.

    Args:
        questions: of the check split that are asked, its first ones.

    Returns:
        ``questions``, ``images``; ``loss`` of the small model: ``kl`` (nats an answer token) and ``exact_match``, as
        the judge gives it. ``parts``: of each group of parts ``part``, ``parts``, ``together`` (why they are one),
        ``unchanged``, and either ``restored`` and ``alone`` (``kl``; ``share`` of the loss, that comes back or that it
        costs, with ``ci95``; ``exact_match``: value, and its change with ci95 and mcnemar_p), or ``why`` not.
        ``blocks``: by part, ``block``, ``kl``, ``share``, ``ci95`` or ``why``. ``sums``: of ``restored`` and ``alone``
        shares, with ci95. ``named``, ``named_block``: the cause, or None. ``says``: sentences.
    """
    told = progress or bench.progress
    if questions < len(bench.data.check):
        data = dataclasses.replace(bench.data, check=bench.data.check[:questions])
        bench = Workbench(bench.original, data, batch_size=bench.batch_size, latency=False, progress=bench.progress)
    judge = bench.speaking(small).judge
    whole = judge.measure(small, told)
    loss = whole.quality
    made: dict[str, Json] = {
        "questions": loss["n"],
        "images": loss["n_images"],
        "loss": {"kl": loss["kl"], "exact_match": loss["exact_match"]},
    }
    trial = _Trial(judge, small, whole.items)
    rows = trial.parts_of(told)
    blocks = {
        part: trial.blocks_of(part, tuple(row["parts"]), told)
        for row in rows
        if "restored" in row and row["restored"]["share"] >= GUILTY
        for part in row["parts"]
    }
    blocks = {part: found for part, found in blocks.items() if found}
    named, says = _verdict(rows, trial)
    inside, more = _inside(named, blocks, trial)
    sums = {kind: trial.sum_of([row[kind] for row in rows if kind in row]) for kind in ("restored", "alone")}
    made |= {"parts": rows, "blocks": blocks, "sums": sums, "named": named, "named_block": inside}
    made["says"] = [*says, *more, *_remarks(rows, sums, small, judge.original, loss)]
    sides = [row[kind] for row in rows for kind in ("restored", "alone") if kind in row]
    for facts in (*sides, *(row for found in blocks.values() for row in found)):
        facts.pop("sums", None)  # of each question: no more than intervals are made of
    return made


class _Trial:
    """The small model with other parts, measured on the same questions."""

    def __init__(self, judge: Judge, small: ModelView, items: Items) -> None:
        self.judge, self.small, self.items = judge, small, items
        self.before = [item | {"correct": item["reference_correct"]} for item in items]
        self.whole, self.images = _sums(items), [item["image_id"] for item in items]
        with evaluating(judge.original.model):
            judge.original.model(**judge.encoder.encode(judge.samples[:1]))  # transformers puts hooks on at first
        self.parts = Parts(small, judge.original)
        self.features = _Features(self.parts)
        as_before = Judge(judge.samples, judge.encoder, judge.original, batch_size=judge.batch_size, first=judge)
        self._judges = {False: judge, True: as_before}  # whether pictures are shown as the original is shown them

    def measure(self, parts: Collection[str], blocks: Sequence[Pair] = (), *, answering: bool = True) -> Items | str:
        """Answers of the small model with these parts and blocks of the original; or why it does not run."""
        try:
            with self.parts.restored(parts, blocks):
                self.features.listen(parts, blocks)
                judge = self._judges["pictures" in parts]
                return judge.measure(self.small, Silent(), answering=answering).items
        except (SvlmError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            first = str(error).strip().splitlines() or [""]
            return f"the model does not run so: {type(error).__name__}: {first[0]}"

    def parts_of(self, told: Progress) -> list[dict[str, Json]]:
        """A row for every group of parts."""
        groups = self.parts.groups
        changed = [group for group in groups if not self.parts.unchanged(group)]
        every = [part for group in groups for part in group.parts]
        told.start("attribution", 2 * len(changed))
        rows = [self._row(group, group not in changed, every, told) for group in groups]
        told.done()
        return rows

    def _row(self, group: Group, unchanged: bool, every: Sequence[str], told: Progress) -> dict[str, Json]:
        row: dict[str, Json] = {"part": group.name, "parts": list(group.parts), "unchanged": unchanged}
        row["together"] = list(group.why)
        if unchanged or not any(self.whole):
            return row
        restored = self.measure(group.parts)
        told.step(note=f"{group.name} restored")
        alone = self.measure([part for part in every if part not in group.parts])
        told.step(note=f"{group.name} alone")
        if isinstance(restored, str) or isinstance(alone, str):
            return row | {"why": restored if isinstance(restored, str) else alone}
        return row | {
            "restored": self._facts(restored, self.items, back=True),
            "alone": self._facts(alone, self.before, back=False),
        }

    def _facts(self, items: Items, than: Items, back: bool) -> dict[str, Json]:
        match = {"value": sum(item["correct"] for item in items) / len(items)} | compared(than, items)
        return self._share(items, back) | {"exact_match": match}

    def _share(self, items: Items, back: bool) -> dict[str, Json]:
        """`back`: the share that is not there any more, else the one that is."""
        sums = _sums(items)
        sums = [a - b for a, b in zip(self.whole, sums)] if back else sums
        kl = sum(_sums(items)) / sum(item["tokens"] for item in items)
        part = sum(sums) / sum(self.whole)
        return {"kl": kl, "share": part, "ci95": interval(self.draws([sums])[:, 0]), "sums": sums}

    def draws(self, parts: Sequence[Sequence[float]]) -> np.ndarray:
        return resampled_shares(self.whole, parts, self.images)

    def sum_of(self, facts: Sequence[Mapping[str, Json]]) -> dict[str, Json] | None:
        if len(facts) < 2:
            return None
        total = np.sum([fact["sums"] for fact in facts], axis=0)
        return {"share": float(total.sum() / sum(self.whole)), "ci95": interval(self.draws([total])[:, 0])}

    def leads(self, best: Mapping[str, Json], others: Sequence[Mapping[str, Json]]) -> bool:
        """Whether one brings back more than each of the others: 95 % intervals of the differences, paired."""
        apart = [[a - b for a, b in zip(best["sums"], other["sums"])] for other in others]
        return not apart or bool((np.quantile(self.draws(apart), 0.025, axis=0) > 0).all())

    def blocks_of(self, part: str, group: tuple[str, ...], told: Progress) -> list[dict[str, Json]]:
        """A row for every unit of a part that has several; one more for what is no block, and for blocks taken out."""
        try:
            pairs = self.parts.blocks(part)
            gone = self.parts.gone(part)
        except SvlmError as error:
            return [{"block": part, "why": f"{error.what}: {error.found}"}]
        if len(pairs) < 2 and not gone:
            return []
        told.start(f"attribution: blocks of {NAMES[part]}", len(pairs) + 1)
        rows = []
        for here, there in pairs:
            row: dict[str, Json] = {"block": here.name}
            if here.name != there.name:
                row["was"] = there.name
            if self.parts.same(here, there):
                row["unchanged"] = True
            elif not self.parts.fits(here, there):
                row["why"] = "what enters or leaves it has another width than in the original"
            else:
                row |= self._block((), [(here, there)])
            rows.append(row)
            told.step(note=here.name)
        rest = (f"{', '.join(gone)} (taken out) and " if gone else "") + "what is no block"
        rows.append({"block": rest} | self._block(group, pairs))
        told.done()
        return rows

    def _block(self, parts: Collection[str], pairs: Sequence[Pair]) -> dict[str, Json]:
        items = self.measure(parts, pairs, answering=False)
        return {"why": items} if isinstance(items, str) else self._share(items, back=True)


class _Features:
    """What the vision tower returned for pictures that it was shown before; nothing where parts of it may be mixed."""

    def __init__(self, parts: Parts) -> None:
        self.small, self.inside = parts.small, parts.inside("vision")
        self.kept: dict[tuple[Any, ...], Any] = {}
        self.bytes = 0

    def listen(self, parts: Collection[str], blocks: Sequence[Pair]) -> None:
        """Let the tower that is in the model now remember; whoever swapped it in puts its own forward back."""
        reduction = installed(self.small.model)
        if any(here.part in self.inside for here, _ in blocks) or (
            reduction is not None and reduction.watch is not None
        ):
            return
        tower = self.small.tower
        source = tuple(part in parts for part in (*self.inside, "pictures"))
        vars(tower)["forward"] = wraps(tower.forward)(self._remembering(tower.forward, source))

    def _remembering(self, forward: Callable[..., Any], source: tuple[bool, ...]) -> Callable[..., Any]:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            key = (*source, _digest((args, kwargs)))
            if key not in self.kept:
                out = forward(*args, **kwargs)
                size = sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
                if self.bytes + size > FEATURE_BYTES:
                    return out
                self.kept[key], self.bytes = rewrapped(out), self.bytes + size
            return replaying(self.small.tower_path, [self.kept[key]], True)()

        return remembered


def _digest(call: Any) -> str:
    digest = hashlib.sha256()
    for leaf in tree_leaves(call):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _sums(items: Items) -> list[float]:
    """The KL of each question, over its tokens, in nats."""
    return [item["kl"] * item["tokens"] for item in items]


# --------------------------------------------------------------------------------------------------- what is said of it


def _called(row: Mapping[str, Json]) -> str:
    *most, last = (NAMES[part] for part in row["parts"])
    return f"{', '.join(most)} and {last}" if most else last


def _verdict(rows: Sequence[dict[str, Json]], trial: _Trial) -> tuple[str | None, list[str]]:
    """The part that lost most, if there is one, and a sentence."""
    measured = sorted((row for row in rows if "restored" in row), key=lambda row: -row["restored"]["share"])
    if not any(trial.whole):
        return None, ["nothing was lost: on these questions the distributions are those of the original"]
    if not measured:
        return None, ["no part could be put back alone"]
    best, *others = measured
    match = best["restored"]["exact_match"]
    low, high = map(points, match["ci95"])
    back = f"restoring it brings back {share(best['restored'])} of the KL"
    back += f", and {points(match['delta'])} points [{low}, {high}] of exact match"
    if best["restored"]["share"] > MOST and trial.leads(best["restored"], [row["restored"] for row in others]):
        every = "all" if best["restored"]["kl"] == 0 else "most"
        return best["part"], [f"{every} of it was lost in {_called(best)}: {back}"]
    listed = "; ".join(f"{_called(row)} {share(row['restored'])}" for row in measured[:3])
    return None, [f"no single part: what restoring one alone brings back of the KL is {listed}"]


def _inside(
    named: str | None, blocks: Mapping[str, Sequence[dict[str, Json]]], trial: _Trial
) -> tuple[str | None, list[str]]:
    """The block that lost most of what the named part lost, if there is one, and a sentence."""
    rows = [row for part, found in blocks.items() if part in (named or "").split(" + ") for row in found]
    measured = sorted((row for row in rows if "share" in row), key=lambda row: -row["share"])
    if not measured:
        return None, []
    best, *others = measured
    if best["share"] > MOST and trial.leads(best, others):
        return best["block"], [f"inside it, in {best['block']}: that alone brings back {share(best)}"]
    listed = ", ".join(f"{row['block']} {share(row)}" for row in measured[:3])
    return None, [f"inside it no single block: the first are {listed}"]


def _remarks(
    rows: Sequence[dict[str, Json]],
    sums: Mapping[str, Json],
    small: ModelView,
    original: ModelView,
    loss: Mapping[str, Json],
) -> list[str]:
    """What else there is to know: parts that are one, parts that do not add up, what no part holds."""
    said = []
    off = [
        total
        for total in sums.values()
        if total and abs(total["share"] - 1) > ADDS_UP and not total["ci95"][0] <= 1 <= total["ci95"][1]
    ]
    if off and all(sums.values()):
        said.append(
            f"the parts do not add up: one by one they bring back {share(sums['restored'])} of the KL in all, and "
            f"each alone in the original they cost {share(sums['alone'])} of it: the rest is in how they act on "
            "each other"
        )
    said += [f"{_called(row)} are taken together: {'; '.join(row['together'])}" for row in rows if row["together"]]
    said += [f"{_called(row)} could not be put back: {row['why']}" for row in rows if "why" in row]
    if small.vocabulary is not None:
        count = original.table.module.num_embeddings
        said.append(f"the KL is over the {count} tokens that both models have; what others cost is in no part")
    if any(row["parts"] == ["cache"] for row in rows):
        said.append("the packed cache shows in answers alone: the KL is measured without a cache")
    if loss["n_images"] < 10:
        said.append(f"{loss['n_images']} pictures are few: the intervals are not to be relied on")
    return said
