"""Weights and activations in 8 bits, block after block: smooth, choose ranges, round. What two passes share."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from ...calib.replay import patched
from ...calib.stats import AbsMax, Extremes, Histogram, TokenWeights
from ...calib.walk import Walk, WalkUnit
from ...compress.anatomy import LinearRef, ModelView
from ...compress.base import Json, Notes, Pass
from ...compress.errors import PromiseBroken
from ...compress.runtime.activations import Activation, install
from ...compress.runtime.grid import dequantize, quantize
from ._awq import output_loss
from ._common import check_grids, check_inputs, place, visual_share
from ._fold import Pair, fold, joined, pairs_of
from ._range import Spread, best_activation, squared_error, tensor_activation
from ._rtn import absmax_grid
from ._smooth import ALPHAS, joint_maxima, smoothing_scale
from .awq import _first

Alpha = float | Literal["search", "none"]


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is asked for: see the settings of quantize.smooth."""

    kind: Literal["token", "tensor"]
    range: Literal["mse", "max"]
    alpha: Alpha
    token_weights: TokenWeights


def eight_bits(model: ModelView, walk: Walk, wish: Wish) -> Notes:
    """Smooth and round every linear of the walk; a block sees what the rounded ones before it return."""
    for unit in walk:
        unit.notes["pairs"] = _smooth(model, walk, unit, wish) if wish.alpha != "none" else []
        unit.notes["linears"] = _round(model, unit, wish)
    pairs = [row for notes in walk.notes.values() for row in notes["pairs"]]
    rows = {path: row for notes in walk.notes.values() for path, row in notes["linears"].items()}
    rounded = {path: row for path, row in rows.items() if row["activation"] is not None}
    numbers = _numbers(pairs, rows, rounded, wish) | {"visual_token_share": visual_share(model, walk.batches)}
    numbers["visual_token_weight"] = walk.weights_used(wish.token_weights)
    return Notes(numbers, {"activations": {path: row["activation"] for path, row in rounded.items()}})


def check_activations(step: Pass, model: ModelView, activations: Mapping[str, Mapping[str, Json]]) -> None:
    """The promise: these linears round their inputs as recorded, and their weights lie on 8-bit grids, one a row."""
    check_grids(step, model, list(activations), 8, -1, True)
    now = model.activations
    for path, values in activations.items():
        if now.get(path) != Activation(**values):
            raise PromiseBroken(f"{step.name} promised inputs of 8 bits", where=path, found=str(now.get(path)))


def install_all(model: ModelView, activations: Mapping[str, Mapping[str, Json]]) -> None:
    """What `rebuild` does: let the linears round their inputs again."""
    for path, values in activations.items():
        install(model.linear(path).module, Activation(**values))


# ----------------------------------------------------------------------------------------------------------- smoothing


def _smooth(model: ModelView, walk: Walk, unit: WalkUnit, wish: Wish) -> list[dict[str, Json]]:
    """Fold a scale into each pair of the unit; what became of each."""
    rows: list[dict[str, Json]] = []
    free: list[Pair] = []
    for pair in pairs_of(model, unit.unit, unit.linears):
        if pair.obstacle is None:
            free.append(pair)
        else:
            rows.append({"source": pair.source, "skipped": pair.obstacle})
    if not free:
        return rows
    leads = [pair.targets[0] for pair in free]
    maxima = _maxima(walk, unit, leads, wish.token_weights)
    extremes = unit.observe(Extremes, leads, "uniform") if wish.kind == "tensor" else {}
    wanted = [_first(out) for out in unit.outputs()] if wish.alpha == "search" else []
    for pair in free:
        row: dict[str, Json] = {"source": pair.source, "skipped": None}
        x_max, w_max = maxima[pair.targets[0]], joined(pair.targets).abs().amax(0)
        if not x_max.numel() or not x_max.isfinite().all() or not x_max.any():
            row["skipped"] = "no token with finite values reaches it"
        elif wish.alpha == "search":
            trials = {alpha: smoothing_scale(x_max, w_max, alpha) for alpha in ALPHAS}
            trials = {0.0: torch.ones_like(x_max), **trials}
            rounding = _trial_rounding(model, wish, extremes.get(pair.targets[0]))
            losses = [_loss(model, unit, pair, scale, rounding, wanted, wish) for scale in trials.values()]
            best = min(range(len(losses)), key=losses.__getitem__)
            row |= {"alpha": list(trials)[best], "before": losses[0], "after": losses[best]}
            if best:
                fold(model, pair, list(trials.values())[best])
        else:
            assert isinstance(wish.alpha, float)
            fold(model, pair, smoothing_scale(x_max, w_max, wish.alpha))
            row["alpha"] = wish.alpha
        rows.append(row)
    return rows


