"""distill.logits: train the small model towards the original's answer distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from typing import TYPE_CHECKING, ClassVar, Literal

from ...compress.base import Batches, Context, Json, Notes, evaluating
from ...compress.errors import Unmet
from ._common import Distill, remarks

if TYPE_CHECKING:
    from torch import Tensor

    from ...compress.anatomy import LinearRef, ModelView
    from ._checkpoint import Checkpoint
    from ._feed import Feed
    from ._mapping import Mapped
    from ._observe import Batch, Seen

VALIDATION = 256  # samples of the fit split that recovery data are validated on


@dataclass(frozen=True)
class Logits(Distill):
    """Heal a changed model: it learns the original's token distribution at every answer token.

    Linear warm-up and a cosine, gradients clipped at 1. Dropout stays off, so a run with the same seed
    repeats itself bit for bit, killed and resumed or not. A tenth of the fit split is held out; the last
    weights that do as well on it as the best are kept (within one standard error), the untrained ones unless the loss
    fell, so that training never leaves the model worse there. A loss that
    is not finite, or three times that of the first steps, ends the training early. Weights are trained before
    quantizing, or they would leave their grid; scales and norms after it. Where the data has no answers, the original's
    own greedy answers are those that it learns.

    Settings:
        steps: optimizer steps.
        lr: peak learning rate. About 1e-4 for ``full``; the others, which train less, want ten times as much.
        batch_size: samples a step. Neighbouring questions about one picture are packed into one sequence, in which
            they do not see each other, where the model answers such a sequence as it answers them one by one (tried
            before the first step): eight of them then cost little more than one. Batches whose tensors cannot be split
            by sample (the patches of all images in one tensor) are taken as the fit split gives them.
        train: ``full``: all weights of the selected blocks, but zeros that an earlier pass promised. ``lora``: a
            low-rank update of each selected linear, merged at the end. ``scales``: of the selected linears that are
            quantized, the scales, as shares of themselves; the integers stay (EfficientQAT's second phase).
            ``connector``: all weights of the connector. ``norms``: of the selected blocks, norms, biases and layer
            scales.
        lora_rank: rank of that update.
        loss: with p the original's distribution and q the small model's, ``forward``: KL(p || q); ``reverse``: KL(q ||
            p); ``skewed``: KL(p || a p + (1 - a) q); ``skewed_reverse``: KL(q || (1 - a) p + a q). Forward heals;
            reverse and skewed ones may suit a model that is far too small to say all that the original says. What is
            kept is chosen by forward KL whatever the loss, as it is what the small model is judged by.
        skew: a in the skewed losses.
        vision: ``matched``: the logits at visual tokens are learnt as well, by reverse KL. Each visual token that is
            left is compared with one of the original's, the nearest by vocabulary logits (after EM-KD, for models that
            a token pass gave fewer of them). The head then runs on the whole sequence. ``none``: answers alone.
        vision_weight: of that loss.
        temperature: both distributions are softened by it.
        warmup: share of the steps in which the learning rate rises.
        where: selector of what trains; null: everything but embeddings and head. Blocks that are selected as a whole
            train their norms too.
        weight_decay: the optimizer's.
        optimizer: ``adamw``. ``muon``: Muon for matrices, which wants about a hundred times the lr, AdamW at a tenth of
            it for the others; for models that changed so much that they must learn anew what takes several blocks.
        average: decay of the running mean of the weights that is validated and kept (0.98: over some fifty steps),
            which takes the noise out of large steps; 0: the weights themselves.
        seed: of the order of batches and of LoRA's start.
        data: ``fit``: the fit split, again and again. ``recovery``: fresh samples without end, from a source that makes
            them (the demo's generator). ``auto``: recovery where the data has it, else fit. Anything else names other
            data as `--data` does (a .jsonl file, a folder, a hub id), with answers or without, without the pictures of
            the check split; a file that changes later goes unnoticed.
    """

    name: ClassVar[str] = "distill.logits"
    summary: ClassVar[str] = "heal: train towards the original's answer distributions"
    paper: ClassVar[str] = (
        "Minitron, arXiv 2407.14679; DistiLLM, arXiv 2402.03898; EM-KD, AAAI 2026; LoRA, arXiv 2106.09685; "
        "EfficientQAT, arXiv 2407.11062"
    )

    loss: Literal["forward", "reverse", "skewed", "skewed_reverse"] = "forward"
    skew: float = 0.1
    vision: Literal["none", "matched"] = "none"
    vision_weight: float = 0.25
    temperature: float = 1.0
    data: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature is above 0, not {self.temperature}")
        if self.vision_weight < 0:
            raise ValueError(f"vision_weight is not negative, not {self.vision_weight}")
        if not 0 < self.skew < 1:
            raise ValueError(f"skew is a share in (0, 1), not {self.skew}; without skew take loss: forward or reverse")

    def requires(self, model: ModelView, ctx: Context) -> None:
        super().requires(model, ctx)
        if self.data == "recovery" and ctx.recovery is None:
            raise Unmet(
                f"{self.name} finds no recovery data",
                where="data: recovery",
                found="the calibration data has only its fit samples",
                change="data: fit, or calibrate with a source that generates samples (demo)",
            )

        if self.vision == "matched" and (model.image_token_id is None or model.family.seq2seq):
            raise Unmet(
                f"{self.name} finds no logits at visual tokens",
                where=f"family {model.family.name}",
                found="a decoder that does not have them in its sequence",
                change="vision: none",
            )
        self._recovery(ctx)
        with ctx.teacher() as original:
            mine, wanted = (sorted(ref.module.out_features for ref in _head(view)) for view in (model, original))
        if mine != wanted:
            raise Unmet(
                f"{self.name} cannot compare distributions over different vocabularies",
                where="head",
                found=f"{mine} words here, {wanted} in the original",
                change="lend the original with the same words, as svlm.Workbench does",
            )

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        import torch

        from ._losses import divergence
        from ._observe import Teacher, answer_logits, observe
        from ._train import train
        from ._trained import training

        generator = torch.Generator().manual_seed(ctx.seed + self.seed)
        linears, more = self.selected(model), self.bare(model)
        with (
            ctx.teacher() as original,
            evaluating(model.model),
            training(model, self.train, linears, more, self.lora_rank, generator) as trained,
        ):
            feed, validation, again, used = self._data(model, original, ctx)
            watched = self.watched(model, original)
            visual = self.vision == "matched"
            teacher = Teacher(original, again, [unit.there for unit in watched], visual)

            def objective(batch: Batch) -> tuple[Tensor, int]:
                seen = observe(model, batch, [unit.here for unit in watched], visual)
                return self.lost(model, batch, watched, seen, teacher(batch)), len(seen.logits)

            def judge(batch: Batch) -> Tensor:
                return divergence(answer_logits(model, batch), teacher(batch).logits, "forward", self.temperature)

            course = train(
                trained.parameters,
                objective,
                judge,
                feed,
                validation,
                self.plan(),
                ctx.progress,
                self._checkpoint(ctx),
            )
            if course.best[0] > 0:
                trained.settle()
        numbers: dict[str, Json] = {
            "kl_first": course.checks[0],
            "kl_last": list(course.checks.values())[-1],
            "kl_best": course.best[1],
            "trained_parameters": sum(p.numel() for p in trained.parameters),
            "answer_tokens_seen": course.tokens,
        }
        if watched:
            numbers["units_compared"] = len(watched)
            numbers["units_renumbered"] = sum(unit.here.name != unit.there.name for unit in watched)
        return Notes(used | numbers | self.numbers(course) | {"remarks": remarks(course)}, {})

    def watched(self, model: ModelView, original: ModelView) -> list[Mapped]:
        """The units whose hidden states the loss compares."""
        return []

    def lost(self, model: ModelView, batch: Batch, watched: list[Mapped], seen: Seen, wanted: Seen) -> Tensor:
        """The training loss of a batch."""
        import torch

        from ._losses import divergence, nearest_pairs

        lost = divergence(seen.logits, wanted.logits, self.loss, self.temperature, self.skew)
        if self.vision == "none":
            return lost
        twins = [theirs[nearest_pairs(mine, theirs)] for mine, theirs in zip(seen.visual, wanted.visual)]
        mine = torch.cat(seen.visual)
        if not len(mine):  # a batch without images
            return lost
        return lost + self.vision_weight * divergence(mine, torch.cat(twins), "reverse", self.temperature)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _data(
        self, model: ModelView, original: ModelView, ctx: Context
    ) -> tuple[Feed[Batch], list[Batch], list[Batch], dict[str, Json]]:
        """Training batches, validation batches, those that come more than once; for the notes, what they are."""
        from ._feed import Feed, epochs, held_out, split
        from ._observe import has_answer

        fit = [part for batch in ctx.fit for part in split(batch, self.batch_size) if has_answer(model, part)]
        if not fit:
            raise Unmet(f"{self.name} finds no answer token in the fit split", where="labels")
        masks = [model.token_masks(batch) for batch in fit]
        real, answers = (sum(int(t.sum()) for t in found) for found in zip(*((~m.padding, m.answer) for m in masks)))
        notes: dict[str, Json] = {"share_of_answer_tokens": round(answers / max(1, real), 4)}
        recovery = self._recovery(ctx)
        first = [] if recovery is None else list(islice(recovery(self.batch_size, 0), 1))
        pack, notes["packed"] = self._packing(model, original, [*fit, *first])
        if recovery is None:
            again = [pack(batch) for batch in fit]
            learn, validation = held_out(again)
            seed = ctx.seed + self.seed
            return Feed(lambda start: epochs(learn, seed, start)), validation, again, {"data": "fit"} | notes
        before = accumulate((len(batch["labels"]) for batch in fit), initial=0)
        known = [pack(batch) for batch, samples in zip(fit, before) if samples < VALIDATION]
        feed = Feed(lambda start: map(pack, recovery(self.batch_size, start)), lambda batch: has_answer(model, batch))
        return feed, known, known, {"data": "recovery" if self.data == "auto" else self.data} | notes

    @staticmethod
    def _packing(
        model: ModelView, original: ModelView, batches: Sequence[Batch]
    ) -> tuple[Callable[[Batch], Batch], str]:
        """How a batch is laid out, and in words why so."""
        from ...calib.packing import alike, packed
        from ...calib.shown import as_original
        from ._observe import answer_logits

        example = next((batch for batch in batches if packed(model, batch) is not batch), None)
        if example is None:
            return (lambda batch: batch), "no: no neighbouring questions about one picture"
        tight = packed(model, example)
        asked = ((model, example, tight), (original, as_original(example), as_original(tight)))
        if not all(alike(partial(answer_logits, v, one), partial(answer_logits, v, other)) for v, one, other in asked):
            return (lambda batch: batch), "no: the model answers packed questions differently"
        return (lambda batch: packed(model, batch)), "yes"

    def _recovery(self, ctx: Context) -> Batches | None:
        """Training batches that are not of the fit split; None where the fit split is trained on."""
        if self.data in ("auto", "recovery"):
            return ctx.recovery
        if self.data == "fit":
            return None
        if ctx.source is None:
            raise Unmet(f"{self.name} cannot read other data here", where=f"data: {self.data}")
        return ctx.source(self.data)

    def _checkpoint(self, ctx: Context) -> Checkpoint | None:
        from ...calib.scratch import fingerprint
        from ._checkpoint import Checkpoint

        if ctx.scratch is None:
            return None
        return Checkpoint(ctx.scratch, [self.name, self.settings(), ctx.seed, fingerprint(ctx.fit)])


def _head(model: ModelView) -> list[LinearRef]:
    return [ref for unit in model.parts.get("head", ()) for ref in unit.linears]
