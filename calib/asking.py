"""Asking a model: how probable it finds the right answers, what it answers by itself, and how sure of that it is.

The model is in evaluation mode (`compress.base.evaluating`); its batches are made by `encoder`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMixin

from ..compress.anatomy import ModelView
from ..compress.base import Progress, Silent
from ..compress.errors import WorkFailed
from .encode import Encode, Encoder
from .metrics.divergence import log_probabilities
from .packing import alike, packed
from .sample import Sample

LOGIT_BYTES = 1 << 30  # logits of one forward; batches with more are split
TRIED = 8  # questions that are asked both ways before `packed` is relied on
CLOSE = 1e-4  # `packing.alike`
Batch = Mapping[str, torch.Tensor]
Layout = Callable[[ModelView, Batch], Batch]  # how a batch goes into a forward; the answer tokens keep their order


def singly(view: ModelView, batch: Batch) -> Batch:
    """A sequence for every question."""
    return batch


def layout(view: ModelView, encode: Encode, samples: Sequence[Sample], batch_size: int) -> Layout:
    """`packed`, where some of `samples` were packed for a trial and `view` said the same of them; else `singly`.

    Args:
        samples: the last ones that share a picture are tried; let them be long. batch_size: questions in a batch.
    """
    shown = [[image.content for image in sample.images] for sample in samples]
    pairs = [i + 1 for i, (one, other) in enumerate(pairwise(shown), start=1) if one and one == other]
    if not pairs or batch_size < 2:
        return singly
    some = samples[max(0, pairs[-1] - min(TRIED, batch_size)) : pairs[-1]]
    tried: list[bool] = []

    def noting(view: ModelView, batch: Batch) -> Batch:
        laid = packed(view, batch)
        tried.append(laid is not batch)
        return laid

    def asked(layout: Layout) -> torch.Tensor:
        return torch.cat([log_p for log_p, _ in scored(view, encode, some, layout)])

    same = alike(partial(asked, singly), partial(asked, noting), CLOSE)
    return packed if same and any(tried) else singly


def scored(
    view: ModelView, encode: Encode, samples: Sequence[Sample], layout: Layout = singly
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities [answer tokens, vocabulary] and reference tokens of each sample, teacher-forced.

    Raises:
        WorkFailed: logits that are not finite; names the sample.
    """
    batch = _on(view, encode(samples))
    labels = batch["labels"]
    vocabulary = view.model.config.get_text_config(decoder=True).vocab_size
    most = max(1, LOGIT_BYTES // (4 * labels.shape[1] * vocabulary))
    if most < len(samples):
        for start in range(0, len(samples), most):
            yield from scored(view, encode, samples[start : start + most], layout)
        return
    counts = (labels != -100).sum(1).tolist()
    # with labels: they tell prompt from answer to prefix-LM masks, and to passes that look at the prompt
    laid = layout(view, batch)
    logits, labels = view.model(**laid).logits, laid["labels"]
    if not view.family.seq2seq:
        logits, labels = logits[:, :-1], labels[:, 1:]
    marked = labels != -100
    for sample, row, target in zip(samples, logits[marked].split(counts), labels[marked].cpu().split(counts)):
        log_p = log_probabilities(row).cpu()
        if not torch.isfinite(log_p).all():
            raise WorkFailed(
                "the model's logits are not finite",
                where=f"sample {sample.id}: {sample.question}",
                found=f"{int((~torch.isfinite(log_p)).sum())} of {log_p.numel()} log-probabilities",
                change="milder settings for the last pass; in 16 bits, more range",
            )
        yield log_p, target


def of_target(log_p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of the tokens `target` [tokens] among `log_p` [tokens, vocabulary]."""
    return log_p.gather(-1, target[:, None]).squeeze(-1)


@dataclass(frozen=True)
class Said:
    """A model's answers to the same questions in the same order, and the probability that it gives each."""

    texts: list[str]
    confidence: list[float]


def answers(
    view: ModelView,
    encoder: Encoder,
    samples: Sequence[Sample],
    tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> Said:
    """Greedy answers of up to `tokens` tokens; `progress` gets a step for every batch.

    The confidence of an answer is its probability under the model: the product, over its tokens and the one that ends
    it, of what `generate` chose them by. It is read while the answer is made, at no forward of its own.
    """
    told = progress or Silent()
    told.start("generating", -(-len(samples) // batch_size))
    order = by_length(samples)
    said = Said([""] * len(samples), [0.0] * len(samples))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        for i, text, sure in zip(part, *_greedy(view, encoder, [samples[i] for i in part], tokens)):
            said.texts[i], said.confidence[i] = text, sure
        told.step()
    told.done()
    return said


def by_length(samples: Sequence[Sample], more: Callable[[Sample], int] = lambda s: 0) -> list[int]:
    """The places of the samples by number of pictures and length, so that a batch needs little padding."""
    keys = [(len(s.images), len(json.dumps(s.conversation)) + more(s), i) for i, s in enumerate(samples)]
    return [i for *_, i in sorted(keys)]


def by_picture(samples: Sequence[Sample]) -> list[int]:
    """The same with questions about the same pictures side by side, so that they can be packed."""
    order = by_length(samples, lambda s: len(s.answers[0]))
    groups: dict[tuple[str, ...], list[int]] = {}
    for i in order:
        shown = tuple(image.content for image in samples[i].images)
        groups.setdefault(shown or (str(i),), []).append(i)
    return [i for group in groups.values() for i in group]


def _greedy(view: ModelView, encoder: Encoder, samples: Sequence[Sample], tokens: int) -> tuple[list[str], list[float]]:
    """Answers and confidences of one batch; a model whose own settings ask for beams is asked greedily all the same."""
    inputs = _on(view, encoder.prompts(samples))
    sure = _Sure()
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": tokens}
    made = view.model.generate(**inputs, **greedy, logits_processor=LogitsProcessorList([sure]))
    new = made[:, made.shape[1] - len(sure.steps) :]
    last = torch.zeros_like(new, dtype=torch.bool)
    for token in _closing(view.model):
        last |= new == token
    before = last.cumsum(1) - last.long()  # how many ends came before: what follows the first is padding
    logs = torch.stack(sure.steps, 1).masked_fill(before > 0, 0.0).double().sum(1)
    return encoder.decode(new), [math.exp(min(value, 0.0)) for value in logs.tolist()]


class _Sure(LogitsProcessor):
    """Notes the log-probability of the most probable token at each step [batch]; changes nothing.

    `generate` puts it behind its own processors, so it sees what the token is chosen by.
    """

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raw = scores.float()
        self.steps.append(raw.amax(-1) - raw.logsumexp(-1))
        return scores


def _closing(model: torch.nn.Module) -> set[int]:
    """Every token that ends an answer, as the model says or the part of it that generates."""
    found: set[int] = set()
    for part in model.modules():
        if isinstance(part, GenerationMixin) and part.generation_config is not None:
            ends = part.generation_config.eos_token_id
            found.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return found


def _on(view: ModelView, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.to(view.model.device) for k, v in batch.items()}
