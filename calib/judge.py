"""The judge: how a model answers the check split, compared pair by pair with the original.

The original is asked once; its answers and its log-probabilities on the answer tokens are cached by a fingerprint of
model, data and versions. What is measured of every other model: KL(original || model) and top-1 agreement on the
tokens of the reference answers (teacher-forced), their perplexity with and without the picture, and exact match of
greedy answers with flips, its interval over pictures and the exact tests; `calib.findings` has the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ..compress import __version__
from ..compress.anatomy import ModelView
from ..compress.base import Json, Progress, Silent, evaluating
from ..compress.disk import write_whole
from ..compress.evidence import interval
from ..compress.storage import fingerprint
from .asking import Layout, Said, answers, by_picture, layout, of_target, scored
from .blank import LEAST, MOST, SHARE, Blank
from .encode import Encoder, Kept
from .findings import by_answer, findings
from .foretold import Foretold
from .metrics.answers import exact_match
from .metrics.bias import bias
from .metrics.divergence import perplexity, shorten
from .metrics.paired import by_group, by_tag, evidence, mean_evidence, sign_flip
from .metrics.pairs import detectable, mcnemar
from .metrics.scores import EXACT
from .reference import Reference
from .sample import Sample

FULL_BYTES = 1 << 30  # the original's log-probabilities are kept whole up to this size
TOP = 1024  # beyond it, this many of the most probable tokens and one lump of the rest
SPARE_TOKENS, MOST_TOKENS = 4, 64  # greedy answers may be longer than the longest accepted answer; never longer


@dataclass(frozen=True)
class Measurement:
    """`quality` as in report.json; `items`: the answer to every check question."""

    quality: dict[str, Json]
    items: list[dict[str, Json]]


class Judge:
    """Measures models on `samples` against `original`.

    Args:
        encoder: makes the original's batches. cache_dir: keeps what the original says across runs; None: in memory.
        batch_size: questions in a batch.
        first: the judge of the same original while it still has all tokens, where this one speaks fewer: its answers
            are the original's answers. Where it has as many, all that it knows of the original serves.
        shown: makes the batches of the models that are measured, where these are shown something else.
        score: the data's own score (`calib.metrics.scores`).

    Attributes:
        answers_from_original: check samples that had no answer, so that the original's own serves.
        generated: answers of the last model that were generated; the others its forward had told (`calib.foretold`).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        encoder: Encoder,
        original: ModelView,
        cache_dir: Path | None = None,
        batch_size: int = 32,
        first: Judge | None = None,
        shown: Encoder | None = None,
        score: str = EXACT,
    ) -> None:
        self.encoder, self.original, self.batch_size, self.first = encoder, original, batch_size, first
        self.score = score
        self._shown = shown or encoder
        self._kept = Kept(self._shown.encode)
        self._given, self._cache_dir = tuple(samples), cache_dir
        self.answers_from_original = sum(not s.answers for s in samples)
        self._reference: Reference | None = None
        self.generated = 0

    # -- samples -------------------------------------------------------------------------------------------------------

    def answered(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, those without an answer with the original's own greedy one (asked once, cached)."""
        if self.first is not None:
            return self.first.answered(samples)
        lacking = [s for s in samples if not s.answers and _content(s) not in self._own]
        if lacking:
            with evaluating(self.original.model):
                texts = answers(self.original, self.encoder, lacking, MOST_TOKENS, self.batch_size).texts
            self._own.update(zip(map(_content, lacking), texts))
            if self._own_file is not None:
                write_whole(self._own_file, json.dumps(self._own))
        return [s if s.answers else dataclasses.replace(s, answers=(self._own[_content(s)],)) for s in samples]

    @cached_property
    def samples(self) -> list[Sample]:
        """The check split with answers."""
        return self.answered(self._given)

    @cached_property
    def blank(self) -> Blank:
        """Some of the check split about blank pictures."""
        return Blank(self.samples, self.batch_size)

    @cached_property
    def _own(self) -> dict[str, str]:
        """The original's answers by the content of the sample."""
        if self._own_file is None or not self._own_file.is_file():
            return {}
        try:
            found = json.loads(self._own_file.read_text(encoding="utf-8"))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def _own_file(self) -> Path | None:
        return None if self._cache_dir is None else self._cache_dir / f"answers-{self._model_print[:32]}.json"

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, view: ModelView, progress: Progress | None = None, *, answering: bool = True) -> Measurement:
        """Quality of `view` against the original. The same model measured twice gives the same figures.

        Args:
            answering: whether it is asked for answers; if not, the original's stand in for them, which takes less time.

        Raises:
            WorkFailed: logits that are not finite; the first sample that has such is named.
        """
        told = progress or Silent()
        reference = self.reference(told)
        distances: list[Any] = [None] * len(self.samples)

        def compare(i: int, log_q: torch.Tensor, chosen: torch.Tensor) -> None:
            distances[i] = (*reference.against(i, log_q), chosen)

        known, laid = None if answering else reference.said, self._layout(view, self._shown)
        after = self._ask(view, self._shown, laid, told, "measuring", compare, known)
        *columns, seeing = zip(*distances)
        distance, same, chosen = (torch.cat(rows) for rows in (*columns, seeing))
        made = self._compare(reference.said, after, distance, same, chosen)
        if answering:
            blind = self.blank.ask(view, self._shown.encode, laid, told)
            made.quality["blank"] = self.blank.compare(blind, seeing, reference.blind, reference.by_sample)
            made.quality["generated"] = self.generated
        for item, (apart, *_) in zip(made.items, distances):
            item |= {"kl": float(apart.double().mean()), "tokens": len(apart)}
        return made

    def baseline(self, progress: Progress | None = None) -> Measurement:
        """What measuring the original itself gives: all of it is known once it was asked."""
        reference = self.reference(progress)
        nothing = torch.zeros(len(reference.chosen))
        made = self._compare(reference.said, reference.said, nothing, nothing == 0, reference.chosen)
        blind, seeing = reference.blind, reference.by_sample
        made.quality.update(blank=self.blank.compare(blind, seeing, blind, seeing), generated=0)
        for item, count in zip(made.items, reference.counts.tolist()):
            item |= {"kl": 0.0, "tokens": count}
        return made

    def _compare(
        self, before: Said, after: Said, distance: torch.Tensor, same: torch.Tensor, chosen: torch.Tensor
    ) -> Measurement:
        samples = self.samples
        was, now = ([exact_match(a, s.answers) for a, s in zip(x.texts, samples)] for x in (before, after))
        images = [s.image_id for s in samples]
        worse, better = (sum(x and not y for x, y in zip(*pair)) for pair in ((was, now), (now, was)))
        n = len(samples)
        proof, tokens = evidence(was, now, images), np.repeat(images, self.reference().counts.numpy())
        match: dict[str, Json] = {
            "value": sum(now) / n,
            "reference": sum(was) / n,
            "delta": (sum(now) - sum(was)) / n,
            "ci95": list(interval(proof)),
            "mcnemar_p": mcnemar(worse, better),
            "p_images": sign_flip(was, now, images),
            "right_to_wrong": worse,
            "wrong_to_right": better,
        }
        quality: dict[str, Json] = {
            "kl": float(distance.double().mean()),
            "kl_p99": float(distance.double().quantile(0.99)),
            "agreement": float(same.double().mean()),
            "perplexity": perplexity(chosen),
            "exact_match": match,
            "flips": (worse + better) / n,
            "detectable": detectable(worse + better, n, proof["design_effect"]),
            "n": n,
            "n_images": len(set(images)),
            "by_tag": by_tag([s.tags for s in samples], was, now, images),
            "by_answer": by_group({"": by_answer(samples)}, was, now, images)[""],
            "bias": bias(samples, before.texts, after.texts),
            "evidence": {
                "exact_match": proof,
                "agreement": evidence(np.ones(len(same)), same.numpy(), tokens, n),
                "kl": mean_evidence(distance.double().numpy(), tokens, n),
            },
        }
        more, facts = findings(samples, self.score, before, after, was, now)
        items: list[dict[str, Json]] = [
            {
                "id": s.id,
                "image_id": s.image_id,
                "answer": after.texts[i],
                "correct": now[i],
                "reference_answer": before.texts[i],
                "reference_correct": was[i],
                **facts[i],
            }
            for i, s in enumerate(samples)
        ]
        if "score" in more:
            quality["evidence"][self.score] = more["score"].pop("evidence")
        return Measurement(quality | more, items)

    # -- asking a model ------------------------------------------------------------------------------------------------

    def _ask(
        self,
        view: ModelView,
        encoder: Encoder,
        laid: Layout,
        progress: Progress,
        what: str,
        tell: Callable[[int, torch.Tensor, torch.Tensor], None],
        said: Said | None = None,
    ) -> Said:
        """Greedy answers to the check split.

        Calls `tell(sample, log-probabilities, those of the reference)`. Where it is known what the model `said`, it is
        not asked for that. Nor is it where the first forward told what it will say, but for one batch, which shows that
        `generate` agrees; if it does not, every answer is generated.
        """
        foretold = Foretold(view, self._new_tokens, encoder.decode)
        encode = self._kept if encoder is self._shown else encoder.encode
        order = self._order
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        progress.start(what, len(batches))
        with evaluating(view.model):
            for part in batches:
                rows = scored(view, encode, [self.samples[i] for i in part], laid)
                for i, (log_p, target) in zip(part, rows):
                    of_reference = of_target(log_p, target)
                    tell(i, log_p, of_reference)
                    foretold.hear(i, log_p, target, of_reference)
                progress.step()
            progress.done()
            if said is None:

                def generate(asked: list[int]) -> Said:
                    some = [self.samples[i] for i in asked]
                    return answers(view, encoder, some, self._new_tokens, self.batch_size, progress)

                said = foretold.all_answers(len(self.samples), self.batch_size, generate)
                self.generated = foretold.generated
        return said

    def _layout(self, view: ModelView, encoder: Encoder) -> Layout:
        with evaluating(view.model):
            return layout(view, encoder.encode, [self.samples[i] for i in self._order], self.batch_size)

    @cached_property
    def _order(self) -> list[int]:
        return by_picture(self.samples)

    @cached_property
    def _new_tokens(self) -> int:
        every = [answer for s in self.samples for answer in s.answers]
        longest = max(map(len, self.encoder.tokenizer(every, add_special_tokens=False)["input_ids"]))
        return min(longest + 1 + SPARE_TOKENS, MOST_TOKENS)

    def answers(self, view: ModelView, samples: Sequence[Sample]) -> list[str]:
        """Greedy answers of `view` to other questions, asked as those of the check split are."""
        with evaluating(view.model):
            encoder = self.encoder if view is self.original else self._shown
            return answers(view, encoder, samples, self._new_tokens, self.batch_size).texts

    # -- the original, once --------------------------------------------------------------------------------------------

    def reference(self, progress: Progress | None = None) -> Reference:
        """What the original says, from the cache where it is there."""
        if self.first is not None and self.first.original is self.original:
            return self.first.reference(progress)
        if self._reference is None:
            self._reference = self._read() or self._make(progress or Silent())
        return self._reference

    def _make(self, progress: Progress) -> Reference:
        count = len(self.samples)
        rows: list[Any] = [None] * count
        chosen: list[Any] = [None] * count
        stored, short = 0, False

        def keep(i: int, log_p: torch.Tensor, of_reference: torch.Tensor) -> None:
            nonlocal stored, short
            stored += log_p.numel() * log_p.element_size()
            rows[i], chosen[i] = (shorten(log_p, TOP) if short else (log_p,)), of_reference
            if stored > FULL_BYTES and not short:
                short = True
                rows[:] = [row and shorten(row[0], TOP) for row in rows]

        known = self.first.reference(progress).said if self.first is not None else None
        laid = self._layout(self.original, self.encoder)
        said = self._ask(self.original, self.encoder, laid, progress, "asking the original", keep, known)
        blind = self.blank.ask(self.original, self.encoder.encode, laid, progress)
        values, *more = (torch.cat(column) for column in zip(*rows))
        counts, sure = torch.tensor([len(c) for c in chosen]), torch.tensor(said.confidence, dtype=torch.float64)
        reference = Reference(said.texts, values, torch.cat(chosen), counts, sure, blind, *more)
        if self._cache_dir is not None:
            from safetensors.torch import save

            tensors = {k: v for k, v in vars(reference).items() if isinstance(v, torch.Tensor)}
            raw = save({k: v.contiguous() for k, v in tensors.items()})
            write_whole(self._cache_dir / f"{self.fingerprint}.safetensors", raw)
            write_whole(self._cache_dir / f"{self.fingerprint}.json", json.dumps(said.texts))
        return reference

    def _read(self) -> Reference | None:
        """The cached reference; None where there is none that can be read whole."""
        if self._cache_dir is None:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            answers = json.loads((self._cache_dir / f"{self.fingerprint}.json").read_text(encoding="utf-8"))
            made = Reference(answers, **load_file(self._cache_dir / f"{self.fingerprint}.safetensors"))
        except (OSError, ValueError, TypeError, SafetensorError):
            return None
        return made if made.fits(len(self.samples), self.blank.places) else None

    @cached_property
    def _model_print(self) -> str:
        """Of the original, what it is given for one question (template and processor), and the versions."""
        digest = hashlib.sha256(fingerprint(self.original).encode())
        for name, tensor in sorted(self.encoder.prompts(self._given[:1]).items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        digest.update(f"{__version__} {torch.__version__} {transformers.__version__}".encode())
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Of all that the reference depends on."""
        first = self.first.fingerprint if self.first is not None else ""
        sizes = ("by picture", self.batch_size, FULL_BYTES, TOP, MOST, LEAST, SHARE)
        digest = hashlib.sha256(f"{self._model_print} {sizes} {first}".encode())
        for s in self._given:
            digest.update(f"{_content(s)} {s.answers!r}\n".encode())
        return digest.hexdigest()[:32]


def _content(sample: Sample) -> str:
    """sha256 of id, pictures, question and what was said before."""
    asked = [[image.content for image in sample.images], sample.conversation, sample.id]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
