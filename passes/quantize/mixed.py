"""quantize.mixed: bits for each linear under a budget of bytes, by what rounding it does to the answers; then GPTQ."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import PromiseBroken, Unmet
from ._common import check_data, check_grids, check_inputs, check_linears, check_settings, fitting_group, place
from ._table import NAME, check_table, chosen, importance, selected, stock_note
from .gptq import GPTQ, square

if TYPE_CHECKING:
    import torch

    from ...calib.walk import Walk
    from ...compress.anatomy import LinearRef, ModelView, Table
    from ...compress.runtime.grid import Grid

Batches = Sequence[Mapping[str, Any]]
ROOM = 2 << 30  # bytes of changed weights that are held at a time while their effect is measured
ENOUGH = 0.99  # of the budget: what is left of it below this is explained in the notes


@dataclass(frozen=True)
class Mixed(Pass):
    """Give each linear the bits that its effect on the answers earns, under a budget of bytes, and round it by GPTQ.

    First every selected linear is rounded for a try with each of `choices` (GPTQ without `refine`), from its inputs in
    the model as it is. What the try would do to the answers is the second-order term of the KL divergence at the answer
    tokens, from gradients at three temperatures (calib/curvature.py). A weight rounded on some questions errs two or
    three times as much on others, so that each half of the fit split judges what was rounded on the other half. What a
    linear's choices have in common, its KL for an error of its output, is averaged over them, so that chance decides
    less. A knapsack solver picks the choices with the least sum within the budget, exactly or within 1/50000 of it;
    then quantize.gptq walks the model with them.

    Settings:
        bits: the budget, as the average bits of a weight: all selected weights together take at most the bytes that
            they would take on disk (packed integers, scales, zero points and shapes) with that many bits each in groups
            of `group`. Between 2, 3, 4 and 8 bits it goes in proportion: 3.5 is halfway from 3 to 4.
        budget_mb: the budget in millions of bytes of the same things instead; `bits` then does not count.
        choices: the bits that a linear may get, out of 2, 3, 4 and 8.
        group: input channels that share a scale; -1 is one scale a row. A linear whose width it does not divide takes
            the largest of group/2, group/4, ... from 16 on that does, else one scale a row.
        symmetric: no zero points. Linears with 8 bits are symmetric in any case.
        where: selector of the linears among which the budget is shared. ``embeddings`` is the token embedding, one
            tensor with a head that shares its weight, which ``head`` selects as well; it is rounded to nearest.
        damp: as in quantize.gptq.
        act_order: as in quantize.gptq.
        true_sequential: as in quantize.gptq.
        token_weights: as in quantize.gptq.
        equalize: as in quantize.gptq; before the tries.
        scale_search: as in quantize.gptq.
        refine: as in quantize.gptq.
    """

    name: ClassVar[str] = "quantize.mixed"
    summary: ClassVar[str] = "bits for each linear under a budget of bytes, by their effect on the answers; then GPTQ"
    paper: ClassVar[str] = "HAWQ-V3, arXiv 2011.10680; GPTQ, arXiv 2210.17323"

    bits: float = 4.0
    budget_mb: float | None = None
    choices: tuple[int, ...] = (2, 3, 4, 8)
    group: int = 64
    symmetric: bool = True
    where: tuple[str, ...] | str = ("vision", "connector", "language")
    damp: float = 0.01
    act_order: Literal["static", "none"] = "static"
    true_sequential: bool = True
    token_weights: Literal["gradient", "balanced", "uniform", "text"] = "gradient"
    equalize: bool = True
    scale_search: bool = True
    refine: int = 2

    def __post_init__(self) -> None:
        for bits in self.choices:
            check_settings(bits, self.group, True)
        if not self.choices or list(self.choices) != sorted(set(self.choices)):
            raise ValueError(f"choices are different numbers of bits from small to large, not {list(self.choices)}")
        if self.budget_mb is not None and not 0 < self.budget_mb < math.inf:
            raise ValueError(f"budget_mb is a positive number of megabytes, not {self.budget_mb}")
        if self.budget_mb is None and not self.choices[0] <= self.bits <= self.choices[-1]:
            raise ValueError(f"bits lies from {self.choices[0]} to {self.choices[-1]}, the choices, not {self.bits}")
        self._solver(())

    def _solver(self, where: tuple[str, ...]) -> GPTQ:
        """The pass that rounds; its own bits and group are not asked."""
        return GPTQ(
            group=self.group,
            symmetric=self.symmetric,
            where=where,
            damp=self.damp,
            act_order=self.act_order,
            true_sequential=self.true_sequential,
            token_weights=self.token_weights,
            equalize=False,  # done before the tries
            scale_search=self.scale_search,
            refine=self.refine,
        )

    # ------------------------------------------------------------------------------------------------------- the budget

    def _bytes(self, model: ModelView, path: str, bits: int) -> int:
        """What the weight takes on disk with `bits`."""
        import torch

        from ...compress.runtime.grid import Grid, packed_bytes

        out, width = model.weight(path).shape
        group = fitting_group(width, self.group)
        scale = torch.empty(out, 1 if group == -1 else width // group, dtype=model.storage_dtype, device="meta")
        symmetric = self.symmetric or bits == 8
        return packed_bytes((out, width), Grid(bits, group, symmetric, scale, None if symmetric else scale))

    def _sizes(self, model: ModelView) -> dict[str, list[int]]:
        """Path -> bytes on disk with each of `choices`."""
        where, table = chosen(model, self.where)
        paths = [table.path] if table else []
        paths += [ref.path for ref in selected(model, where)]
        return {path: [self._bytes(model, path, bits) for bits in self.choices] for path in paths}

    def _budget(self, model: ModelView, sizes: dict[str, list[int]]) -> int:
        """Bytes that all selected weights may take together."""
        if self.budget_mb is not None:
            return int(self.budget_mb * 1e6)
        low, high = _around(self.bits)
        less, more = (sum(self._bytes(model, path, bits) for path in sizes) for bits in (low, high))
        return less if low == high else int(less + (more - less) * (self.bits - low) / (high - low))

    def requires(self, model: ModelView, ctx: Context) -> None:
        where, table = chosen(model, self.where)
        check_linears(self, model, selected(model, where))
        if table:
            check_table(self, model, table)
        check_data(self, ctx)
        if not all("labels" in batch for batch in ctx.fit):
            raise Unmet(f"{self.name} needs answers", found="fit samples without labels", change="give answers")
        sizes = self._sizes(model)
        budget, least = self._budget(model, sizes), sum(row[0] for row in sizes.values())
        if budget < least:
            raise Unmet(
                f"{self.name}: the budget is below {self.choices[0]} bits for every selected weight",
                found=f"{budget} bytes, at least {least} are needed",
                change=f"budget_mb: {math.ceil(least / 1e4) / 100}, smaller 'choices', or less in 'where'",
            )
        most = sum(row[-1] for row in sizes.values())
        if most < ENOUGH * budget:
            raise Unmet(
                f"{self.name}: the budget is more than {self.choices[-1]} bits for every selected weight take",
                found=f"{budget} bytes, {most} can be used",
                change=f"budget_mb: {math.floor(most / 1e4) / 100}, larger 'choices', or more in 'where'",
            )

    # --------------------------------------------------------------------------------------------------------- the work

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ...compress.runtime.codebook import integer_grids
        from ._allocate import allocate
        from ._equalize import equalize

        where, table = chosen(model, self.where)
        equalized = equalize(model, selected(model, where)) if self.equalize else 0
        weights = importance(ctx, table, self.token_weights) if table else None
        costs = self._costs(model, ctx, where, table, weights)
        sizes = self._sizes(model)
        budget = self._budget(model, sizes)
        picks = dict(zip(sizes, allocate([costs[path] for path in sizes], list(sizes.values()), budget)))
        bits = {path: self.choices[pick] for path, pick in picks.items()}
        used = sum(sizes[path][pick] for path, pick in picks.items())
        numbers: dict[str, Json] = {
            "bytes": used,
            "budget_bytes": budget,
            "budget_used": used / budget,
            "average_bits": _average(model, bits),
            "linears_by_bits": _by_part(model, bits),
        }
        if used < ENOUGH * budget:
            numbers["budget_left"] = _why_left(self.choices, sizes, picks, budget - used)
        if table:
            weight, grid = self._table_at(model, table, weights, bits[table.path])
            place(model, table, weight, grid)
        if where:
            solver = self._solver(where)
            notes = solver.rounded(model, ctx, lambda ref: (bits[ref.path], self._group(ref)))
            numbers |= notes.numbers | {"linears_equalized": equalized}
        numbers["stock_transformers"] = stock_note(model)
        grids = integer_grids(model.grids)
        kinds = {path: [grids[path].bits, grids[path].group, grids[path].symmetric] for path in bits}
        return Notes(numbers, {"grids": kinds, "budget": budget})

    def _group(self, ref: LinearRef) -> int:
        return fitting_group(ref.module.in_features, self.group)

    def _table_at(
        self, model: ModelView, table: Table, weights: torch.Tensor | None, bits: int
    ) -> tuple[torch.Tensor, Grid]:
        """The embedding on its grid of `bits`, rounded to nearest, and that grid."""
        from ...compress.runtime.grid import dequantize, quantize
        from ._rtn import searched_grid

        weight = table.module.weight.detach().float()
        group = fitting_group(weight.shape[1], self.group)
        grid = searched_grid(weight, weights, bits, group, self.symmetric or bits == 8, model.storage_dtype)
        return dequantize(quantize(weight, grid), grid), grid

    def _costs(
        self, model: ModelView, ctx: Context, where: tuple[str, ...], table: Table | None, weights: torch.Tensor | None
    ) -> dict[str, list[float]]:
        """Path -> what each of `choices` costs, less with more bits; kept in the scratch folder."""
        from ...calib.curvature import curvature
        from ...calib.scratch import fingerprint
        from ...compress.disk import write_json
        from ._allocate import costs_of

        kept = ctx.scratch / "costs.json" if ctx.scratch else None
        data = fingerprint(ctx.fit)
        if kept and kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
            if found["batches"] == data:
                return found["costs"]
        effects: dict[str, torch.Tensor] = {}
        errors: dict[str, list[float]] = {}

        def measure(changes: dict[str, torch.Tensor], batches: Batches) -> None:
            for path, effect in curvature(model, batches, changes, ctx.seed).items():
                effects[path] = effects[path] + effect if path in effects else effect

        for tried_on, judged_on in _halves(ctx.fit):
            changes: dict[str, torch.Tensor] = {}
            for path, change, error in self._tries(model, ctx, tried_on, where, table, weights):
                changes[path] = change
                errors[path] = [sum(both) for both in zip(errors.get(path, [0.0] * len(error)), error)]
                if sum(c.numel() * c.element_size() for c in changes.values()) > ROOM:
                    measure(changes, judged_on)
                    changes = {}
            measure(changes, judged_on)
        costs = costs_of(effects, errors)
        if kept:
            write_json(kept, {"batches": data, "costs": costs})
        return costs

    def _tries(
        self,
        model: ModelView,
        ctx: Context,
        batches: Batches,
        where: tuple[str, ...],
        table: Table | None,
        weights: torch.Tensor | None,
    ) -> Iterator[tuple[str, torch.Tensor, list[float]]]:
        """Of each tensor: its path, what each choice adds to it [choices, out, in], the error of its outputs for each.

        The model stays as it is.
        """
        import torch

        from ...calib.stats import Hessian
        from ...calib.walk import Walk
        from ._gptq import Factor, factor_of, gptq

        if table:
            before = table.module.weight.detach().float()
            tried = [self._table_at(model, table, weights, bits)[0] - before for bits in self.choices]
            importance_ = torch.ones(before.shape[1]) if weights is None else weights.float()
            yield table.path, torch.stack(tried), [float((t.square() * importance_.to(t)).sum()) for t in tried]
        if not where:
            return
        known = ctx.walk(where, name="gptq").balance
        walk: Walk = Walk(model, batches, where, name="choices", progress=ctx.progress, balance=known)
        for unit in walk:
            factors: dict[int, Factor] = {}
            for ref, stat in unit.observe(Hessian, token_weights=self.token_weights).items():
                h = square(stat.matrix, ref.module.in_features)
                check_inputs(ref, h)
                if id(stat) not in factors:
                    factors[id(stat)] = factor_of(h, self.damp, self.act_order)
                solve = functools.partial(
                    gptq,
                    ref.module.weight,
                    h,
                    group=self._group(ref),
                    dtype=model.storage_dtype,
                    act_order=self.act_order,
                    scale_search=self.scale_search,
                    factor=factors[id(stat)],
                    mask=model.promised_zeros(ref.path),
                )
                solved = [solve(bits=bits, symmetric=self.symmetric or bits == 8) for bits in self.choices]
                before = ref.module.weight.detach().float()
                yield ref.path, torch.stack([s.weight - before for s in solved]), [s.error for s in solved]

    # ------------------------------------------------------------------------------------------------------ the promise

    def ensures(self, model: ModelView) -> None:
        record = model.ledger.record_of(self)
        used = 0
        for path, (bits, group, symmetric) in record["grids"].items():
            check_grids(self, model, [path], bits, group, symmetric)
            used += self._bytes(model, path, bits)
        if used > record["budget"]:
            raise PromiseBroken(f"{self.name} promised at most {record['budget']} bytes", found=f"{used} bytes")

    def weaker(self) -> Self | None:
        """Half a bit more on average; a budget in megabytes stays what it is."""
        if self.budget_mb is not None or self.bits >= self.choices[-1]:
            return None
        return replace(self, bits=min(self.bits + 0.5, float(self.choices[-1])))


def _halves(batches: Batches) -> list[tuple[Batches, Batches]]:
    """What to round on and what to judge on, and the other way round; a single batch has to do for both."""
    if len(batches) < 2:
        return [(batches, batches)]
    return [(batches[::2], batches[1::2]), (batches[1::2], batches[::2])]


def _around(bits: float) -> tuple[int, int]:
    """The numbers of bits that a uniform model can have below and above `bits`."""
    return max(b for b in (2, 3, 4, 8) if b <= bits), min(b for b in (2, 3, 4, 8) if b >= bits)


def _average(model: ModelView, bits: dict[str, int]) -> float:
    """Bits of an integer, over all weights."""
    counts = {path: model.weight(path).numel() for path in bits}
    return sum(counts[path] * b for path, b in bits.items()) / sum(counts.values())


def _by_part(model: ModelView, bits: dict[str, int]) -> dict[str, Json]:
    """Part -> bits -> number of tensors."""
    table = model.table.path
    parts = {path: NAME if path == table else model.linear(path).unit.part for path in bits}
    return {
        part: {str(b): n for b, n in sorted(Counter(bits[p] for p in bits if parts[p] == part).items())}
        for part in dict.fromkeys(parts.values())
    }


def _why_left(choices: tuple[int, ...], sizes: dict[str, list[int]], picks: dict[str, int], left: int) -> str:
    """A sentence: the next step that would have used the budget, and why it was not taken."""
    steps = {path: sizes[path][pick + 1] - sizes[path][pick] for path, pick in picks.items() if pick + 1 < len(choices)}
    if not steps:
        return f"{left} bytes are left: every weight has {choices[-1]} bits"
    path = min(steps, key=lambda p: steps[p])
    more = (
        f"the smallest step, {path} from {choices[picks[path]]} to {choices[picks[path] + 1]} bits, takes {steps[path]}"
    )
    return f"{left} bytes are left: {more}"
