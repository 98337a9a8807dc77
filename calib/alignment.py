"""Alignment: how much of the original's inner picture of the data a small model still has, block by block.

Both models are asked the same questions, with their answers, and what each block returns is compared with what the
block of the original returned that it once was (`compress/origins.py`): token by token (CKA), and question by question
(mutual nearest neighbours of mean states). Within each model, visual tokens are compared with text: nearest neighbours
and CKA of mean states, mean cosine, and the Modality Integration Rate. `metrics/alignment.py` has the formulas.

Tokens that only one of the models has are left out. Where the original is shown other pictures, its visual tokens are
others: then tokens of the text behind the picture are compared, and of visual ones only their mean by question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..compress.anatomy import ModelView, Unit
from ..compress.base import Json, Progress, Silent, evaluating
from ..compress.errors import Unmet
from ..compress.origins import origin
from ..compress.runtime.seen import Kept, seen
from .metrics import alignment as maths
from .sample import Sample
from .shown import as_original, differs
from .speech import Speech

QUESTIONS = 64
TOKENS = 4096  # of each kind that are compared; twice a state's width where that is more
KINDS = ("text", "visual")
INPUT = "language input"  # what enters the first block of the language model
Batch = Mapping[str, Any]


@dataclass
class States:
    """What one unit of a model returned.

    Attributes:
        rows: [tokens, width], a fixed share of all. keys: [tokens], which token each is, the same number in both
            models. common: [tokens], whether the other model may have it. visual: [tokens].
        means: by kind, mean state of each question [questions, width]; a question without such tokens has zeros.
        counts: by kind, tokens of each question [questions]; None where nobody can tell whose they are.
    """

    rows: Tensor
    keys: Tensor
    common: Tensor
    visual: Tensor
    means: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def of(self, kind: str) -> Tensor:
        """The rows of one kind."""
        return self.rows[self.visual == (kind == "visual")]


@dataclass(frozen=True)
class Marks:
    """Of the rows that a unit returns, flat: `kind` (0 text, 1 visual, -1 neither), `sample` (-1: nobody can tell),
    `key`, `common`; and how many rows of each kind there are before any token pass."""

    kind: Tensor
    sample: Tensor
    key: Tensor
    common: Tensor
    counts: tuple[int, int]


def questions(samples: Sequence[Sample], count: int = QUESTIONS) -> list[Sample]:
    """The first question about each picture, up to `count`: two questions about one picture are no two samples."""
    first: dict[str, Sample] = {}
    for sample in samples:
        if sample.images:
            first.setdefault(sample.image_id, sample)
    return list(first.values())[:count]


def alignment(
    view: ModelView, speech: Speech, samples: Sequence[Sample], progress: Progress | None = None
) -> dict[str, Json]:
    """Alignment of `view` with the original, and of visual tokens with text in both.

    Args:
        speech: of `view` (`Workbench.speaking`). samples: questions, one a picture (`questions`).

    Returns:
        questions; neighbours (k) and chance (mutual nearest neighbours of unrelated states); cka, mutual_knn: means
        over blocks and kinds of tokens; mir, reference_mir: the rate over all blocks of the language model that both
        have; cosine, reference_cosine: of what enters its first block; skipped: unit -> why; says: sentences; and
        blocks, one a unit: name, part, block (number), origin; cka, mutual_knn against the original, and each apart
        for _text and _visual; text_tokens, visual_tokens: how many were compared; and visual against text inside this
        model, and inside the original (reference_): mir, cosine, between_cka, between_knn.
        None stands for what does not exist there.
    """
    told, teacher = progress or Silent(), speech.teacher
    size = speech.batch_size
    batches = [speech.encode(samples[i : i + size]) for i in range(0, len(samples), size)]
    alike = not differs(batches)
    pairs, skipped = _pairs(view, teacher)
    widest = max((ref.module.out_features for _, unit in pairs for ref in unit.linears[-1:]), default=1)
    room = max(TOKENS, 2 * widest)
    neighbours = min(maths.NEIGHBOURS, max(len(samples) // 3, 1))  # of few questions all are near
    groups = list(_groups(pairs, 16 * room * widest))
    told.start("alignment", len(groups))
    blocks: list[dict[str, Json]] = []
    entering: dict[str, States] = {}
    for number, group in enumerate(groups):
        here = collect(view, batches, [a for a, _ in group], room, alike, entering=not number)
        there = collect(teacher, [as_original(b) for b in batches], [b for _, b in group], room, alike, not number)
        entering |= {key: one[INPUT] for key, one in (("", here), ("reference_", there)) if INPUT in one}
        for mine, theirs in group:
            names = {"name": mine.name, "part": mine.part, "block": mine.index, "origin": theirs.name}
            blocks.append(names | _compared(here[mine.name], there[theirs.name], neighbours))
        told.step()
    told.done()
    rated = [row for row in blocks if row["part"] == "language" and None not in (row["mir"], row["reference_mir"])]
    made: dict[str, Json] = {
        "questions": len(samples),
        "neighbours": neighbours,
        "chance": neighbours / (len(samples) - 1) if len(samples) > 1 else None,
        "cka": _mean([row["cka"] for row in blocks]),
        "mutual_knn": _mean([row["mutual_knn"] for row in blocks]),
    }
    for key in ("", "reference_"):
        made[key + "mir"] = maths.mir([row[key + "mir"] for row in rated]) if rated else None
        made[key + "cosine"] = _cosine(entering[key]) if key in entering else None
    made |= {"blocks": blocks, "skipped": skipped}
    return made | {"says": _says(made, len(rated), sum(unit.part == "language" for unit, _ in pairs), alike)}


def _says(made: Mapping[str, Any], rated: int, language: int, alike: bool) -> list[str]:
    said = []
    known = [row for row in made["blocks"] if row["cka"] is not None]
    if known:
        worst = min(known, key=lambda row: row["cka"])
        said.append(
            f"CKA with the original is {made['cka']:.3f} on average, lowest in {worst['name']} ({worst['cka']:.3f}); "
            "1 is the same states up to rotation and scale."
        )
    if rated:
        said.append(
            f"Modality Integration Rate over {rated} blocks: {made['mir']:.3f}, the original's over the same "
            f"{made['reference_mir']:.3f}; lower is better."
        )
    if rated < language:
        said.append(
            f"No Modality Integration Rate in {language - rated} of {language} blocks of the language model: it wants "
            "visual tokens and text in the sequence, and of each more than a state has channels."
        )
    if not alike:
        said.append("The original is shown other pictures: visual tokens are compared by their means alone.")
    return said + [f"{name} is left out: {why}." for name, why in made["skipped"].items()]


def _pairs(view: ModelView, teacher: ModelView) -> tuple[list[tuple[Unit, Unit]], dict[str, str]]:
    """Blocks and connectors with their origins; and what is left out, with why."""
    found, skipped = [], {}
    for unit in view.units:
        if unit.part == "head" or (unit.part == "language" and unit.index is None):
            continue
        try:
            found.append((unit, origin(view, teacher, unit, "alignment")))
        except Unmet as error:
            skipped[unit.name] = "a pass added it" if unit.added else error.what
    return found, skipped


def _groups(pairs: list[tuple[Unit, Unit]], bytes_each: int) -> Iterator[list[tuple[Unit, Unit]]]:
    """As many units at a time as a quarter of the free memory holds states of."""
    size = max(1, int(psutil.virtual_memory().available / 4 / bytes_each))
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


# ------------------------------------------------------------------------------------------------------- hidden states


def collect(
    view: ModelView,
    batches: Sequence[Batch],
    units: Sequence[Unit],
    room: int,
    alike: bool,
    entering: bool,
) -> dict[str, States]:
    """What `units` of `view` return for `batches`, by name; with `entering`, also what enters the language model.

    Args:
        room: rows of each kind that are kept, about. alike: whether the other model is shown the same.
    """
    gathered: dict[str, list[States]] = {}
    calls: dict[str, list[Tensor]] = {}
    first = next((u for u in view.parts.get("language", ()) if u.index is not None), None) if entering else None
    watched = [(unit.name, unit, unit.module.register_forward_hook) for unit in units]
    hooks = [register(_outputs(calls.setdefault(name, []))) for name, _, register in watched]
    places: list[tuple[str, Unit]] = [(name, unit) for name, unit, _ in watched]
    if first is not None:
        into = _inputs(calls.setdefault(INPUT, []))
        hooks.append(first.module.register_forward_pre_hook(into, with_kwargs=True))
        places.append((INPUT, first))
    begin = 0
    try:
        with evaluating(view.model):
            for batch in batches:
                for taken in calls.values():
                    taken.clear()
                view.model(**{k: v.to(view.model.device) for k, v in batch.items()})
                kept = seen(view.model)
                count = len(next(iter(batch.values()))) if "input_ids" not in batch else len(batch["input_ids"])
                for name, unit in places:
                    rows = _flat(calls[name], None if name == INPUT else unit)
                    marks = _marks(view, batch, unit, kept, len(rows), count, begin, alike, name == INPUT)
                    gathered.setdefault(name, []).append(_thinned(rows, marks, room / len(batches), begin, count))
                begin += count
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _joined(parts) for name, parts in gathered.items()}


def _outputs(into: list[Tensor]) -> Callable[..., None]:
    return lambda module, args, output: into.append(_first(output))


def _inputs(into: list[Tensor]) -> Callable[..., None]:
    return lambda module, args, named: into.append(args[0] if args else named["hidden_states"])


def _first(output: Any) -> Tensor:
    """The first floating tensor of what a unit returns: its hidden states."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _flat(calls: Sequence[Tensor], unit: Unit | None) -> Tensor:
    """[tokens, width], calls one after the other; of maps [batch, channels, height, width] tokens of channels."""
    width = unit.linears[-1].module.out_features if unit is not None and unit.linears else None
    moved = [t.movedim(1, -1) if t.ndim == 4 and t.shape[1] == width else t for t in calls]
    return torch.cat([t.reshape(-1, t.shape[-1]) for t in moved]).detach().float().cpu()


