"""The judge: how a model answers the check split, compared pair by pair with the original.

The original is asked once; its answers and its log-probabilities on the answer tokens are cached by a fingerprint of
model, data and versions. What is measured of every other model: KL(original || model) and top-1 agreement on the
tokens of the reference answers (teacher-forced), their perplexity, and exact match of greedy answers with flips, a
bootstrap interval over pictures and the exact McNemar test.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..compress.anatomy import ModelView
from ..compress.base import Json, Progress, Silent, evaluating
from ..compress.errors import WorkFailed
from ..compress.storage import fingerprint, write_whole
from .dataset import Sample
from .encode import Encoder
from .metrics.answers import exact_match
from .metrics.divergence import kl, kl_shortened, log_probabilities, shorten
from .metrics.pairs import detectable, mcnemar, paired_bootstrap

FULL_BYTES = 1 << 30  # the original's log-probabilities are kept whole up to this size
TOP = 1024  # beyond it, this many of the most probable tokens and one lump of the rest
SPARE_TOKENS, MOST_TOKENS = 4, 64


@dataclass(frozen=True)
class Measurement:
    """`quality` as in report.json; `items`: the answer to every check question."""

    quality: dict[str, Json]
    items: list[dict[str, Json]]


@dataclass
class _Scored:
    """What a model says of the reference answers, one row a token. Full: [tokens, vocabulary]; else the top ones."""

    values: torch.Tensor
    indices: torch.Tensor | None
    rest: torch.Tensor | None
    best: torch.Tensor  # [tokens] top-1
    chosen: torch.Tensor  # [tokens] log-probability of the reference token


class Judge:
    """Measures models on `samples` against `original`.

    Attributes:
        answers_from_original: check samples that had no answer, so that the original's own serves.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        encoder: Encoder,
        original: ModelView,
        *,
        cache_dir: Path | None = None,
        batch_size: int = 32,
    ) -> None:
        self.encoder, self.original, self.batch_size = encoder, original, batch_size
        self._given, self._cache_dir = tuple(samples), cache_dir
        self.answers_from_original = sum(not s.answers for s in samples)
        self._samples: list[Sample] | None = None
        self._order: list[int] = []
        self._reference: tuple[_Scored, list[str]] | None = None
        self._own: dict[str, str] = {}

    # -- samples -------------------------------------------------------------------------------------------------------

    def answered(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, those without an answer with the original's own greedy one."""
        lacking = [s for s in samples if not s.answers and s.id not in self._own]
        for start in range(0, len(lacking), self.batch_size):
            part = lacking[start : start + self.batch_size]
            with evaluating(self.original.model):
                self._own |= zip((s.id for s in part), self._generate(self.original, part, MOST_TOKENS))
        return [s if s.answers else dataclasses.replace(s, answers=(self._own[s.id],)) for s in samples]

    @property
    def samples(self) -> list[Sample]:
        """The check split with answers."""
        if self._samples is None:
            self._samples = self.answered(self._given)
            lengths = [len(s.question or str(s.messages)) + len(s.answers[0]) for s in self._samples]
            self._order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
        return self._samples

    def _batches(self) -> list[list[int]]:
        _ = self.samples
        return [self._order[i : i + self.batch_size] for i in range(0, len(self._order), self.batch_size)]

    @property
    def _new_tokens(self) -> int:
        longest = max(self.encoder.answer_length(a) for s in self.samples for a in s.answers)
        return min(longest + SPARE_TOKENS, MOST_TOKENS)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, view: ModelView, progress: Progress | None = None) -> Measurement:
        """Quality of `view` against the original.

        Raises:
            WorkFailed: logits that are not finite; the first bad sample is named.
        """
        told = progress or Silent()
        reference, their_answers = self.reference(told)
        scored, answers = self._ask(view, told, "measuring")
        return Measurement(*self._compare(reference, their_answers, scored, answers))

    def _ask(self, view: ModelView, progress: Progress, what: str) -> tuple[_Scored, list[str]]:
        batches = self._batches()
        progress.start(what, len(batches))
        rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        answers: dict[int, str] = {}
        with evaluating(view.model):
            for part in batches:
                some = [self.samples[i] for i in part]
                for i, row in zip(part, self._score(view, some)):
                    rows[i] = row
                answers |= zip(part, self._generate(view, some, self._new_tokens))
                progress.step()
        progress.done()
        count = range(len(self.samples))
        log_p = torch.cat([rows[i][0] for i in count])
        targets = torch.cat([rows[i][1] for i in count])
        chosen = log_p.gather(-1, targets[:, None]).squeeze(-1)
        return _Scored(log_p, None, None, log_p.argmax(-1), chosen), [answers[i] for i in count]

    def _score(self, view: ModelView, samples: list[Sample]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Log-probabilities [answer tokens, vocabulary] and reference tokens of each sample, teacher-forced."""
        batch = self.encoder.encode(samples)
        logits = view.model(**batch).logits
        labels = batch["labels"]
        if not view.family.seq2seq:
            logits, labels = logits[:, :-1], labels[:, 1:]
        out = []
        for sample, row, target in zip(samples, logits, labels):
            marked = target != -100
            log_p = log_probabilities(row[marked])
            if not torch.isfinite(log_p).all():
                raise WorkFailed("the model's logits are not finite", where=f"sample {sample.id}: {sample.question}")
            out.append((log_p, target[marked]))
        return out

    def _generate(self, view: ModelView, samples: list[Sample], tokens: int) -> list[str]:
        inputs = self.encoder.prompts(samples)
        made = view.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        start = inputs["input_ids"].shape[1] if "input_ids" in inputs and not view.family.seq2seq else 0
        return self.encoder.decode(made[:, start:])

    def _compare(
        self, reference: _Scored, before: list[str], scored: _Scored, after: list[str]
    ) -> tuple[dict[str, Json], list[dict[str, Json]]]:
        if reference.indices is None:
            distance = kl(reference.values, scored.values)
        else:
            assert reference.rest is not None
            distance = kl_shortened(reference.values, reference.indices, reference.rest, scored.values)
        samples = self.samples
        was = [exact_match(a, s.answers) for a, s in zip(before, samples)]
        now = [exact_match(a, s.answers) for a, s in zip(after, samples)]
        images = [s.image_id for s in samples]
        worse, better = (sum(x and not y for x, y in zip(*pair)) for pair in ((was, now), (now, was)))
        low, high = paired_bootstrap(was, now, images)
        n = len(samples)
        quality: dict[str, Json] = {
            "kl": float(distance.mean()),
            "kl_p99": float(distance.quantile(0.99)),
            "agreement": float((reference.best == scored.best).double().mean()),
            "perplexity": math.exp(min(-float(scored.chosen.double().mean()), 700.0)),
            "exact_match": {
                "value": sum(now) / n,
                "reference": sum(was) / n,
                "delta": (sum(now) - sum(was)) / n,
                "ci95": [low, high],
                "mcnemar_p": mcnemar(worse, better),
                "right_to_wrong": worse,
                "wrong_to_right": better,
                "detectable": detectable(worse + better, n),
            },
            "flips": (worse + better) / n,
            "n": n,
            "n_images": len(set(images)),
            "by_tag": _by_tag(samples, was, now),
        }
        items = [
            {
                "id": s.id,
                "image_id": s.image_id,
                "answer": after[i],
                "correct": now[i],
                "reference_answer": before[i],
                "reference_correct": was[i],
            }
            for i, s in enumerate(samples)
        ]
        return quality, items

    # -- the original, once --------------------------------------------------------------------------------------------

    def reference(self, progress: Progress | None = None) -> tuple[_Scored, list[str]]:
        """The original's log-probabilities and answers, from the cache where it has them."""
        if self._reference is None:
            self._reference = self._read() or self._make(progress or Silent())
        return self._reference

    def _make(self, progress: Progress) -> tuple[_Scored, list[str]]:
        scored, answers = self._ask(self.original, progress, "asking the original")
        if scored.values.numel() * scored.values.element_size() > FULL_BYTES:
            values, indices, rest = shorten(scored.values, TOP)
            scored = dataclasses.replace(scored, values=values, indices=indices, rest=rest)
        if self._cache_dir is not None:
            from safetensors.torch import save

            fields = {f.name: getattr(scored, f.name) for f in dataclasses.fields(scored)}
            raw = save({k: v.contiguous() for k, v in fields.items() if v is not None})
            write_whole(self._cache_dir / f"{self.fingerprint}.safetensors", raw)
            write_whole(
                self._cache_dir / f"{self.fingerprint}.json", json.dumps({"answers": answers, "own": self._own})
            )
        return scored, answers

    def _read(self) -> tuple[_Scored, list[str]] | None:
        if self._cache_dir is None or not (self._cache_dir / f"{self.fingerprint}.json").is_file():
            return None
        from safetensors.torch import load_file

        said = json.loads((self._cache_dir / f"{self.fingerprint}.json").read_text(encoding="utf-8"))
        tensors = load_file(self._cache_dir / f"{self.fingerprint}.safetensors")
        self._own |= said["own"]
        return _Scored(**{f.name: tensors.get(f.name) for f in dataclasses.fields(_Scored)}), said["answers"]  # type: ignore[arg-type]

    @property
    def fingerprint(self) -> str:
        """Of all that the reference depends on."""
        if not self._fingerprint:
            digest = hashlib.sha256(fingerprint(self.original).encode())
            for s in self._given:
                digest.update(repr((s.id, s.question, s.messages, s.answers, [i.content for i in s.images])).encode())
            digest.update(f"{torch.__version__} {transformers.__version__} {self.batch_size}".encode())
            self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint

    _fingerprint = ""


def _by_tag(samples: Sequence[Sample], was: list[bool], now: list[bool]) -> dict[str, Json]:
    """tag -> value -> n, value, reference, delta of exact match."""
    groups: dict[str, dict[str, list[int]]] = {}
    for i, sample in enumerate(samples):
        for tag, value in sample.tags.items():
            groups.setdefault(tag, {}).setdefault(value, []).append(i)
    return {
        tag: {value: _share(rows, was, now) for value, rows in sorted(values.items())} for tag, values in groups.items()
    }


def _share(rows: list[int], was: list[bool], now: list[bool]) -> Mapping[str, Any]:
    before, after = sum(was[i] for i in rows) / len(rows), sum(now[i] for i in rows) / len(rows)
    return {"n": len(rows), "value": after, "reference": before, "delta": after - before}
