"""Samples as batches that the model takes, made by the model's own processor and chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compress.errors import DataError
from .sample import Sample

IGNORED = -100
KEPT_BYTES = 1 << 28
NO_LIMIT = 10**9  # tokenizers without a limit state 10^30

Encode = Callable[[Sequence[Sample]], dict[str, Tensor]]  # `Encoder.encode`


@dataclass(frozen=True)
class Wording:
    """How a processor without a chat template wants to be asked.

    Attributes:
        text: the prompt; ``{images}`` are the placeholders, ``{question}`` the question.
        answer: what the answer is joined on with.
        suffix: the processor itself joins prompt and answer, and makes the labels (argument ``suffix``).
        seq2seq: answers are the decoder's own tokens.
        image_only: the model takes no text at all; the question is not asked.
    """

    text: str = "{images}{question}"
    answer: str = " "
    suffix: bool = False
    seq2seq: bool = False
    image_only: bool = False


WORDINGS = {  # by class of the processor
    "Blip2Processor": Wording("Question: {question} Answer:"),
    "PaliGemmaProcessor": Wording("{images}answer en {question}", suffix=True),
    "Florence2Processor": Wording("{question}", seq2seq=True),
    "TrOCRProcessor": Wording("", seq2seq=True, image_only=True),
    "DonutProcessor": Wording("", seq2seq=True, image_only=True),
    "NougatProcessor": Wording("", seq2seq=True, image_only=True),
}


class Encoder:
    """Makes batches with a Hugging Face processor.

    Args:
        processor: of the model. device: where the tensors go.
        seq2seq: whether answers are the decoder's own tokens (`Family.seq2seq`); None: as its class usually has it.

    Raises:
        DataError: there is no processor, or one without a tokenizer or without an image processor.
    """

    def __init__(self, processor: Any, device: torch.device | str = "cpu", *, seq2seq: bool | None = None) -> None:
        kind = type(processor).__name__
        for part in ("tokenizer", "image_processor"):
            if getattr(processor, part, None) is None:
                raise DataError(
                    f"the model has no processor with {part.replace('_', ' ')}: it cannot be asked about images",
                    where="model folder",
                    found="no processor" if processor is None else kind,
                    change="put processor_config.json (or preprocessor_config.json), tokenizer.json and "
                    "tokenizer_config.json beside the weights: processor.save_pretrained(folder)",
                )
        self.processor, self.device = processor, device
        self.tokenizer = processor.tokenizer
        self.wording = WORDINGS.get(kind, Wording())
        self.seq2seq = self.wording.seq2seq if seq2seq is None else seq2seq
        self.chat = not self.wording.image_only and bool(
            getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        )

    def encode(self, samples: Sequence[Sample], answers: bool = True) -> dict[str, Tensor]:
        """Batch of prompts with the first answer of each sample.

        Returns:
            What the processor gives, `input_ids` and `attention_mask` [B, L] padded on the left, and `labels`: the
            tokens of the answer and the one that ends it, -100 everywhere else; [B, L], or [B, T] padded on the right
            where the decoder has tokens of its own. Without `answers` the same as `prompts`.

        Raises:
            DataError: a sample without answer; a chat template that renders a prompt differently once it is answered;
                placeholders of images that were cut off.
        """
        if not answers:
            return self.prompts(samples)
        for sample in samples:
            if not sample.answers:
                raise DataError(
                    "a sample without an answer", where=_place(sample), change="let the original model answer it first"
                )
        first = [sample.answers[0] for sample in samples]
        prompts = self._rendered(samples)
        if self.seq2seq:
            batch = self._processed(samples, prompts)
            return batch | {"labels": self._decoder_labels(first)}
        if self.wording.suffix and not self.chat:
            return self._processed(samples, prompts, suffix=first)
        texts = self._rendered(samples, first)
        texts, ends = self._ends(samples, prompts, texts, first)
        batch = self._processed(samples, texts)
        return batch | {"labels": self._labels(samples, batch["input_ids"], ends)}

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Batch of prompts for `generate`, padded on the left; no labels."""
        batch = self._processed(samples, self._rendered(samples))
        batch.pop("labels", None)
        return batch

    def batches(self, samples: Sequence[Sample], batch_size: int, answers: bool = True) -> Iterator[dict[str, Tensor]]:
        """`encode` of `batch_size` samples at a time, in order."""
        for start in range(0, len(samples), batch_size):
            yield self.encode(samples[start : start + batch_size], answers)

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Texts of generated tokens [B, T] (without the prompt): no special tokens, no space around."""
        rows = ids.tolist() if isinstance(ids, Tensor) else [list(row) for row in ids]
        rows = [[i for i in row if i >= 0] for row in rows]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def read_answer(self, token_ids: Tensor | Sequence[int]) -> str:
        """`decode` of one row [T]."""
        return self.decode([torch.as_tensor(token_ids).tolist()])[0]

    def _rendered(self, samples: Sequence[Sample], answers: Sequence[str] | None = None) -> list[str]:
        """Prompts ending where the answer begins, or whole conversations with the answer."""
        if not samples:
            raise DataError("zero samples to encode")
        if not self.chat:
            w = self.wording
            image = getattr(self.processor, "image_token", "")
            texts = [w.text.format(images=str(image) * len(s.images), question=_history(s)) for s in samples]
            return texts if answers is None else [t + w.answer + a for t, a in zip(texts, answers)]
        chats = [sample.conversation for sample in samples]
        if answers is not None:
            told = [[{"type": "text", "text": answer}] for answer in answers]
            chats = [[*chat, {"role": "assistant", "content": parts}] for chat, parts in zip(chats, told)]
        if getattr(self.processor, "chat_template", None):
            renderer = self.processor
        else:  # a template for texts
            renderer = self.tokenizer
            image = str(getattr(self.processor, "image_token", ""))
            chats = [[{**turn, "content": _flat(turn["content"], image)} for turn in chat] for chat in chats]
        return renderer.apply_chat_template(chats, tokenize=False, add_generation_prompt=answers is None)

    def _special(self, text: str) -> bool:
        """Whether the tokenizer adds its own special tokens: not where the template wrote them already."""
        bos = self.tokenizer.bos_token
        return not (self.chat and bos is not None and text.startswith(bos))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts with a single placeholder for each image."""
        return self.tokenizer(list(texts), add_special_tokens=self._special(texts[0]))["input_ids"]

    def _ends(
        self, samples: Sequence[Sample], prompts: list[str], texts: list[str], answers: Sequence[str]
    ) -> tuple[list[str], list[tuple[list[int], int]]]:
        """The texts, each closed by an end token, and for each: the tokens after the prompt, and how many to learn.

        The template's own end of turn closes an answer. Where it has none, the tokenizer's eos is put there.
        """
        texts = list(texts)
        before, whole = self._ids(prompts), self._ids(texts)
        special = set(self.tokenizer.all_special_ids)

        def end(i: int) -> int:
            after = whole[i][len(before[i]) :]
            last = max((k for k, token in enumerate(after) if token in special), default=-1)
            rest = self.tokenizer.decode(after[last + 1 :]).strip() if after else ""
            return 0 if rest else last + 1

        eos = self.tokenizer.eos_token
        unclosed = [i for i in range(len(texts)) if not end(i)]
        if unclosed and eos:
            for i in unclosed:
                texts[i] = texts[i].rstrip() + eos
            for i, ids in zip(unclosed, self._ids([texts[i] for i in unclosed])):
                whole[i] = ids
        ends = []
        for i, sample in enumerate(samples):
            start = len(before[i])
            after = whole[i][start:]
            if whole[i][:start] != before[i] or not after:
                raise DataError(
                    "the chat template renders a prompt differently once it is answered, so the answer's tokens are "
                    "unknown",
                    where=_place(sample),
                    found=f"prompt {prompts[i][-120:]!r}; answered {texts[i][-160:]!r}",
                    change="correct the chat template: the answered conversation has to start with the prompt",
                )
            ends.append((after, end(i) or len(after)))
        return texts, ends

    def _labels(self, samples: Sequence[Sample], ids: Tensor, ends: Sequence[tuple[list[int], int]]) -> Tensor:
        """Labels [B, L] for `ids` [B, L] that end with the tokens after the prompt."""
        labels = torch.full_like(ids, IGNORED)
        length = ids.shape[1]
        for row, sample, (after, learn) in zip(range(len(ids)), samples, ends):
            start = length - len(after)
            if start < 0 or ids[row, start:].tolist() != after:
                raise DataError(
                    "the processor changed the answer's tokens",
                    where=_place(sample),
                    found=f"{self.tokenizer.decode(ids[row, max(start, 0) :])!r}",
                    change="use a processor that pads on the left and does not truncate",
                )
            labels[row, start : start + learn] = ids[row, start : start + learn]
        return labels

    def _decoder_labels(self, answers: Sequence[str]) -> Tensor:
        """Labels [B, T] of the decoder's own tokens: answer and eos, -100 after them."""
        eos = self.tokenizer.eos_token_id
        rows = self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        rows = [[*row, eos] if eos is not None else row for row in rows]
        labels = torch.full((len(rows), max(map(len, rows))), IGNORED)
        for label, row in zip(labels, rows):
            label[: len(row)] = torch.tensor(row)
        return labels.to(self.device)

    def _processed(self, samples: Sequence[Sample], texts: Sequence[str], **more: Any) -> dict[str, Tensor]:
        """The processor's tensors for all pictures and texts at once."""
        pictures = [[image.open() for image in sample.images] for sample in samples]
        if self.wording.image_only:
            batch = self.processor(images=[first for first, *_ in pictures], return_tensors="pt")
            return {key: value.to(self.device) for key, value in batch.items()}
        options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt", **more}
        if not self._special(texts[0]):
            options["add_special_tokens"] = False
        try:
            batch = self.processor(images=pictures if any(pictures) else None, text=list(texts), **options)
        except ValueError as error:
            raise DataError(
                "the processor refuses the samples",
                where=f"{_place(samples[0])} and the {len(samples) - 1} after it",
                found=str(error),
                change="check that question and images fit the model: image placeholders must not be cut off",
            ) from error
        made = {key: value.to(self.device) for key, value in batch.items() if isinstance(value, Tensor)}
        self._check_whole(samples, made)
        return made

    def _check_whole(self, samples: Sequence[Sample], batch: dict[str, Tensor]) -> None:
        """Every sample fits the tokenizer's limit and has a placeholder for each of its images."""
        limit = min(self.tokenizer.model_max_length, NO_LIMIT)
        lengths = batch["attention_mask"].sum(1).tolist()
        marker = getattr(self.processor, "image_token_id", None)
        places = None if marker is None or self.seq2seq else (batch["input_ids"] == marker).sum(1).tolist()
        for i, sample in enumerate(samples):
            if lengths[i] > limit:
                raise DataError(
                    f"a prompt of {lengths[i]} tokens does not fit the model's {limit}: image tokens would be cut off",
                    where=_place(sample),
                    change="shorten the question or give fewer or smaller images",
                )
            if places is not None and places[i] < len(sample.images):
                raise DataError(
                    f"{places[i]} image tokens for {len(sample.images)} images",
                    where=_place(sample),
                    change="the chat template has to place every image; give one image a question",
                )


