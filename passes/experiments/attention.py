"""`svlm experiment attention`: time and memory of the attention variants of one model, by sequence length, here.

A decoder of the model's config with random weights is run: what is measured is the cost of attention, not what it
understands. Variants are the kernels that transformers and torch offer for it here, and the same model with other
numbers of key-value heads (GQA, arXiv 2305.13245) or a sliding window, where its config can say so.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...calib.cost import cache_bytes
from ...compress.base import Json, Progress, Silent
from ...compress.errors import Unmet
from ...compress.families import Family
from ..bench import NOISY
from . import _figures as figures

SHORTEST, WINDOW, STEPS, ROUNDS = 128, 256, 4, 5
PATIENCE = 4.0  # seconds after which a figure makes do with the rounds it has
KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Variant:
    """One way to attend: its name, transformers' implementation, torch's kernel (None: torch chooses), config edits."""

    name: str
    implementation: str
    kernel: SDPBackend | None = None
    edits: dict[str, Any] = field(default_factory=dict)


def attention(
    model: str | Path,
    folder: Path,
    *,
    longest: int = 2048,
    rows: Sequence[Family] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Json]:
    """Measure every variant at 128, 256, ... up to `longest` tokens; one sequence.

    Returns:
        rows: variant, length, ms and cpu_ms {prefill, decode} (a prompt of so many tokens; one more token after it;
        medians), peak_bytes (the most that tensors held during prefill beside weights), kv_bytes (the cache after it);
        clock: which of the two clocks counts; left_out: variant -> why; says: sentences. Also in `folder`.

    Raises:
        Unmet: the model's language model is no decoder that reads visual tokens in its sequence.
    """
    from ..api import environment, load_view

    told = progress or Silent()
    view = load_view(model, rows=rows, trust_remote_code=trust_remote_code)
    if view.family.seq2seq or view.image_token_id is None:
        raise Unmet(
            "the attention experiment is for decoders that read visual tokens in their sequence",
            where=f"family {view.family.name}",
            found=type(view.decoder).__name__,
            change="take a model of another family",
        )
    kind, config, dtype = type(view.decoder), copy.deepcopy(view.decoder.config), view.storage_dtype
    source = str(view.source)
    del view
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = [SHORTEST]
    while lengths[-1] * 2 <= longest:
        lengths.append(lengths[-1] * 2)
    variants, left_out = variants_of(config)
    found: list[dict[str, Json]] = []
    told.start("attention", len(variants) * len(lengths))
    with torch.no_grad():
        for variant in variants:
            try:
                decoder = build(kind, config, variant, lengths[-1] + STEPS * (ROUNDS + 2), dtype).to(device)
                with _kernel(variant):
                    _measured(decoder, 16, dtype, device, rounds=1)
                    for length in lengths:
                        row = {"variant": variant.name, "length": length}
                        found.append(row | _measured(decoder, length, dtype, device))
                        told.step(note=variant.name)
            except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
                left_out[variant.name] = str(error).strip().splitlines()[0]
    told.done()
    wall, cpu = (sum(row[clock]["prefill"] for row in found) for clock in ("ms", "cpu_ms"))
    clock = "cpu_ms" if device.type == "cpu" and wall > NOISY * cpu else "ms"
    made: dict[str, Json] = {
        "experiment": "attention",
        "model": source,
        "decoder": kind.__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "environment": environment(),
        "clock": clock,
        "rows": found,
        "left_out": left_out,
    }
    made["says"] = sentences(made)
    figures.leave(made, folder, attention=_figure(made))
    return made


def variants_of(config: Any) -> tuple[list[Variant], dict[str, str]]:
    """What can be tried with a decoder of `config`; and what its config cannot express, with why."""
    known = config.to_dict()
    made, left_out = [Variant("eager", "eager")], {}
    made += [Variant(f"sdpa, {name}", "sdpa", kernel) for name, kernel in KERNELS.items()]
    made.append(Variant("flash_attention_2", "flash_attention_2"))
    heads, own = known.get("num_attention_heads"), known.get("num_key_value_heads")
    if heads and own:
        for count in sorted({heads, own, 1}, reverse=True):
            shared = "MHA" if count == heads else "MQA" if count == 1 else "GQA"
            title = f"{shared}, {count} key-value heads" if count > 1 else f"{shared}, 1 key-value head"
            made.append(
                Variant(title + (" (own)" if count == own else ""), "sdpa", None, {"num_key_value_heads": count})
            )
    else:
        left_out["GQA, MQA"] = "the config has no num_key_value_heads"
    if "sliding_window" in known:
        edits: dict[str, Any] = {"sliding_window": WINDOW}
        if known.get("layer_types"):
            edits["layer_types"] = ["sliding_attention"] * len(known["layer_types"])
        made.append(Variant(f"sliding window of {WINDOW}", "sdpa", None, edits))
    else:
        left_out["sliding window"] = "the config has no sliding_window"
    return made, left_out


def build(kind: Any, config: Any, variant: Variant, positions: int, dtype: torch.dtype) -> Any:
    """A decoder with random weights that takes at least so many positions."""
    own = copy.deepcopy(config)
    for key, value in variant.edits.items():
        setattr(own, key, value)
    if "max_position_embeddings" in own.to_dict():
        own.max_position_embeddings = max(own.max_position_embeddings, positions)
    torch.manual_seed(0)
    return kind._from_config(own, attn_implementation=variant.implementation, dtype=dtype).eval()


def _kernel(variant: Variant) -> Any:
    return nullcontext() if variant.kernel is None else sdpa_kernel([variant.kernel])


def _measured(
    decoder: Any, length: int, dtype: torch.dtype, device: torch.device, rounds: int = ROUNDS
) -> dict[str, Json]:
    """One row of the table, without its names."""
    width = decoder.get_input_embeddings().embedding_dim
    prompt, one = (torch.randn(1, n, width, device=device).to(dtype) for n in (length, 1))
    with _peak(decoder, device) as peak:
        cache = decoder(inputs_embeds=prompt, use_cache=True).past_key_values
    held = cache_bytes(cache)
    taken: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    begin = time.perf_counter()
    for _ in range(rounds):
        made: list[Any] = []
        taken["prefill"].append(
            _timed(lambda made=made: made.append(decoder(inputs_embeds=prompt, use_cache=True)), device)  # type: ignore[misc]
        )
        cache = made[0].past_key_values
        steps = [
            _timed(lambda cache=cache: decoder(inputs_embeds=one, past_key_values=cache, use_cache=True), device)  # type: ignore[misc]
            for _ in range(STEPS)
        ]
        taken["decode"] += steps[1:]
        if time.perf_counter() - begin > PATIENCE:
            break
    clocks = {
        clock: {phase: statistics.median(pair[i] for pair in pairs) for phase, pairs in taken.items()}
        for i, clock in enumerate(("ms", "cpu_ms"))
    }
    return clocks | {"peak_bytes": peak[0], "kv_bytes": held}


def _timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Wall and CPU milliseconds."""

    def now() -> tuple[float, float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter(), time.process_time()

    start = now()
    run()
    return tuple(1000 * (b - a) for a, b in zip(start, now()))  # type: ignore[return-value]


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside the `with` held at one time, those of `given` not counted."""

    def __init__(self, given: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._given = {t.untyped_storage()._cdata for t in given}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._live = {key: pair for key, pair in self._live.items() if not pair[0].expired()}
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._given:
                storage = leaf.untyped_storage()
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return made


@contextmanager
def _peak(decoder: Any, device: torch.device) -> Iterator[list[int]]:
    """The most bytes held beside weights: of CUDA's allocator, or of the tensors that are made."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    with Held(iter([*decoder.parameters(), *decoder.buffers()])) as held:
        yield found
    found[0] = held.peak


def sentences(made: dict[str, Any]) -> list[str]:
    """What the figures mean at the greatest length."""
    rows, clock = made["rows"], made["clock"]
    longest = max(row["length"] for row in rows)
    last = {row["variant"]: row for row in rows if row["length"] == longest}
    said = []
    eager = last.get("eager")
    others = {name: row for name, row in last.items() if name.startswith("sdpa")}
    if eager and others:
        name, best = min(others.items(), key=lambda pair: pair[1][clock]["prefill"])
        said.append(
            f"At {longest} tokens {name} reads the prompt in {best[clock]['prefill']:.1f} ms, eager in "
            f"{eager[clock]['prefill']:.1f} ms; tensors beside the weights take {best['peak_bytes'] / 1e6:.1f} MB, in "
            f"eager {eager['peak_bytes'] / 1e6:.1f} MB."
        )
    shared = {name: row for name, row in last.items() if "key-value" in name}
    if shared:
        said.append(
            "Cache at that length: "
            + ", ".join(f"{n}: {row['kv_bytes'] / 1e6:.2f} MB" for n, row in shared.items())
            + "."
        )
    said.append(
        "Weights are random: this is what attention costs, not what is lost. svlm has no pass yet that simplifies "
        "attention; variants with other heads or a window would have to be trained."
    )
    said += [f"Not here: {name} ({why})." for name, why in made["left_out"].items()]
    if clock == "cpu_ms":
        said.append("Other work held the processor, so CPU time is given instead of wall time.")
    return said


def table(made: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells: a variant a row, the greatest length, and how time grows from half of it."""
    lengths = sorted({row["length"] for row in made["rows"]})
    by_key = {(row["variant"], row["length"]): row for row in made["rows"]}
    cells = []
    for name in dict.fromkeys(row["variant"] for row in made["rows"]):
        prefill = [f"{by_key[name, n][made['clock']]['prefill']:.1f}" if (name, n) in by_key else "–" for n in lengths]
        last = by_key.get((name, lengths[-1]))
        more = ["–"] * 3
        if last:
            more = [
                f"{last[made['clock']]['decode']:.2f}",
                *(f"{last[k] / 1e6:.2f}" for k in ("peak_bytes", "kv_bytes")),
            ]
        cells.append([name, *prefill, *more])
    return ["variant", *(f"ms at {n}" for n in lengths), "ms a token", "peak MB", "cache MB"], cells


def _figure(made: dict[str, Any]) -> Any:
    """Kernels above, numbers of heads and windows below."""
    figure, panels = figures.empty(2, 3, 9.5, 5.6)
    names = list(dict.fromkeys(row["variant"] for row in made["rows"]))
    kernels = [name for name in names if name.startswith(("eager", "sdpa", "flash"))]
    prefill = ("reading the prompt, ms", lambda row: row[made["clock"]]["prefill"])
    decode = ("one more token, ms", lambda row: row[made["clock"]]["decode"])
    memory = ("tensors beside weights, MB", lambda row: row["peak_bytes"] / 1e6)
    cache = ("cache, MB", lambda row: row["kv_bytes"] / 1e6)
    ticks = sorted({row["length"] for row in made["rows"]})
    others = [name for name in names if name not in kernels]
    for line, (shown, wanted) in enumerate(((kernels, (prefill, decode, memory)), (others, (prefill, decode, cache)))):
        for axes, (title, value) in zip(panels[3 * line :], wanted):
            for number, name in enumerate(shown):
                rows = [row for row in made["rows"] if row["variant"] == name]
                figures.curve(axes, number, [row["length"] for row in rows], [value(row) for row in rows], name)
            figures.doubling(axes, ticks)
            if title == decode[0]:
                axes.set_ylim(bottom=0)
            else:
                figures.by_ratio(axes)
            figures.titled(axes, title, x="tokens" if line else "")
        figures.legend(panels[3 * line])
    return figure
