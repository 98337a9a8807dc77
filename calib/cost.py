"""What a model costs: parameters, bytes, visual tokens, FLOPs, milliseconds, memory."""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import CacheLayerMixin

from ..compress.anatomy import ModelView
from ..compress.base import Json, evaluating
from ..compress.inspect import part_sizes
from ..compress.pipeline import PeakMemory
from ..compress.runtime.kv_cache import States
from ..compress.runtime.reduce import installed

RUNS, FEWEST, WARM_UPS = 11, 3, 2
PATIENCE = 10.0  # seconds after which a figure makes do with FEWEST runs
FIRST = ("vision", "connector", "prefill")  # what the first forward consists of
Run = Callable[[], Any]
T = TypeVar("T")


def cost(
    view: ModelView, batch: Mapping[str, torch.Tensor], *, bytes_on_disk: int | None = None, latency: bool = True
) -> dict[str, Json]:
    """report.json's `cost` of one question about one picture.

    The first forward, up to the first token, is split among the parts that it passes through: `vision` is the tower and
    the choice among its tokens, `connector` what lies between, `prefill` all the rest (language model, head); `decode`
    is one more token with the cache of the first, as `generate` calls for it. FLOPs count matrix products, convolutions
    and attention, a multiply-add as two. Milliseconds are medians of eleven warm runs (of fewer, at least three, where
    these take more than ten seconds).

    Args:
        batch: one encoded sample. bytes_on_disk: of the weight files; estimated from the tensors where not given.
        latency: whether to time the model; the values are None otherwise.

    Returns:
        parameters (a shared one once), bytes, parameters_by_part, bytes_by_part, visual_tokens (an image, as many as
        the language model works on), flops {vision, connector, prefill, decode}, latency_ms {vision, connector,
        prefill, first_token (all of these), decode_per_token}, kv_bytes (what the cache of `generate` holds after the
        first forward, all questions of the batch together, in the dtype that the model runs in), peak_rss_bytes (of
        the process during these runs). None where the model never calls its tower, has no cache, or decodes without a
        second forward, so that there is nothing to measure.
    """
    inputs = {k: v.to(view.model.device) for k, v in batch.items()}
    labels = inputs.pop("labels", None)
    sizes = part_sizes(view)
    with PeakMemory() as memory, evaluating(view.model), _frozen(view.model):
        prompt, second = _first_forward(view, inputs, labels), _second_call(view, inputs)
        step, held = (None, None) if second is None else (_step(*second), cache_bytes(second[1].get("past_key_values")))
        flops = _split_flops(view, prompt) | {"decode": _flops(step)}
        timed: dict[str, Any] = dict.fromkeys((*FIRST, "first_token", "decode_per_token"))
        if latency:
            timed = _split_milliseconds(view, prompt) | {"decode_per_token": _milliseconds(step, view.model.device)}
        visual = sum(view.visual_tokens(inputs)) / _images(inputs)
    return {
        "parameters": sum(p.numel() for p in view.model.parameters()),
        "bytes": sum(stored for _, stored in sizes.values()) if bytes_on_disk is None else bytes_on_disk,
        "bytes_by_part": {part: stored for part, (_, stored) in sizes.items()},
        "parameters_by_part": {part: count for part, (count, _) in sizes.items()},
        "visual_tokens": int(visual) if visual == int(visual) else visual,
        "flops": flops,
        "latency_ms": timed,
        "kv_bytes": held,
        "peak_rss_bytes": memory.peak,
    }


def cache_bytes(cache: Any) -> int | None:
    """Bytes of the tensors in the layers of a cache; None where there is none."""
    from transformers import EncoderDecoderCache

    if cache is None:
        return None
    two = isinstance(cache, EncoderDecoderCache)
    caches = (cache.self_attention_cache, cache.cross_attention_cache) if two else (cache,)
    found: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, (list, tuple, dict)):
            for entry in value.values() if isinstance(value, dict) else value:
                count(entry)
        elif isinstance(value, (CacheLayerMixin, States)):
            count(vars(value))

    count([layer for part in caches for layer in part.layers])
    return sum(found.values())