def _marks(
    view: ModelView, batch: Batch, unit: Unit, kept: Kept | None, rows: int, count: int, begin: int, alike: bool,
    entering: bool,
) -> Marks:  # fmt: skip
    """Which tokens the rows are that `unit` returned (or, `entering`, was given)."""
    if unit.tokens == "image":
        return _image_marks(view, batch, rows, count, begin, alike)
    masks = view.token_masks(batch, "sequence" if unit.tokens == "all" else unit.tokens)
    vision, text = masks.vision.cpu(), masks.text.cpu()
    kind = torch.where(vision, 1, torch.where(text, 0, -1))
    sample = torch.arange(count)[:, None].expand_as(kind)
    last = text.shape[1] - 1 - vision.flip(1).int().argmax(1, keepdim=True)
    behind = torch.arange(text.shape[1]) > torch.where(vision.any(1, keepdim=True), last, -1)
    # text is numbered from its end: whatever stands before it, question and answer are the same
    number = torch.where(vision, vision.cumsum(1), text.flip(1).cumsum(1).flip(1))
    key = _keys(begin + sample, kind, number)
    common = torch.full_like(vision, True) if alike else text & behind
    counts = (int(text.sum()), int(vision.sum()))
    inside = kept is not None and (unit.path + ".").startswith(view.decoder_path + ".")
    if kept is not None and inside:
        if kept.whole is not None:
            places, valid = (t.cpu() for t in kept.whole)
            kind, key, common = (t.gather(1, places) for t in (kind, key, common))
            kind, sample = torch.where(valid, kind, -1), sample[:, :1].expand_as(kind)
        worked = kept.blocks.get(unit.module)
        if worked is not None and not entering:  # tokens that pass this block by
            asked = kept.returned(unit.module, worked.asking[1]).cpu()
            kind = torch.where(asked, kind, -1) if asked.shape == kind.shape else kind
    kind, sample, key, common = (t.reshape(-1) for t in (kind, sample, key, common))
    return Marks(kind, sample, key, common, counts)


