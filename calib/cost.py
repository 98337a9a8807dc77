"""What a model costs: parameters, bytes, visual tokens, FLOPs, milliseconds, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..compress.anatomy import ModelView
from ..compress.base import Json, evaluating
from ..compress.inspect import part_sizes

RUNS, WARM_UPS = 11, 2


def cost(
    view: ModelView, batch: Mapping[str, torch.Tensor], *, bytes_on_disk: int | None = None, latency: bool = True
) -> dict[str, Json]:
    """report.json's `cost` of one question about one picture.

    `vision` is the tower alone; `prefill` is all the rest of the first forward (connector, language model, head);
    `decode` is one more token with the cache of the first. Milliseconds are medians of warm runs.

    Args:
        batch: one encoded sample. bytes_on_disk: of the weight files; estimated from the tensors where not given.
    """
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    sizes = part_sizes(view)
    with evaluating(view.model):
        prompt, step = _runs(view, inputs, batch)
        tower = _tower_call(view, prompt)
        flops = {"vision": _flops(tower), "prefill": _flops(prompt), "decode": _flops(step)}
        timed: dict[str, Json] = {"vision": None, "prefill": None, "decode_per_token": None}
        if latency:
            vision, whole, token = (_milliseconds(run) for run in (tower, prompt, step))
            timed = {"vision": vision, "prefill": max(whole - vision, 0.0), "decode_per_token": token}
        images = max(1, _images(inputs))
        visual = view.visual_tokens(batch)[0] / images
    return {
        "parameters": sum(p.numel() for p in view.model.parameters()),
        "bytes": sum(stored for _, stored in sizes.values()) if bytes_on_disk is None else bytes_on_disk,
        "bytes_by_part": {part: stored for part, (_, stored) in sizes.items()},
        "parameters_by_part": {part: count for part, (count, _) in sizes.items()},
        "visual_tokens": int(visual) if visual == int(visual) else visual,
        "flops": flops | {"prefill": max(flops["prefill"] - flops["vision"], 0)},
        "latency_ms": timed,
        "peak_rss_bytes": psutil.Process().memory_info().rss,
    }


def _runs(
    view: ModelView, inputs: dict[str, Any], batch: Mapping[str, Any]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The first forward, and one more token with its cache."""
    model = view.model
    if view.family.seq2seq:
        start = torch.full(
            (len(next(iter(inputs.values()))), 1), int(batch["labels"][0, 0]) if "labels" in batch else 0
        )
        inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder_")} | {
            "decoder_input_ids": start.clamp(min=0)
        }

    def prompt() -> Any:
        return model(**inputs, use_cache=True)

    def step() -> Any:
        kept = prompt() if not cache else None
        if kept is not None:
            cache.append(kept)
        first = cache[0]
        past = _copied(first.past_key_values)
        token = first.logits[:, -1:].argmax(-1)
        if view.family.seq2seq:
            states = {"encoder_outputs": (first.encoder_last_hidden_state,)}
            return model(**states, decoder_input_ids=token, past_key_values=past, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(len(token), 1)], 1)
        return model(input_ids=token, attention_mask=mask, past_key_values=past, use_cache=True)

    cache: list[Any] = []
    return prompt, step


def _copied(past: Any) -> Any:
    import copy

    return copy.deepcopy(past)


def _tower_call(view: ModelView, prompt: Callable[[], Any]) -> Callable[[], Any]:
    """The tower's forward with the arguments that the model's own forward gives it."""
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = view.tower.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True
    )
    try:
        prompt()
    finally:
        handle.remove()

    def tower() -> None:
        for args, kwargs in caught:
            view.tower(*args, **kwargs)

    return tower


def _flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _milliseconds(run: Callable[[], Any]) -> float:
    for _ in range(WARM_UPS):
        run()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def _images(inputs: Mapping[str, Any]) -> int:
    grids = inputs.get("image_grid_thw")
    if grids is not None:
        return len(grids)
    sizes = inputs.get("image_sizes")
    return len(sizes) if sizes is not None else 1
