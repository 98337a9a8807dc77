"""Which form is the fastest here: measured once for every shape and grid, kept in a file, read again."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import __version__
from ...disk import write_json
from ...errors import SvlmError
from ..grid import Grid
from .table import KERNELS, Run, check

COUNTS = (1, 8, 64, 512)  # tokens at which forms are timed
LIMITS = (2, 22, 181, float("inf"))  # what each time stands for: numbers of tokens nearer to it than to the others
MANY = 64  # tokens: as many and more come to a tower or connector at once, a picture's
COLD = 8  # up to so many tokens, a step of an answer waits for weights: from where all others of the model leave them
SWEPT = 48 << 20  # bytes; where a model has more, so much of it is read before such a call
ROUNDS = 7  # interleaved; a form that took twice the best's time in two gets no third one
LONGEST = 1.0  # seconds; what must take longer, going by fewer tokens, is not timed
SLOW = 0.02  # seconds; where the best takes longer, three rounds are enough
WORTH = 0.95  # a further or heavier form of a linear has to take at most this share of the other's time

Times = dict[str, dict[str, float]]  # tokens -> kernel -> microseconds


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: str) -> str:
    """What measured times hold for."""
    processor = f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else processor
    return f"{name}, torch {torch.__version__}, svlm {__version__}"


def kind(shape: tuple[int, int], grid: Grid | None) -> str:
    """The row of the table that a linear [out, in] belongs to: ``1536x576 4 bits g64``."""
    if grid is None:
        return f"{shape[0]}x{shape[1]} floats"
    group = "row" if grid.scale.shape[1] == 1 else f"g{shape[1] // grid.scale.shape[1]}"
    return f"{shape[0]}x{shape[1]} {grid.bits} bits {group}{'' if grid.zero is None else ' zeros'}"


def activations(stored: torch.dtype, device: str) -> torch.dtype:
    """`stored` where a dense product of many tokens in it is no slower than in float32, else float32."""
    if stored is torch.float32:
        return stored
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 768, generator=g).to(device) for n in (512, 768))
    pairs = {dtype: (x.to(dtype), w.to(dtype)) for dtype in (torch.float32, stored)}
    took: dict[torch.dtype, list[float]] = {dtype: [] for dtype in pairs}
    for _ in range(ROUNDS):
        for dtype, (a, b) in pairs.items():
            took[dtype].append(_seconds(lambda y: F.linear(y, b), a))  # noqa: B023
    wide, narrow = (min(took[dtype]) for dtype in (torch.float32, stored))
    return stored if narrow <= wide else torch.float32


@torch.no_grad()
def measure(
    weight: Tensor, bias: Tensor | None, grid: Grid | None, dtype: torch.dtype, *, model: int
) -> dict[str, Any]:
    """Time all forms of a linear.

    Args:
        weight: [out, in] float32, dequantized. dtype: of the inputs. model: bytes of the whole model, which a step
            reads between two calls of a linear: what lies in a cache then depends on them.

    Returns:
        us: {tokens: {kernel: least microseconds of several calls: what disturbs one only adds}}.
        dropped: {kernel: why it is not used here}.
    """
    device = weight.device.type
    forms: dict[str, tuple[Run, Run]] = {}
    dropped: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        if not kernel.fits(tuple(weight.shape), grid, device):  # type: ignore[arg-type]
            continue
        try:
            run = kernel.make(weight, bias, grid)
            wrong = check(kernel, run, weight, bias, dtype)
        except (RuntimeError, NotImplementedError, AttributeError) as error:  # this build or processor lacks it
            wrong = str(error).strip().splitlines()[0][:200]
        if wrong:
            dropped[name] = wrong
        else:
            forms[name] = run, kernel.make(weight.clone(), bias, grid)
    times: Times = {}
    g = torch.Generator().manual_seed(0)
    for count in COUNTS:
        before = times.get(str(count // 8), {})
        times[str(count)] = _race(
            {n: f for n, f in forms.items() if 8 * before.get(n, 0.0) <= 1e6 * LONGEST},
            torch.randn(count, weight.shape[1], generator=g).to(weight.device, dtype),
            torch.ones(min(model, SWEPT) // 4, device=weight.device) if count <= COLD else None,
        )
    return {"us": times, "dropped": dropped}


def _race(forms: dict[str, tuple[Run, Run]], x: Tensor, sweep: Tensor | None) -> dict[str, float]:
    """Least microseconds of each form. After a sweep its twin runs first: other weights were read, code is warm."""
    took: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(ROUNDS):
        best = min((min(t) for t in took.values() if t), default=0.0)
        for name, (run, twin) in forms.items():
            if number > 1 and (min(took[name]) > 2 * best or (number > 2 and best > SLOW)):
                continue
            if sweep is not None:
                sweep.sum()
                twin(x)
            took[name].append(_seconds(run, x))
    return {name: round(1e6 * min(t), 1) for name, t in took.items()}


def _seconds(run: Run, x: Tensor) -> float:
    """Of one call: CPU time where one thread computes, which others on the machine do not disturb, else wall time."""
    clock = time.process_time if x.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if x.is_cuda:
        torch.cuda.synchronize()
    start = clock()
    run(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def choose(times: Times, grid: Grid | None, memory: str) -> list[tuple[float, str]]:
    """The forms of a linear: [(most tokens, kernel)], by rising number of tokens.

    Args:
        times: at the numbers of `COUNTS` that matter; those above the least of them may be missing.
        memory: ``fast``: the fastest at every number of tokens. ``small``: the fastest of those that keep integers (or
            16 bits, where the linear is on no grid).
    """
    names = set().union(*times.values())
    if memory == "small":
        least = min(KERNELS[name].width(grid) for name in names)
        most = 16 if least > 8 else 8
        names = {name for name in names if KERNELS[name].width(grid) <= most}
    plan: list[tuple[float, str]] = []
    least = min(map(int, times))
    for count, limit in reversed([pair for pair in zip(COUNTS, LIMITS) if pair[0] >= least]):
        row = {name: us for name, us in times[str(count)].items() if name in names}
        if not row and not plan:
            continue  # too long to be timed: the next smaller number decides
        best = min(row, key=row.__getitem__) if row else plan[0][1]
        near = [name for name in row if WORTH * row[name] <= row[best]] or [best]
        kept = [name for _, name in plan if name in near]
        name = kept[0] if kept else min(near, key=lambda n: KERNELS[n].width(grid))
        if plan and plan[0][1] == name:
            continue
        plan.insert(0, (limit if plan else float("inf"), name))
    return plan


# ------------------------------------------------------------------------------------------------------- kept on disk


def read_times(file: Path | None) -> dict[str, Any]:
    """{machine: {"activations": {stored: dtype}, "linears": {dtype: {kind: what `measure` returns}}}}; empty where
    nothing usable is kept."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def keep_times(file: Path | None, times: Mapping[str, Any]) -> bool:
    """Write the file whole; False where that is not allowed, which costs measuring again and nothing else."""
    if file is None:
        return False
    try:
        write_json(file, dict(times))
    except (OSError, SvlmError):
        return False
    return True
