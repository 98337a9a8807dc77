"""`svlm bench`: a compressed model against its original on this machine, interleaved, medians."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..calib.ask import example_prompt
from ..compress import storage
from ..compress.anatomy import ModelView
from ..compress.base import Json
from ..compress.errors import WorkFailed
from ..compress.pipeline import PeakMemory

PHASES = ("vision", "prefill", "first_token", "decode_per_token", "end_to_end")
NOISY = 1.3  # wall time above this multiple of CPU time: other work holds the processor, so CPU time is compared
EQUAL = 0.97  # a ratio above this is no gain
WARM = 4  # tokens of the answer before the one that is timed; enough for the torch runtime to trace a step


@dataclass
class Contestant:
    """A model ready to be timed. `view` holds the modules that it runs, `generate` answers."""

    name: str
    view: ModelView
    generate: Callable[..., Any]
    inputs: Mapping[str, torch.Tensor]


def bench(
    out: str | Path,
    against: str | Path,
    *,
    runtime: str = "torch",
    threads: int | None = None,
    tokens: int = 32,
    rounds: int = 5,
) -> dict[str, Json]:
    """Time `out` in `runtime` against the original in eager transformers at its own dtype.

    Args:
        threads: of torch and openvino alike. tokens: of an answer. rounds: A B A B ..., medians over them.

    Returns:
        models: {out, against}, each with ms and cpu_ms by phase, peak_rss_bytes (of a fresh process that loads it and
        answers once) and bytes on disk; ratio: out / against by phase, by `clock`; says: plain sentences.
    """
    if threads:
        torch.set_num_threads(threads)
    small, original = _contestant("out", out, runtime, threads), _contestant("against", against, None, threads)
    timed = interleaved([original, small], tokens, rounds)
    rows = {
        "out": timed["out"] | {"bytes": weight_bytes(out), "peak_rss_bytes": peak_memory(out, runtime, threads)},
        "against": timed["against"]
        | {"bytes": weight_bytes(against), "peak_rss_bytes": peak_memory(against, None, threads)},
    }
    return {"runtime": runtime, "threads": torch.get_num_threads(), "tokens": tokens, "rounds": rounds} | compare(rows)


def _contestant(name: str, spec: str | Path, runtime: str | None, threads: int | None) -> Contestant:
    """A model in a runtime; without one in eager transformers, in the dtype that it is stored in."""
    from .api import kernels, load, load_view

    if runtime == "openvino":
        model = load(spec, runtime=runtime, threads=threads)
        return Contestant(name, model.view, model.generate, example_prompt(model.view))
    view = load_view(spec)
    inputs = example_prompt(view)
    if runtime == "torch":
        kernels(view, spec)
    else:
        view.model.to(view.storage_dtype)
    dtype = view.model.dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return Contestant(name, view, view.model.generate, inputs)


def kernel_table(out: str | Path, *, threads: int | None = None, memory: str = "fast") -> dict[str, Json]:
    """What the torch runtime found on this machine for the linears of `out` (see `use_kernels`), and sentences."""
    from ..compress.runtime.kernels.use import says
    from .api import kernels, load_view

    if threads:
        torch.set_num_threads(threads)
    facts = kernels(load_view(out), out, memory=memory)
    return facts | {"says": says(facts)}


def interleaved(contestants: list[Contestant], tokens: int, rounds: int) -> dict[str, dict[str, Json]]:
    """Medians in milliseconds, wall and CPU, of every phase: {name: {"ms": {...}, "cpu_ms": {...}}}."""
    kept: dict[str, list[dict[str, tuple[float, float]]]] = {c.name: [] for c in contestants}
    with torch.no_grad():
        for number in range(rounds + 1):
            for c in contestants:
                row = one_round(c, tokens if number else WARM)
                if number:  # the first warms up
                    kept[c.name].append(row)
    return {name: medians(rows) for name, rows in kept.items()}


def medians(rows: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Over rounds: {"ms": {phase: wall}, "cpu_ms": {phase: CPU}}."""
    return {
        clock: {phase: statistics.median(row[phase][i] for row in rows) for phase in PHASES}
        for i, clock in enumerate(("ms", "cpu_ms"))
    }


@torch.no_grad()
def one_round(c: Contestant, tokens: int) -> dict[str, tuple[float, float]]:
    """(wall, CPU) milliseconds by phase of one answer of `tokens`: clocks at the tower and after the first logits.

    A short answer goes before it: what another model has left in the processor's caches is no part of this one's time.
    """
    tower: list[tuple[float, float]] = []
    logits: list[tuple[float, float]] = []
    head = c.view.model.get_output_embeddings()
    hooks = [
        c.view.tower.register_forward_pre_hook(lambda *_: tower.append(_now())),
        c.view.tower.register_forward_hook(lambda *_: tower.append(_now())),
        (c.view.decoder if head is None else head).register_forward_hook(lambda *_: logits.append(_now())),
    ]
    asked = {**c.inputs, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}  # an answer that never ends early
    try:
        c.generate(**asked, max_new_tokens=min(WARM, tokens))
        tower.clear()
        logits.clear()
        start = _now()
        c.generate(**asked, max_new_tokens=tokens)
        end = _now()
    finally:
        for hook in hooks:
            hook.remove()
    spans = [_since(a, b) for a, b in zip(tower[::2], tower[1::2])]
    vision = (sum(wall for wall, _ in spans), sum(cpu for _, cpu in spans))
    return phases(vision, _since(start, logits[0]), _since(start, end), tokens)