def _image_marks(view: ModelView, batch: Batch, rows: int, count: int, begin: int, alike: bool) -> Marks:
    """Of what sees pictures alone. Rows are in the order of questions; each has as many where its pictures have."""
    each = rows // count
    even = rows == each * count
    if even and view.image_token_id is not None and "input_ids" in batch:
        even = len(set(view.token_masks(batch, "prompt").vision.sum(1).tolist())) == 1
    number = torch.arange(rows)
    sample = number // each if even else torch.full((rows,), -1)
    kind = torch.ones(rows, dtype=torch.long)
    key = _keys(torch.full((rows,), begin), kind, number)
    return Marks(kind, sample, key, torch.full((rows,), alike), (0, rows))


def _keys(sample: Tensor, kind: Tensor, number: Tensor) -> Tensor:
    return ((sample * 2 + kind.clamp(min=0)) << 24) + number


def _thinned(rows: Tensor, marks: Marks, room: float, begin: int, count: int) -> States:
    """A share of the rows by their keys, the same in both models, and the means by question of all of them."""
    if len(rows) != len(marks.kind):
        raise Unmet(
            "alignment cannot tell which tokens a unit returns",
            found=f"{len(rows)} rows for {len(marks.kind)} tokens",
            change="correct 'tokens' (image, prompt, sequence) of this place in the anatomy row",
        )
    share = torch.tensor([min(1.0, room / max(1, n)) for n in marks.counts])
    spread = ((marks.key * 2654435761) & 0xFFFFFFFF).double() / 2**32  # evenly over [0, 1): Knuth's hash
    stay = (marks.kind >= 0) & (spread < share[marks.kind.clamp(min=0)])
    made = States(rows[stay], marks.key[stay], marks.common[stay], marks.kind[stay] == 1)
    for number, kind in enumerate(KINDS):
        mine = (marks.kind == number) & (marks.sample >= 0)
        made.counts[kind] = torch.bincount(marks.sample[mine], minlength=count)
        sums = torch.zeros(count, rows.shape[1]).index_add_(0, marks.sample[mine], rows[mine])
        made.means[kind] = sums / made.counts[kind].clamp(min=1)[:, None]
    return made


