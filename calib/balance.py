"""How much a visual token matters to the answer beside a token of text: MBQ's gradient ratio (arXiv 2412.19509).

The loss on the answers of a few samples is sent backward once. For each block of the language model, at the output Y of
the attention's output projection and of the MLP's down projection::

    r = mean |dL/dY| over visual tokens / mean |dL/dY| over answer tokens

and a layer's r is lifted to at least the median over layers, attention and MLP apart (the last block's visual tokens
cannot reach the answer any more: their r is 0). Differences from the paper: the loss is a sum over answer tokens, so
that r does not depend on how samples are batched; and "answer tokens" are those at which the loss reads a prediction,
each one place before the token that it predicts. With answers of a word or two the places of the answer itself say
little: the last one predicts nothing and its gradient is 0.

Where it is not a decoder over one sequence: in an encoder over visual and text tokens (BLIP-2 with T5, Florence-2) no
token is an answer, and text tokens take the answers' place in the quotient; keys and values of cross-attention to such
an encoder have an r of their own, at the output of the value projection. What reads no text beside images (vision
tower, connector, cross-attention to image features) or no images (their decoders) has no r and no use for one.

Memory: no gradient of a parameter exists; blocks are computed again in the backward pass, so that what is kept is one
block's activations and the inputs of the blocks for a few samples.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..compress.anatomy import LinearRef, ModelView, TokenMasks
from ..compress.base import Json, evaluating
from ..compress.errors import Unmet, WorkFailed
from ..compress.mapped import hand_back, release
from ..compress.runtime.seen import seen, wants_labels
from .narrow import narrow_dtype, narrowing
from .replay import patched, pieces
from .scratch import fingerprint
from .stats import input_masks

SAMPLES = 32  # that the ratios are measured on; batches without images are passed over
PIECE = 4  # samples in one backward pass, where a batch can be taken apart
Finished = Callable[[int, slice], Mapping[nn.Module, Callable[..., Any]]]
OUTPUTS = {"attn.o": "attn", "mlp.down": "mlp", "cross.v": "cross"}  # role of a linear -> whose ratio its output gives


@dataclass
class Gradients:
    """Mean ``|dL/dY|`` over the visual, the text and the answer tokens of one output Y; None where there were none."""

    vision: float | None
    text: float | None
    answer: float | None

    @property
    def ratio(self) -> float | None:
        """Visual over answer tokens (over text where no token is an answer); None where that cannot be said."""
        below = self.answer if self.answer is not None else self.text
        return None if self.vision is None or not below else self.vision / below


@dataclass
class Measured:
    """`gradients`: kind (attn, mlp, cross) -> name of the unit -> means. `samples`: how many they were measured on."""

    gradients: dict[str, dict[str, Gradients]]
    samples: int

    @cached_property
    def ratios(self) -> dict[str, dict[str, float]]:
        """Kind -> name of the unit -> lifted r; no kind of which nothing is known."""
        raw = {kind: {name: g.ratio for name, g in units.items()} for kind, units in self.gradients.items()}
        return {kind: lifted(units) for kind, units in raw.items() if any(r is not None for r in units.values())}

    @cached_property
    def median(self) -> float | None:
        """Of all ratios of all kinds."""
        found = [r for units in self.ratios.values() for r in units.values()]
        return statistics.median(found) if found else None

    def numbers(self) -> dict[str, Json]:
        """For a pass's notes: least, median and largest weight of a visual token by kind, where text weighs 1.

        Beside them the median r of all text tokens (which weigh 1 all the same), how many layers were lifted to the
        median, and how many had no ratio of their own. `fallback` says what these took instead where a whole kind had
        none.
        """
        numbers: dict[str, Json] = {"samples": self.samples}
        for kind, units in self.gradients.items():
            row: dict[str, Json] = {}
            weights = self.ratios.get(kind)
            if weights is None:
                row["fallback"] = "balanced" if self.median is None else "median of the other kinds"
            else:
                row["min"], row["median"] = min(weights.values()), statistics.median(weights.values())
                row["max"] = max(weights.values())
                row["lifted"] = sum(weights[name] != g.ratio for name, g in units.items())
            text = [g.text / g.answer for g in units.values() if g.text is not None and g.answer]
            row["text"] = statistics.median(text) if text else None
            row["without_ratio"] = sum(g.ratio is None for g in units.values())
            numbers[kind] = row
        return numbers


class Balance:
    """The ratios of one model, measured when they are first asked for and then fixed, whatever becomes of the model.

    Args:
        view: the model; ask before a weight is changed. batches: model-ready batches with `labels`.
        scratch: a folder that keeps the ratios across a kill: a resumed pass reads what the killed one measured.
    """

    def __init__(self, view: ModelView, batches: Sequence[Mapping[str, Any]], scratch: Path | None = None) -> None:
        self.view, self.batches = view, batches
        self._path = scratch / "balance.json" if scratch else None
        self._measured: Measured | None = None

    def measured(self, finished: Finished | None = None) -> Measured:
        """The measurement; the first call makes it, or reads what a killed run left. `finished`: as in `measure`."""
        if self.known() is None:
            self._measured = measure(self.view, self.batches, finished=finished)
            if self._path:
                from ..compress.disk import write_json

                write_json(self._path, {"batches": fingerprint(self.batches), **dataclasses.asdict(self._measured)})
        assert self._measured is not None
        return self._measured

    def known(self) -> Measured | None:
        """The measurement if there is one already."""
        if self._measured is None and self._path and self._path.is_file():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["batches"] == fingerprint(self.batches):
                gradients = {
                    kind: {name: Gradients(**means) for name, means in units.items()}
                    for kind, units in kept["gradients"].items()
                }
                self._measured = Measured(gradients, kept["samples"])
        return self._measured

    def ratio(self, ref: LinearRef) -> float | None:
        """What a visual token weighs in the inputs of `ref` where a text token weighs 1.

        The lifted r of its block: inputs of attention take the attention's, those of the MLP the MLP's. A linear
        that is in neither (a projection beside the blocks, the head) takes the median of all. None where nothing was
        measured.
        """
        measured = self.measured()
        return measured.ratios.get(ref.role.split(".")[0], {}).get(ref.unit.name, measured.median)


def lifted(ratios: Mapping[str, float | None]) -> dict[str, float]:
    """Each ratio, at least the median of those that are known; an unknown one becomes the median."""
    middle = statistics.median(r for r in ratios.values() if r is not None)
    return {name: middle if r is None else max(r, middle) for name, r in ratios.items()}


# ----------------------------------------------------------------------------------------------------- the measurement


class _Sums:
    """Sum of ``|dL/dY|`` (mean over channels) and number of tokens, for each kind of token."""

    def __init__(self) -> None:
        self.total = dict.fromkeys(("vision", "text", "answer"), 0.0)
        self.tokens = dict.fromkeys(self.total, 0)

    def add(self, sizes: torch.Tensor, masks: TokenMasks) -> None:
        for kind in self.total:
            mask = getattr(masks, kind).reshape(-1).to(sizes.device)
            self.total[kind] += float(sizes[mask].sum())
            self.tokens[kind] += int(mask.sum())

    def means(self) -> Gradients:
        return Gradients(
            **{kind: total / n if (n := self.tokens[kind]) else None for kind, total in self.total.items()}
        )


def measure(
    view: ModelView,
    batches: Sequence[Mapping[str, Any]],
    samples: int = SAMPLES,
    piece: int = PIECE,
    finished: Finished | None = None,
) -> Measured:
    """Gradients of the answers' loss at the outputs of the language model's blocks, over about `samples` samples.

    Args:
        finished: of a batch's number and some of its samples, modules whose outputs are known and stand in for them.

    Raises:
        Unmet: a batch has no labels. WorkFailed: the loss is not finite.
    """
    refs = [ref for unit in view.units for ref in unit.linears if ref.role in OUTPUTS and unit.part == "language"]
    sums = {ref: _Sums() for ref in refs}
    seen = 0
    for index, batch in enumerate(batches):
        if "labels" not in batch:
            raise Unmet(
                "token_weights 'gradient' needs the answers' tokens",
                found="a batch without labels",
                change="give answers, or token_weights: balanced",
            )
        watched = [ref for ref in refs if (masks := input_masks(view, batch, ref)) is not None and masks.vision.any()]
        if not watched:
            continue
        start = 0
        for part in pieces(view, batch, piece):
            if seen >= samples:
                break
            rows = slice(start, start := start + len(part["labels"]))
            arrived, kept = _backward(view, part, watched, finished(index, rows) if finished else {})
            for ref, calls in arrived.items():
                masks = input_masks(view, part, ref, kept)
                assert masks is not None
                for sizes in calls:
                    if masks.text.numel() != len(sizes):
                        raise WorkFailed(
                            "the tokens of the batch and of a block's output do not match",
                            where=ref.path,
                            found=f"{masks.text.numel()} in the batch, {len(sizes)} in the block",
                            change="correct 'tokens' (image, prompt, sequence) of this place in the anatomy row",
                        )
                    sums[ref].add(sizes, _predicting(view, part, ref, masks, kept))
            seen += len(part["labels"])
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                release(value)
    gradients: dict[str, dict[str, Gradients]] = {}
    for ref, total in sums.items():
        if total.tokens["vision"] or total.tokens["text"]:
            gradients.setdefault(OUTPUTS[ref.role], {})[ref.unit.name] = total.means()
    if seen and not gradients:
        raise WorkFailed(
            "no gradient of the answers reached a block of the language model",
            found=f"{seen} samples",
            change="token_weights: balanced",
        )
    return Measured(gradients, seen)


def _predicting(view: ModelView, batch: Mapping[str, Any], ref: LinearRef, masks: TokenMasks, kept: Any) -> TokenMasks:
    """`masks` with the answer tokens each one place earlier, where the loss reads their prediction."""
    if view.family.seq2seq:
        return masks
    earlier = {**batch, "labels": torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)}
    found = input_masks(view, earlier, ref, kept)
    assert found is not None
    return found


def _backward(
    view: ModelView,
    batch: Mapping[str, Any],
    watched: Sequence[LinearRef],
    finished: Mapping[nn.Module, Callable[..., Any]],
) -> tuple[dict[LinearRef, list[torch.Tensor]], Any]:
    """One backward pass: for each watched linear ``|dL/dY|`` by token, [tokens] a call; and what a token pass kept."""
    arrived: dict[LinearRef, list[torch.Tensor]] = {ref: [] for ref in watched}

    def note(ref: LinearRef, gradient: torch.Tensor) -> None:
        arrived[ref].append(gradient.abs().mean(-1, dtype=torch.float64).reshape(-1))
        let_go()  # a backward pass reads weights whose forward let go of them

    def let_go() -> None:
        for parameter in view.model.parameters():
            release(parameter)

    def watching(ref: LinearRef) -> Callable[..., Any]:
        original = ref.module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            out = original(x)
            if not out.requires_grad:  # the first ones: here the graph begins
                out = out.detach().requires_grad_()
            out.register_hook(lambda g: note(ref, g))
            return out

        return forward

    def again(module: nn.Module) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return forward

    blocks = {ref.unit.module for ref in watched}
    narrow = narrowing(view.units, narrow_dtype(view))
    with evaluating(view.model), frozen(view.model), torch.enable_grad(), narrow:
        inside = {ref.module: watching(ref) for ref in watched}
        with patched({**finished, **inside, **{block: again(block) for block in blocks}}):
            loss = _loss(view, batch)
            kept = seen(view.model)
            if not bool(loss.isfinite()):
                raise WorkFailed(
                    "the loss on the calibration answers is not finite",
                    found=str(float(loss.detach())),
                    change="'token_weights: balanced' goes block by block and names the first linear concerned",
                )
            if loss.requires_grad:
                loss.backward()
    let_go()
    hand_back()
    return arrived, kept


def _loss(view: ModelView, batch: Mapping[str, Any]) -> torch.Tensor:
    """Sum of the cross-entropy of the answer tokens."""
    logits, labels = answer_logits(view, batch)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def answer_logits(view: ModelView, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [batch, places, vocabulary], float32 or finer, and the labels [batch, places] that they predict.

    No logits of places before the first answer where the model can do without.
    """
    model = view.model
    given = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()} | {
        "use_cache": False
    }
    labels = given["labels"]
    if not view.family.seq2seq:
        labels = labels[:, 1:]
        first = int((labels != -100).any(0).int().argmax())
        short = "logits_to_keep" in inspect.signature(model.forward).parameters
        if short and not wants_labels(model):
            del given["labels"]
            given["logits_to_keep"] = labels.shape[1] + 1 - first
        logits = model(**given).logits[:, -(labels.shape[1] + 1 - first) : -1]
        labels = labels[:, first:]
    else:
        logits = model(**given).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; flags as before afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