def _maxima(
    walk: Walk, unit: WalkUnit, leads: Sequence[LinearRef], mode: TokenWeights
) -> dict[LinearRef, torch.Tensor]:
    """The profile of channel maxima of each lead's input, by the pass's `token_weights`: `_smooth.joint_maxima`."""
    if unit.unit.tokens == "image" or mode in ("uniform", "text"):
        plain: TokenWeights = "text" if mode == "text" else "uniform"
        return {ref: stat.value for ref, stat in unit.observe(AbsMax, leads, plain).items()}
    vision, text = unit.observe(AbsMax, leads, "vision"), unit.observe(AbsMax, leads, "text")
    found = {}
    for ref in leads:
        ratio = walk.balance.ratio(ref) if mode == "gradient" else None
        found[ref] = joint_maxima(vision[ref].value, text[ref].value, 1.0 if ratio is None else ratio)
    return found


def _trial_rounding(model: ModelView, wish: Wish, seen: Extremes | None) -> Callable[[torch.Tensor], Activation]:
    """How inputs divided by a scale would be rounded: with the whole of their range, where it is for all tokens."""

    def rounding(scale: torch.Tensor) -> Activation:
        if wish.kind == "token" or seen is None:
            return Activation()
        low, high = float((seen.low / scale).min()), float((seen.high / scale).max())
        return tensor_activation(low, high, model.storage_dtype)

    return rounding