class Kept:
    """An `encode` that remembers its first batches, up to `KEPT_BYTES`: every stage asks the same questions."""

    def __init__(self, encode: Encode) -> None:
        self._encode, self._bytes = encode, 0
        self._made: dict[tuple[int, ...], tuple[Sequence[Sample], dict[str, Tensor]]] = {}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        key = tuple(map(id, samples))
        if key in self._made:
            return dict(self._made[key][1])
        batch = self._encode(samples)
        self._bytes += sum(tensor.nbytes for tensor in batch.values())
        if self._bytes <= KEPT_BYTES:
            self._made[key] = samples, batch  # the samples too, or their ids would not be theirs for long
        return dict(batch)


def _place(sample: Sample) -> str:
    return f"sample {sample.id}" + (f" ({sample.where})" if sample.where else "")


def _history(sample: Sample) -> str:
    """Everything said, for models that know no turns."""
    return " ".join(filter(None, (_flat(turn["content"], "") for turn in sample.conversation)))


def _flat(content: Any, image: str) -> str:
    """Parts as one text, images as placeholders."""
    if isinstance(content, str):
        return content
    marks = image * sum(part["type"] == "image" for part in content)
    words = " ".join(part["text"] for part in content if part["type"] == "text")
    return "\n".join(filter(None, (marks, words)))