def _joined(parts: Sequence[States]) -> States:
    rows, keys, common, visual = (
        torch.cat([vars(part)[name] for part in parts]) for name in ("rows", "keys", "common", "visual")
    )
    means, counts = (
        {kind: torch.cat([vars(part)[name][kind] for part in parts]) for kind in KINDS} for name in ("means", "counts")
    )
    return States(rows, keys, common, visual, means, counts)


# ---------------------------------------------------------------------------------------------------------- comparisons


def _compared(mine: States, theirs: States, neighbours: int) -> dict[str, Json]:
    """What `alignment` tells of one block, without its names."""
    row: dict[str, Json] = {"cka": None, "mutual_knn": None}
    for kind in KINDS:
        pair = _matched(mine, theirs, kind)
        row[f"{kind}_tokens"] = len(pair[0])
        row[f"cka_{kind}"] = maths.cka(*pair) if len(pair[0]) >= 4 else None
        row[f"mutual_knn_{kind}"] = _knn(mine, theirs, kind, kind, neighbours)
    for key in ("cka", "mutual_knn"):
        row[key] = _mean([row[f"{key}_{kind}"] for kind in KINDS])
    for key, one in (("", mine), ("reference_", theirs)):
        row[key + "mir"] = _rate(one)
        row[key + "cosine"] = _cosine(one)
        row[key + "between_cka"] = _cka_of_means(one)
        row[key + "between_knn"] = _knn(one, one, "visual", "text", neighbours)
    return row


def _matched(mine: States, theirs: States, kind: str) -> tuple[Tensor, Tensor]:
    """The rows of one kind that belong to the same tokens, in the same order."""
    sides = []
    for one in (mine, theirs):
        chosen = one.common & (one.visual == (kind == "visual"))
        keys, order = one.keys[chosen].sort()
        sides.append((keys, one.rows[chosen][order]))
    (left, a), (right, b) = sides
    return a[torch.isin(left, right)], b[torch.isin(right, left)]


def _both(a: States, b: States, kind: str, other: str) -> tuple[Tensor, Tensor]:
    """Mean states of the questions that have tokens of `kind` in one and of `other` in the other."""
    there = (a.counts[kind] > 0) & (b.counts[other] > 0)
    return a.means[kind][there], b.means[other][there]


def _knn(a: States, b: States, kind: str, other: str, neighbours: int) -> float | None:
    pair = _both(a, b, kind, other)
    return maths.mutual_knn(*pair, neighbours) if len(pair[0]) >= neighbours + 2 else None


def _cka_of_means(one: States) -> float | None:
    pair = _both(one, one, "visual", "text")
    return maths.cka(*pair) if len(pair[0]) >= 4 else None


def _cosine(one: States) -> float | None:
    text, visual = (one.of(kind) for kind in KINDS)
    return maths.mean_cosine(visual, text) if len(text) and len(visual) else None


def _rate(one: States) -> float | None:
    text, visual = (one.of(kind) for kind in KINDS)
    return maths.mir_layer(visual, text) if min(len(text), len(visual)) > one.rows.shape[1] else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
