"""svlm's models as lmms-eval asks them: its model class `svlm`.

`svlm verify --lmms-eval` asks with it. So does lmms-eval's own command line where svlm is installed, by the entry
point `lmms_eval.models`:

    lmms-eval --model svlm --model_args pretrained=runs/int4 --tasks pope

What lmms-eval 0.7 wants: `generate_until` gives texts; `loglikelihood` gives a loss, for its multiple-choice tasks take
the answer with the smallest one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from ..calib.encode import Encoder
from ..calib.sample import ImageSource, Sample
from ..compress.anatomy import ModelView
from ..compress.base import Progress, Silent, evaluating
from ..compress.errors import DataError, UsageError
from .api import load_view

MOST_TOKENS = 1024  # of an answer where the task does not say
DEFAULT_STOP = "\n\n"  # lmms-eval writes it into every task that names no stop; its own models ignore it, too


class SvlmChat(lmms):
    """Asks `view` what lmms-eval's tasks ask, in the model's own chat format, greedily.

    Args:
        pretrained: folder or hub id. batch_size: questions in a batch. device: of torch.
        view: a model that is loaded already, instead of `pretrained`. progress: is told of each batch.

    Attributes:
        pictures: (task, doc_id) -> what its pictures show, equal for equal pictures; filled while asking.
        notes: sentences about what a task wanted and did not get. asking: what the progress is called.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        trust_remote_code: bool | str = False,
        view: ModelView | None = None,
        progress: Progress | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UsageError(
                f"the model class svlm has no argument {', '.join(unknown)}",
                change="pretrained, batch_size, device, trust_remote_code",
            )
        self.view = view or load_view(pretrained, trust_remote_code=str(trust_remote_code).lower() == "true")
        if device is not None:
            self.view.model.to(device)
        self.encoder = Encoder(self.view.processor, self.view.model.device, seq2seq=self.view.family.seq2seq)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 1
        self.progress = progress or Silent()
        self.pictures: dict[tuple[str, int], str] = {}
        self.notes: set[str] = set()
        self.asking = "asking"

    # -- what lmms-eval calls ------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, cut at the task's stop strings."""
        texts = [""] * len(requests)
        self.progress.start(self.asking, len(requests))
        with evaluating(self.view.model):
            for settings, indices in self._batches(requests):
                samples = {i: self.sample(requests[i]) for i in indices}
                for part in _by_pictures(samples):
                    for i, text in zip(part, self._answers([samples[i] for i in part], settings)):
                        texts[i] = text
                self.progress.step(len(indices))
        self.progress.done()
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """For each continuation: the mean of ``-log p`` in nats over its tokens (the one that ends the answer counts),
        and whether each of them is the most probable one.

        Each pair comes as the `text` of a GenerationResult: of a bare tuple lmms-eval 0.7.3 makes a string, which its
        own scoring cannot read.
        """
        losses = []
        self.progress.start(self.asking, len(requests))
        with evaluating(self.view.model):
            for request in requests:
                batch = self.encoder.encode([self.sample(request, answered=True)])
                logits, labels = self.view.model(**batch).logits[0], batch["labels"][0]
                if not self.view.family.seq2seq:
                    logits, labels = logits[:-1], labels[1:]
                marked = labels != -100
                log_p, target = logits[marked].float().log_softmax(-1), labels[marked]
                loss = -log_p.gather(-1, target[:, None]).mean()
                greedy = bool((log_p.argmax(-1) == target).all())
                losses.append(GenerationResult((float(loss), greedy)))
                self.progress.step()
        self.progress.done()
        return losses

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UsageError("a task that asks in several rounds; svlm answers once", change="leave it out")

    # -- how it is asked -----------------------------------------------------------------------------------------------

    def sample(self, request: Any, answered: bool = False) -> Sample:
        """What `request` shows and asks; `answered`: with the continuation whose likelihood it wants.

        Raises:
            DataError: it shows something else than pictures.
        """
        doc_id, task, split = request.args[-3:]
        doc = self.task_dict[task][split][doc_id]
        messages: list[dict[str, Any]] = []
        sources: list[ImageSource] = []
        for turn in self._messages(request, doc):
            parts = [{"type": "text", "text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]
            told: list[dict[str, str]] = []
            for part in parts:
                if part["type"] == "text":
                    told.append({"type": "text", "text": self._plain(part["text"])})
                else:
                    told.append({"type": "image"})
                    sources.append(_source(part, f"{task}, item {doc_id}"))
            messages.append({"role": turn["role"], "content": told})
        shown = " ".join(source.content for source in sources) or f"item {doc_id}"
        self.pictures[task, doc_id] = shown
        answers: tuple[str, ...] = ()
        if answered:
            wanted = request.args[1]
            answers = (str(wanted if isinstance(wanted, str) else wanted(doc)).strip(),)
        return Sample(f"{task}/{doc_id}", shown, tuple(sources), None, answers, {}, messages, f"{task}, item {doc_id}")

    def _messages(self, request: Any, doc: Any) -> list[dict[str, Any]]:
        return request.args[1](doc)

    def _plain(self, text: str) -> str:
        """Without the model's own placeholder of a picture: where pictures go, the messages say."""
        token = getattr(self.encoder.processor, "image_token", None)
        return text.replace(token, "").strip() if token else text

    def _answers(self, samples: Sequence[Sample], settings: Mapping[str, Any]) -> list[str]:
        inputs = self.encoder.prompts(samples)
        made = self.view.model.generate(
            **inputs, max_new_tokens=settings["tokens"], num_beams=settings["beams"], do_sample=False
        )
        prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs and not self.view.family.seq2seq else 0
        texts = self.encoder.decode(torch.as_tensor(made)[:, prompt:])
        for stop in settings["stop"]:
            texts = [text.split(stop)[0] for text in texts]
        return texts

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Requests with the same settings, by length, so that a batch needs little padding."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(self._settings(request)), []).append(i)
        for key, group in groups.items():
            group.sort(key=lambda i: len(str(requests[i].args[0])))
            for start in range(0, len(group), self.batch_size):
                yield json.loads(key), group[start : start + self.batch_size]

    def _settings(self, request: Any) -> dict[str, Any]:
        wanted = next(a for a in request.args if isinstance(a, Mapping))
        if wanted.get("do_sample", True) and (wanted.get("temperature") or 0) > 0:
            self.notes.add("the task asks for sampled answers; both models answered greedily, to be compared by item")
        stop = wanted.get("until") or []
        return {
            "tokens": int(wanted.get("max_new_tokens") or MOST_TOKENS),
            "beams": int(wanted.get("num_beams") or 1),
            "stop": [s for s in ([stop] if isinstance(stop, str) else stop) if s and s != DEFAULT_STOP],
        }


class SvlmSimple(SvlmChat):
    """The same for requests that give pictures and text apart, among them all that want likelihoods."""

    is_simple = True

    def _messages(self, request: Any, doc: Any) -> list[dict[str, Any]]:
        pictures = request.args[2](doc) or []
        shown = [{"type": "image", "url": picture} for picture in _flat(pictures)]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": request.args[0]}]}]


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` gives lmms-eval."""
    return ModelManifest(
        model_id="svlm", simple_class_path=f"{__name__}.SvlmSimple", chat_class_path=f"{__name__}.SvlmChat"
    )


def _flat(pictures: Any) -> Iterable[Any]:
    if not isinstance(pictures, list | tuple):
        return [pictures]
    return [one for picture in pictures for one in _flat(picture)]


def _source(part: Mapping[str, Any], where: str) -> ImageSource:
    picture = part.get("url")
    if part["type"] == "image" and isinstance(picture, Image.Image):
        return ImageSource(picture=picture, where=where)
    if part["type"] == "image" and isinstance(picture, str):
        return ImageSource(Path(picture), where=where)
    raise DataError(
        "svlm asks about pictures only",
        where=where,
        found=f"{part['type']} ({type(picture).__name__})",
        change="leave this task out",
    )


def _by_pictures(samples: Mapping[int, Sample]) -> Iterable[list[int]]:
    """Indices of samples with as many pictures, together."""
    groups: dict[int, list[int]] = {}
    for i, sample in samples.items():
        groups.setdefault(len(sample.images), []).append(i)
    return groups.values()