class Split:
    """One forward of a model, split among the parts that it passes through, by a reading that only grows.

    A part inside another counts for itself alone (a connector inside the tower), what is in no part as ``prefill``.

    Args:
        read: the reading: seconds, or FLOPs so far.
    """

    def __init__(self, view: ModelView, read: Callable[[], float]) -> None:
        self.read, self.found, self._open = read, dict.fromkeys(FIRST, 0.0), ["prefill"]
        self._places = [(view.tower, "vision"), *((u.module, "connector") for u in view.parts.get("connector", ()))]
        self._model = view.model
        self.visited: set[str] = set()

    def run(self, forward: Run) -> dict[str, float]:
        """What each part took."""
        undo: list[Callable[[], None]] = []
        for module, part in self._places:
            undo.append(module.register_forward_pre_hook(lambda *_, part=part: self._enter(part)).remove)
            undo.append(module.register_forward_hook(lambda *_: self._leave()).remove)
        if (reduction := installed(self._model)) is not None:
            choose = reduction.choose
            reduction.choose = self._counted(choose)
            undo.append(lambda: setattr(reduction, "choose", choose))
        try:
            self._last = self.read()
            forward()
            self._mark()
        finally:
            for step in undo:
                step()
        return self.found

    def _counted(self, choose: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._enter("vision")
            try:
                return choose(*args, **kwargs)
            finally:
                self._leave()

        return counted

    def _mark(self) -> None:
        now = self.read()
        self.found[self._open[-1]] += now - self._last
        self._last = now

    def _enter(self, part: str) -> None:
        self._mark()
        self._open.append(part)
        self.visited.add(part)

    def _leave(self) -> None:
        self._mark()
        self._open.pop()


def _split_flops(view: ModelView, prompt: Run) -> dict[str, int | None]:
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        split = Split(view, counter.get_total_flops)
        found = split.run(prompt)
    return {part: int(flops) if part in (*split.visited, "prefill") else None for part, flops in found.items()}


def _split_milliseconds(view: ModelView, prompt: Run) -> dict[str, float | None]:
    device = view.model.device

    def read() -> float:
        _wait(device)
        return 1000 * time.perf_counter()

    def once() -> tuple[dict[str, float], set[str]]:
        split = Split(view, read)
        return split.run(prompt), split.visited

    runs = _repeated(once)
    found: dict[str, float | None] = {
        part: statistics.median(took[part] for took, _ in runs) if part in (*runs[0][1], "prefill") else None
        for part in FIRST
    }
    return found | {"first_token": statistics.median(sum(took.values()) for took, _ in runs)}


# A figure's run comes from a factory, called anew (and not counted) before each run: a cache serves only once.


def _first_forward(view: ModelView, inputs: dict[str, Any], labels: torch.Tensor | None) -> Run:
    """The forward that ends with the first answer token."""
    given = dict(inputs)
    if view.family.seq2seq:
        rows = next(iter(inputs.values())).shape[0]
        first = torch.zeros(rows, 1, dtype=torch.long) if labels is None else labels[:, :1].clamp(min=0)
        given["decoder_input_ids"] = first.to(view.model.device)
    elif "logits_to_keep" in inspect.signature(type(view.model).forward).parameters:
        given["logits_to_keep"] = 1
    return lambda: view.model(**given, use_cache=True)


def _second_call(view: ModelView, inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]] | None:
    """The second forward of `generate`, one token and the cache: the outermost module that generates, its arguments."""
    from transformers import GenerationMixin

    calls: dict[nn.Module, list[dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:
            calls.setdefault(module, []).append(copy.copy(kwargs) | _own_cache(kwargs))

    generating = [m for m in view.model.modules() if isinstance(m, GenerationMixin)]
    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in generating]
    try:
        view.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    return next(((m, calls[m][1]) for m in generating if len(calls.get(m, ())) > 1), None)


def _step(module: nn.Module, kwargs: dict[str, Any]) -> Callable[[], Run]:
    def ready() -> Run:
        given = kwargs | _own_cache(kwargs)
        return lambda: module(**given)

    return ready


def _own_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the call's cache: whoever runs it writes into it."""
    return {"past_key_values": copy.deepcopy(kwargs["past_key_values"])} if "past_key_values" in kwargs else {}


def _flops(ready: Callable[[], Run] | None) -> int | None:
    if ready is None:
        return None
    run = ready()
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two matrix products: queries [B, H, Q, D] with keys [B, h, K, D], their weights with values [B, h, K, V]."""
    batch, heads, asking, width = query
    return 2 * batch * heads * asking * key[-2] * (width + value[-1])


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # torch leaves it out


def _milliseconds(ready: Callable[[], Run] | None, device: torch.device) -> float | None:
    if ready is None:
        return None

    def once() -> float:
        run = ready()
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        return 1000 * (time.perf_counter() - start)

    return statistics.median(_repeated(once))


def _repeated(once: Callable[[], T]) -> list[T]:
    """What `once` returned in each of the warm runs."""
    found: list[T] = []
    begin = time.perf_counter()
    for number in range(WARM_UPS + RUNS):
        row = once()
        late = time.perf_counter() - begin > PATIENCE
        if number >= WARM_UPS or late:
            found.append(row)
        if len(found) >= FEWEST and late:
            break
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients inside; the counter of FLOPs trips over those that are given to modules."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _images(inputs: Mapping[str, Any]) -> int:
    """Images of a batch, where the processor says how many; one a question otherwise."""
    for name in ("image_grid_thw", "image_sizes"):
        if inputs.get(name) is not None:
            return max(1, len(inputs[name]))
    return len(next(iter(inputs.values())))