def phases(
    vision: tuple[float, float], first: tuple[float, float], whole: tuple[float, float], tokens: int
) -> dict[str, tuple[float, float]]:
    """(wall, CPU) milliseconds by phase, of the tower, all until the first logits, and a whole answer of `tokens`.

    Connector and choices among visual tokens are in `prefill` here; `calib.cost` has them apart.
    """
    pairs = list(zip(vision, first, whole))
    return {
        "vision": vision,
        "prefill": tuple(max(f - v, 0.0) for v, f, _ in pairs),  # type: ignore[dict-item]
        "first_token": first,
        "decode_per_token": tuple(max(w - f, 0.0) / (tokens - 1) if tokens > 1 else 0.0 for _, f, w in pairs),  # type: ignore[dict-item]
        "end_to_end": whole,
    }


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return 1000 * (end[0] - start[0]), 1000 * (end[1] - start[1])


def compare(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Json]:
    """The rows with ratios out / against, the clock that was compared, and sentences."""
    noisy = any(row["ms"]["end_to_end"] > NOISY * row["cpu_ms"]["end_to_end"] for row in rows.values())
    clock = "cpu_ms" if noisy else "ms"
    small, original = rows["out"], rows["against"]
    ratio = {p: small[clock][p] / original[clock][p] if original[clock][p] else None for p in PHASES}
    ratio["bytes"] = small["bytes"] / original["bytes"] if original["bytes"] else None
    ratio["peak_rss"] = small["peak_rss_bytes"] / original["peak_rss_bytes"] if original["peak_rss_bytes"] else None
    return {"models": dict(rows), "clock": clock, "ratio": ratio, "says": sentences(ratio, noisy)}


def sentences(ratio: Mapping[str, float | None], noisy: bool) -> list[str]:
    """What the ratios mean, in plain words; above all where compression does not pay on this machine."""
    said = []
    words = {
        "vision": "the vision tower",
        "prefill": "reading the prompt",
        "first_token": "the time to the first token",
        "decode_per_token": "each further token",
        "end_to_end": "a whole answer",
    }
    for phase, what in words.items():
        value = ratio[phase]
        if value is None:
            continue
        if value > 1 / EQUAL:
            said.append(f"Compression does not pay for {what} on this machine: {value:.2f} times the original's time.")
        elif value > EQUAL:
            said.append(f"Compression makes no difference for {what} on this machine.")
        else:
            said.append(f"{what.capitalize()} is {1 / value:.2f} times faster than the original.")
    memory = ratio.get("peak_rss")
    if memory is not None and memory > 1 / EQUAL:
        said.append(f"Loading and answering takes more memory than the original: {memory:.2f} times its peak.")
    if noisy:
        said.append("Other work held the processor, so CPU time is compared instead of wall time.")
    return said


def weight_bytes(spec: str | Path) -> int:
    """Bytes of the weight files of a local model; 0 where it is not local."""
    folder = Path(storage.resolve(spec))
    return storage.weight_bytes(folder) if folder.is_dir() else 0


def peak_memory(spec: str | Path, runtime: str | None, threads: int | None) -> int:
    """Peak resident bytes of a fresh process that loads the model and answers one question.

    Raises:
        WorkFailed: the process ends with an error.
    """
    code = f"from {__name__} import _answer_once; _answer_once({str(spec)!r}, {runtime!r}, {threads!r})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise WorkFailed("measuring memory in a fresh process failed", where=str(spec), found=last[0])
    return int(done.stdout.split()[-1])


def _answer_once(spec: str, runtime: str | None, threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
    with PeakMemory() as memory:  # the kernel's own maximum would count the process that started this one
        c = _contestant("", spec, runtime, threads)
        c.generate(**c.inputs, max_new_tokens=8, do_sample=False)
    print(memory.peak)


def lines(made: Mapping[str, Any]) -> list[str]:
    """The result as lines of text."""
    out, against = made["models"]["out"], made["models"]["against"]
    said = [f"{'':18}{'original':>12}{'compressed':>12}{'ratio':>8}   ({made['clock']}, {made['runtime']})"]
    for phase in PHASES:
        a, b, ratio = against[made["clock"]][phase], out[made["clock"]][phase], made["ratio"][phase]
        said.append(f"{phase:18}{a:12.2f}{b:12.2f}{'' if ratio is None else f'{ratio:8.2f}'}")
    for name in ("bytes", "peak_rss_bytes"):
        said.append(f"{name:18}{against[name] / 1e6:9.1f} MB{out[name] / 1e6:9.1f} MB")
    return [*said, *made["says"]]
