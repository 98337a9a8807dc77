"""quantize.gptq: GPTQ over vision tower, connector and language model, block after block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ._common import (
    check_data,
    check_grids,
    check_inputs,
    check_linears,
    check_pairs,
    check_settings,
    fitting_group,
    group_notes,
    milder,
    place,
    visual_share,
)

if TYPE_CHECKING:
    import torch

    from ...compress.anatomy import LinearRef, ModelView


@dataclass(frozen=True)
class GPTQ(Pass):
    """Round weights column by column, each column's error spread over those to come, by second-order statistics.

    Blocks are walked in forward order and each sees what the rounded ones before it produce.

    Settings:
        bits: 2, 3, 4 or 8.
        group: input channels that share a scale; -1 is one scale a row. A linear whose width it does not divide takes
            the largest of group/2, group/4, ... from 16 on that does, else one scale a row; the notes count them.
        symmetric: no zero points.
        where: selector of the linears; vision tower and connector are included by default.
        damp: share of the Hessian's mean diagonal added to its diagonal; raised tenfold until it is positive definite,
            and every raise is counted in the notes.
        act_order: ``static`` takes the columns by falling activation with the groups' scales fixed beforehand, so that
            no group index is needed at run time; ``none`` goes from left to right.
        blocksize: columns between two updates of the rest; changes the speed, not the result.
        true_sequential: inside a block, statistics of a later linear are taken after the earlier ones were rounded
            (q, k, v; then o; then gate, up; then down). False takes all of a block's statistics at once: faster.
        token_weights: how visual and text tokens count in the Hessian: ``gradient`` weighs a visual
            token by MBQ's ratio of gradients, r of its block's attention or MLP, where text weighs 1; ``balanced``
            (half each), ``uniform`` or ``text``. In the vision tower and the connector every token counts the same.
        equalize: before anything else bring the input channels behind each norm, and behind the `up` of a gated MLP, to
            sizes near each other, by scales that move into what writes them: without data, exact but for the rounding
            of the norms' biases, and groups then hold columns that one scale fits.
        scale_search: choose each scale, of either sign, by the least error weighted by what an error in the column
            costs after compensation (1 / U_ii^2), not by the largest weight.
        refine: rounds that follow GPTQ, each new scales by least squares and a sweep over the integers in which every
            one takes its best value for what the others are (as QuantEase and CDQuant); 0 is plain GPTQ.
        asymmetric: share of GPTAQ's term (the paper's alpha is 0.25; 0 leaves it out): inputs of the model as it is
            before the pass are kept beside those of the rounded prefix, and the rounding makes up for the difference.
            Needs a second copy of the model, and the inputs of one stage of a block in memory.
    """

    name: ClassVar[str] = "quantize.gptq"
    summary: ClassVar[str] = "weights to 2, 3, 4 or 8 bits with second-order error compensation, packed on disk"
    paper: ClassVar[str] = (
        "GPTQ, arXiv 2210.17323; QuantEase, arXiv 2309.01885; GPTAQ, arXiv 2504.02692; equalization, arXiv 1906.04721"
    )

    bits: int = 4
    group: int = 64
    symmetric: bool = True
    where: tuple[str, ...] | str = ("vision", "connector", "language")
    damp: float = 0.01
    act_order: Literal["static", "none"] = "static"
    blocksize: int = 128
    true_sequential: bool = True
    token_weights: Literal["gradient", "balanced", "uniform", "text"] = "gradient"
    equalize: bool = True
    scale_search: bool = True
    refine: int = 2
    asymmetric: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group, self.symmetric)
        if not self.damp > 0:
            raise ValueError(f"damp is a positive share, not {self.damp}")
        if self.blocksize < 1:
            raise ValueError(f"blocksize is at least 1, not {self.blocksize}")
        if self.refine < 0:
            raise ValueError(f"refine is a number of rounds, 0 or more, not {self.refine}")
        if not 0 <= self.asymmetric <= 1:
            raise ValueError(f"asymmetric is a share from 0 to 1, not {self.asymmetric}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        check_linears(self, model, model.linears(self.where))
        check_data(self, ctx)
        if self.asymmetric:
            check_pairs(self, model)

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        return self.rounded(model, ctx, lambda ref: (self.bits, fitting_group(ref.module.in_features, self.group)))

    def rounded(self, model: ModelView, ctx: Context, kind: Callable[[LinearRef], tuple[int, int]]) -> Notes:
        """`apply` with bits and group of each linear from `kind`; the record has the groups."""
        import torch

        from ...calib.stats import Hessian
        from ._drift import Drift, Twin
        from ._equalize import equalize
        from ._gptq import factor_of, gptq

        equalized = equalize(model, model.linears(self.where)) if self.equalize else 0
        twin = Twin(model, ctx, self.where) if self.asymmetric else None
        walk = ctx.walk(self.where, name="gptq")
        for unit in walk:
            linears: dict[str, Json] = {}
            if twin:
                twin.follow(unit.name)
            for stage in unit.stages if self.true_sequential else (unit.linears,):
                if twin:
                    before = twin.inputs(stage)
                    stats: dict[LinearRef, Hessian] = {}
                    for same in _by_input(stage):
                        pair = functools.partial(Drift, before[same[0].path])
                        stats |= unit.observe(pair, same, self.token_weights)
                else:
                    stats = unit.observe(Hessian, stage, self.token_weights)
                for same in _by_input(stage):  # they share the Hessian and its factor
                    stat = stats[same[0]]
                    h = square(stat.matrix, same[0].module.in_features)
                    check_inputs(same[0], h)
                    factor = factor_of(h, self.damp, self.act_order)
                    cross = stat.cross if isinstance(stat, Drift) else None
                    for (bits, group), alike in _by_kind(same, kind).items():  # one run over the columns
                        whole = gptq(
                            torch.cat([ref.module.weight for ref in alike]),
                            h,
                            bits=bits,
                            group=group,
                            symmetric=self.symmetric or bits == 8,
                            dtype=model.storage_dtype,
                            act_order=self.act_order,
                            blocksize=self.blocksize,
                            scale_search=self.scale_search,
                            refine=self.refine,
                            factor=factor,
                            drift=None if cross is None or not cross.numel() else self.asymmetric * cross,
                            mask=model.promised_zeros(*(ref.path for ref in alike)),
                        )
                        heights = [len(ref.module.weight) for ref in alike]
                        for ref, solved in zip(alike, whole.split(heights), strict=True):
                            place(model, ref, solved.weight, solved.grid)
                            linears[ref.path] = {
                                "error": solved.error,
                                "relative": solved.relative,
                                "retries": solved.retries,
                                "dead": solved.dead,
                                "fallback": solved.fallback,
                                "tokens": stat.tokens,
                                "group": solved.grid.group,
                                "unpaired": twin is not None and cross is None,
                            }
                unit.settle(stage)
            unit.notes["linears"] = linears
        rows = {path: row for notes in walk.notes.values() for path, row in notes["linears"].items()}
        groups = {path: row["group"] for path, row in rows.items()}
        numbers = _numbers(rows) | group_notes(groups, self.group)
        numbers["linears_equalized"] = equalized
        numbers["visual_token_share"] = visual_share(model, ctx.fit)
        numbers["visual_token_weight"] = walk.weights_used(self.token_weights)
        if twin:
            numbers["linears_without_a_pair"] = sum(row["unpaired"] for row in rows.values())
        return Notes(numbers, {"linears": groups})

    def ensures(self, model: ModelView) -> None:
        check_grids(self, model, model.ledger.record_of(self)["linears"], self.bits, self.group, self.symmetric)

    def weaker(self) -> Self | None:
        return milder(self)


def _by_input(refs: Iterable[LinearRef]) -> list[list[LinearRef]]:
    """The linears that share an input, together."""
    together: dict[int, list[LinearRef]] = {}
    for ref in refs:
        together.setdefault(ref.stage, []).append(ref)
    return list(together.values())


def _by_kind(
    refs: Iterable[LinearRef], kind: Callable[[LinearRef], tuple[int, int]]
) -> dict[tuple[int, int], list[LinearRef]]:
    """The linears that get the same bits and group, together."""
    together: dict[tuple[int, int], list[LinearRef]] = {}
    for ref in refs:
        together.setdefault(kind(ref), []).append(ref)
    return together


def square(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """The Hessian, or zeros where no token ever reached the linear (an expert without visitors)."""
    return matrix if matrix.numel() else matrix.new_zeros(width, width)


def _numbers(rows: dict[str, dict[str, Json]]) -> dict[str, Json]:
    relative = [row["relative"] for row in rows.values()]
    worst = max(rows, key=lambda path: rows[path]["relative"])
    return {
        "linears": len(rows),
        "mean_relative_error": sum(relative) / len(relative),
        "worst_relative_error": rows[worst]["relative"],
        "worst_linear": worst,
        "damp_retries": sum(row["retries"] for row in rows.values()),
        "rounded_to_nearest": sum(row["fallback"] for row in rows.values()),
        "linears_without_tokens": sum(row["tokens"] == 0 for row in rows.values()),
        "dead_columns": sum(row["dead"] for row in rows.values()),
    }
