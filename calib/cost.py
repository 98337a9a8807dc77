"""What a model costs: parameters, bytes, visual tokens, FLOPs, milliseconds, memory."""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..compress.anatomy import ModelView
from ..compress.base import Json, evaluating
from ..compress.inspect import part_sizes
from ..compress.pipeline import PeakMemory
from ..compress.runtime.kv_cache import PackedLayer

RUNS, FEWEST, WARM_UPS = 11, 3, 2
PATIENCE = 10.0  # seconds after which a figure makes do with FEWEST runs
Run = Callable[[], Any]


def cost(
    view: ModelView, batch: Mapping[str, torch.Tensor], *, bytes_on_disk: int | None = None, latency: bool = True
) -> dict[str, Json]:
    """report.json's `cost` of one question about one picture.

    `vision` is the tower alone; `prefill` is all the rest of the first forward (connector, language model, head);
    `decode` is one more token with the cache of the first, as `generate` calls for it. FLOPs count matrix products,
    convolutions and attention, a multiply-add as two. Milliseconds are medians of eleven warm runs (of fewer, at least
    three, where these take more than ten seconds).

    Args:
        batch: one encoded sample. bytes_on_disk: of the weight files; estimated from the tensors where not given.
        latency: whether to time the model; the values are None otherwise.

    Returns:
        parameters (a shared one once), bytes, parameters_by_part, bytes_by_part, visual_tokens (an image, as many as
        the language model works on), flops {vision, prefill, decode}, latency_ms {vision, prefill, decode_per_token},
        kv_bytes (of the cache after the question, as `generate` holds it), peak_rss_bytes (of the process during these
        runs). None where the model never calls its tower or decodes without a second forward, so that there is nothing
        to measure.
    """
    inputs = {k: v.to(view.model.device) for k, v in batch.items()}
    labels = inputs.pop("labels", None)
    sizes = part_sizes(view)
    with PeakMemory() as memory, evaluating(view.model), _frozen(view.model):
        prompt = _first_forward(view, inputs, labels)
        second = _second_call(view, inputs)
        runs = {"vision": _tower_run(view, prompt), "prefill": lambda: prompt, "decode_per_token": _step(second)}
        flops = {name: _flops(run) for name, run in runs.items()}
        timed: dict[str, Any] = dict.fromkeys(runs)
        if latency:
            timed = {name: _milliseconds(run, view.model.device) for name, run in runs.items()}
        visual = sum(view.visual_tokens(inputs)) / _images(inputs)
    for figures in (flops, timed):
        if figures["prefill"] is not None and figures["vision"] is not None:
            figures["prefill"] = max(figures["prefill"] - figures["vision"], 0)
    return {
        "parameters": sum(p.numel() for p in view.model.parameters()),
        "bytes": sum(stored for _, stored in sizes.values()) if bytes_on_disk is None else bytes_on_disk,
        "bytes_by_part": {part: stored for part, (_, stored) in sizes.items()},
        "parameters_by_part": {part: count for part, (count, _) in sizes.items()},
        "visual_tokens": int(visual) if visual == int(visual) else visual,
        "flops": {"vision": flops["vision"], "prefill": flops["prefill"], "decode": flops["decode_per_token"]},
        "latency_ms": timed,
        "kv_bytes": _cache_bytes(second[1].get("past_key_values")) if second else None,
        "peak_rss_bytes": memory.peak,
    }


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


def _tower_run(view: ModelView, prompt: Run) -> Callable[[], Run] | None:
    """The tower's forward with the arguments that the model's own forward gives it."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = view.tower.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        prompt()
    finally:
        handle.remove()
    if not calls:
        return None
    return lambda: lambda: [view.tower(*args, **kwargs) for args, kwargs in calls]


def _second_call(view: ModelView, inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]] | None:
    """The second forward of `generate`: one token and the cache. The outermost module that generates, its arguments."""
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
    for module in generating:
        if len(calls.get(module, ())) > 1:
            return module, calls[module][1]
    return None


def _step(call: tuple[nn.Module, dict[str, Any]] | None) -> Callable[[], Run] | None:
    if call is None:
        return None
    module, kwargs = call

    def ready() -> Run:
        given = kwargs | _own_cache(kwargs)
        return lambda: module(**given)

    return ready


def _cache_bytes(cache: Any) -> int | None:
    """Bytes of all keys and values that a transformers cache holds; None where there is no cache."""
    from transformers import EncoderDecoderCache

    if cache is None:
        return None
    if isinstance(cache, EncoderDecoderCache):
        return (_cache_bytes(cache.self_attention_cache) or 0) + (_cache_bytes(cache.cross_attention_cache) or 0)
    held = 0
    for layer in cache.layers:
        if isinstance(layer, PackedLayer):
            held += layer.bytes
        elif layer.is_initialized:
            held += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    return held


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
    times: list[float] = []
    begin = time.perf_counter()
    for number in range(WARM_UPS + RUNS):
        run = ready()
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        end = time.perf_counter()
        if number >= WARM_UPS or end - begin > PATIENCE:
            times.append(end - start)
        if len(times) >= FEWEST and end - begin > PATIENCE:
            break
    return 1000 * statistics.median(times)


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
