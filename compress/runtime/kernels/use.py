"""Let the linears of a model run in their fastest forms, and tell what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...anatomy import ModelView
from ...base import Json
from ...errors import UsageError, did_you_mean
from ...mapped import only_lets_go
from ..codebook import Codebook
from ..grid import Grid
from .linear import KernelLinear
from .measure import COUNTS, LIMITS, MANY, activations, choose, keep_times, kind, machine, measure, read_times
from .step import Steps, obstacle
from .table import KERNELS, check

MEMORY = ("fast", "small")
FEW = 8  # bits; a form with at most so many runs the integers themselves


@torch.no_grad()
def use_kernels(
    view: ModelView, file: Path | None = None, *, memory: str = "fast", dtype: torch.dtype | None = None
) -> dict[str, Json]:
    """Replace the linears of `view.model` in place; after that it only runs: it cannot be trained, changed or saved.

    Args:
        file: where measured times are kept and found again, by machine; None keeps nothing. memory: ``fast``: each
            linear in the fastest form for few and for many tokens, both kept where the second pays; ``small``: weights
            stay in few bits, even where that takes longer. dtype: of all that is no linear; where not given, the dtype
            that the model is stored in if this machine multiplies in it as fast as in float32, else float32.

    Returns:
        machine, activations, memory, kinds: {kind: {linears, us, forms}}, dropped: {kernel: why it is wrong or missing
        here}, dense: {path of a linear that no chosen form can stand for: why}, stepwise: why greedy answers take no
        traced steps; empty where they do.

    Raises:
        UsageError: no such `memory`.
    """
    if memory not in MEMORY:
        raise UsageError(f"no memory rule '{memory}'", change=did_you_mean(memory, MEMORY))
    device = next(view.model.parameters()).device
    kept = read_times(file)
    here = kept.setdefault(machine(device.type), {})
    stored = _name(view.storage_dtype)
    if dtype is None:
        known = here.setdefault("activations", {})
        if stored not in known:
            known[stored] = _name(activations(view.storage_dtype, device.type))
        dtype = getattr(torch, known[stored])
    table: dict[str, Any] = here.setdefault("linears", {}).setdefault(_name(dtype), {})
    refs = [ref for unit in view.units for ref in unit.linears if type(ref.module) is nn.Linear]
    whole = 2 * sum(p.numel() for p in view.model.parameters())  # bytes, in 16 bits
    kinds: dict[str, dict[str, Any]] = {}
    dense: dict[str, str] = {}
    used: set[str] = set()
    measured = False
    for ref in refs:
        path, linear = ref.path, ref.module
        if not only_lets_go(linear):
            dense[path] = "a pass works on its inputs or outputs"
            continue
        grid = _on(view.grids.get(path), device)
        # detached: the parameter may be tied to another one, whose dtype changes below
        weight = linear.weight.detach().float()
        bias = None if linear.bias is None else linear.bias.detach().float()
        name = kind((weight.shape[0], weight.shape[1]), grid)
        used.add(name)
        if name not in table:
            table[name], measured = measure(weight, bias, grid, dtype, model=whole), True
        us = table[name]["us"]
        if ref.unit.tokens == "image":
            name, us = f"{name}, of pictures", {count: times for count, times in us.items() if int(count) >= MANY}
        forms = choose(us, grid, memory)
        row = kinds.setdefault(name, {"linears": 0, "us": us, "forms": _told(forms, us)})
        row["linears"] += 1
        if [form for _, form in forms] == [_name(dtype)]:
            continue  # as it is
        runs = [(most, KERNELS[form].make(weight, bias, grid)) for most, form in forms]
        wrong = [check(KERNELS[form], run, weight, bias, dtype) for (_, form), (_, run) in zip(forms, runs)]
        if any(wrong):
            dense[path] = next(filter(None, wrong))
            continue
        view.model.set_submodule(path, KernelLinear(linear, runs, [form for _, form in forms]))
        linear.weight = None  # type: ignore[assignment]  # the view still holds the linear
    view.model.to(dtype).requires_grad_(False)
    if measured:
        keep_times(file, kept)
    stepwise = obstacle(view)
    if not stepwise:
        vars(view.model)["generate"] = Steps(view)
    dropped = {form: why for name in used for form, why in table[name]["dropped"].items()}
    return {
        "machine": machine(device.type), "activations": _name(dtype), "memory": memory, "kinds": kinds,
        "dropped": dropped, "dense": dense, "stepwise": stepwise,
    }  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on(grid: Grid | Codebook | None, device: torch.device) -> Grid | None:
    """A grid of integers, there; codes run dequantized."""
    if isinstance(grid, Codebook):
        return None
    if grid is None or device.type == "cpu":
        return grid
    return replace(grid, scale=grid.scale.to(device), zero=None if grid.zero is None else grid.zero.to(device))


def _told(forms: list[tuple[float, str]], us: Mapping[str, Any]) -> dict[str, str]:
    """{tokens: form} of the numbers of tokens in `us`."""
    limits = {str(count): limit for count, limit in zip(COUNTS, LIMITS)}
    return {count: next(f for most, f in forms if limits[count] <= most) for count in us}


# ------------------------------------------------------------------------------------------------------ what is shown


def rows(facts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells: a row for each kind of linear and number of tokens, a column for each kernel, in microseconds.

    The chosen one is marked with ``*``.
    """
    names = [name for name in KERNELS if any(name in us for k in facts["kinds"].values() for us in k["us"].values())]
    cells = []
    for what, k in facts["kinds"].items():
        for count, us in k["us"].items():
            marked = [f"{us[n]:.0f}{' *' if n == k['forms'][count] else '  '}" if n in us else "" for n in names]
            cells.append([what, str(k["linears"]), count, *marked])
    return ["weight", "linears", "tokens", *names], cells


def says(facts: Mapping[str, Any]) -> list[str]:
    """What the table means, in plain words; above all where few bits do not pay on this machine."""
    said = [f"{facts['machine']}; activations in {facts['activations']}; microseconds, * is used."]
    for count in map(str, COUNTS):
        kinds = [k for k in facts["kinds"].values() if count in k["us"]]
        rows = [(k["linears"], k["us"][count], k["forms"][count]) for k in kinds]
        rows = [(n, us, form) for n, us, form in rows if form in us and facts["activations"] in us]
        if not rows:
            continue
        plain = sum(n * us[facts["activations"]] for n, us, _ in rows)
        share = sum(n * us[form] for n, us, form in rows) / plain
        packed = sum(n for n, _, form in rows if KERNELS[form].width(None) <= FEW)
        words = "1 token" if count == "1" else f"{count} tokens"
        said.append(
            f"At {words} the linears take {share:.2f} of the time of dequantized ones."
            if packed
            else f"At {words} few bits do not pay on this machine: the linears run in 16 or 32 bits, "
            f"in {share:.2f} of the time of dequantized ones."
        )
    if facts["stepwise"]:
        said.append(f"All tokens are made by transformers' own loop: {facts['stepwise']}.")
    said += [f"Not used here: {name}: {why}" for name, why in facts["dropped"].items()]
    reasons: dict[str, list[str]] = {}
    for path, why in facts["dense"].items():
        reasons.setdefault(why, []).append(path)
    for why, paths in reasons.items():
        more = f" and {len(paths) - 1} more linears stay as they were" if len(paths) > 1 else " stays as it was"
        said.append(f"{paths[0]}{more}: {why}")
    return said


__all__ = ["MEMORY", "rows", "says", "use_kernels"]