def _loss(
    model: ModelView,
    unit: WalkUnit,
    pair: Pair,
    scale: torch.Tensor,
    rounding: Callable[[torch.Tensor], Activation],
    wanted: list[torch.Tensor],
    wish: Wish,
) -> float:
    """The unit's output error by token weights with the pair's readers rounded as they would be with `scale`."""
    activation = rounding(scale)

    def reader(module: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        w = module.weight.detach().float() * scale
        grid = absmax_grid(w, 8, -1, True, model.storage_dtype)
        w = (dequantize(quantize(w, grid), grid) / scale).to(module.weight)

        def forward(x: torch.Tensor) -> torch.Tensor:
            return F.linear(activation.round(x / scale) * scale, w, module.bias)

        return forward

    with patched({ref.module: reader(ref.module) for ref in pair.targets}):
        found = [
            output_loss(_first(out), reference, weights)
            for out, reference, (_, weights) in zip(unit.outputs(), wanted, unit.rows(wish.token_weights), strict=True)
        ]
    loss = sum(loss for loss, _ in found) / max(sum(weight for _, weight in found), 1e-12)
    return loss if loss == loss else float("inf")


# ------------------------------------------------------------------------------------------------------------ rounding


class RoundingError:
    """Squared error of a rounded input, by weight of token and channel.

    Attributes:
        error, whole: [channels], sums; the whole of what was rounded.
    """

    def __init__(self, activation: Activation, channels: torch.Tensor) -> None:
        self.activation, self.channels = activation, channels
        self.error = self.whole = torch.zeros_like(channels, dtype=torch.float64)

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        x, weights = x[weights > 0].float(), weights[weights > 0]
        self.error = self.error + (weights @ (self.activation.round(x) - x).square()) * self.channels
        self.whole = self.whole + (weights @ x.square()) * self.channels


def _round(model: ModelView, unit: WalkUnit, wish: Wish) -> dict[str, Json]:
    """Round weights and inputs of the unit's linears, stage after stage; the numbers of each."""
    rows: dict[str, Json] = {}
    for stage in unit.stages:
        power = joined(stage).square().sum(0)  # a channel's error grows with the weights that read it
        facts = _token(unit, stage, power, wish) if wish.kind == "token" else _tensor(model, unit, stage, power, wish)
        for ref in stage:
            rows[ref.path] = dict(facts)
            if facts["activation"] is None:
                continue
            weight = ref.module.weight.detach().float()
            grid = absmax_grid(weight, 8, -1, True, model.storage_dtype)
            rounded = dequantize(quantize(weight, grid), grid)
            whole = float(weight.square().sum())
            rows[ref.path]["relative"] += float((weight - rounded).square().sum()) / whole if whole else 0.0
            place(model, ref, rounded, grid)
            install(ref.module, Activation(**facts["activation"]))
    return rows


def _token(unit: WalkUnit, stage: Sequence[LinearRef], power: torch.Tensor, wish: Wish) -> dict[str, Json]:
    stat = unit.observe(lambda: RoundingError(Activation(), power), stage, wish.token_weights)[stage[0]]
    check_inputs(stage[0], stat.error)
    whole = float(stat.whole.sum())
    return {
        "activation": dataclasses.asdict(Activation()),
        "relative": float(stat.error.sum()) / whole if whole else 0.0,
    }


def _tensor(
    model: ModelView, unit: WalkUnit, stage: Sequence[LinearRef], power: torch.Tensor, wish: Wish
) -> dict[str, Json]:
    """One range for the input that the stage's linears share."""
    seen = unit.observe(Extremes, stage, wish.token_weights)[stage[0]]
    if not seen.tokens:
        return {"activation": None, "relative": 0.0}
    check_inputs(stage[0], seen.largest)
    low, high = min(float(seen.low.min()), 0.0), max(float(seen.high.max()), 0.0)
    if low == high:
        return {"activation": dataclasses.asdict(tensor_activation(0, 0, model.storage_dtype)), "relative": 0.0}
    counts = unit.observe(lambda: Histogram(low, high, power), stage, wish.token_weights)[stage[0]]
    spread = Spread(counts.centres, counts.weight, low, high)
    whole = tensor_activation(low, high, model.storage_dtype)
    activation = best_activation(spread, model.storage_dtype) if wish.range == "mse" else whole
    bottom, top = activation.limits
    outside = (counts.centres < bottom - activation.scale / 2) | (counts.centres > top + activation.scale / 2)
    total = float(counts.weight @ counts.centres.square())
    return {
        "activation": dataclasses.asdict(activation),
        "relative": squared_error(spread, activation) / total if total else 0.0,
        "clipped": int(counts.values[outside].sum()) / max(int(counts.values.sum()), 1),
        "kept": min((top - bottom) / (high - low), 1.0),
    }


def _numbers(
    pairs: list[dict[str, Json]], rows: Mapping[str, Json], rounded: Mapping[str, Json], wish: Wish
) -> dict[str, Json]:
    numbers: dict[str, Json] = {"linears": len(rounded), "linears_no_token_reaches": len(rows) - len(rounded)}
    if wish.alpha != "none":
        tried = [pair for pair in pairs if pair["skipped"] is None]
        shares = [pair["after"] / pair["before"] for pair in tried if pair.get("before")]
        numbers |= {
            "pairs_by_alpha": {str(alpha): n for alpha, n in sorted(Counter(p["alpha"] for p in tried).items())},
            "pairs_skipped": dict(Counter(pair["skipped"] for pair in pairs if pair["skipped"] is not None)),
        }
        if wish.alpha == "search":
            numbers["mean_loss_after_smoothing"] = sum(shares) / len(shares) if shares else 1.0
    if not rounded:
        return numbers
    relative = [row["relative"] for row in rounded.values()]
    worst = max(rounded, key=lambda path: rounded[path]["relative"])
    numbers |= {
        "mean_relative_error": sum(relative) / len(relative),
        "worst_relative_error": rounded[worst]["relative"],
        "worst_linear": worst,
    }
    ranged = {path: row for path, row in rounded.items() if "kept" in row}
    if ranged:
        narrow = min(ranged, key=lambda path: ranged[path]["kept"])
        numbers |= {
            "mean_clipped_share": sum(row["clipped"] for row in ranged.values()) / len(ranged),
            "most_clipped_share": max(row["clipped"] for row in ranged.values()),
            "mean_range_kept": sum(row["kept"] for row in ranged.values()) / len(ranged),
            "narrowest_range_kept": ranged[narrow]["kept"],
            "narrowest_linear": narrow,
        }
    return numbers
