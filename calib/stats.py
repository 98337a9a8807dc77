"""Running statistics of a linear's inputs, with a weight for every token.

A VLM's sequence is mostly image tokens, so a plain average over tokens is a statistic of images. Every statistic here
takes per-token weights (`modality_weights`); padding always weighs 0. All of them grow by `update` and hold what they
mean after any number of batches, whatever the batches' sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch

from ..compress.anatomy import LinearRef, ModelView, TokenMasks
from ..compress.errors import WorkFailed
from ..compress.runtime.seen import Kept
from .drift import strongest

STRIP = 192  # rows of a Hessian that are computed at a time
TokenWeights = Literal["gradient", "balanced", "uniform", "text", "vision", "drift"]


class Stat(Protocol):
    """A running statistic."""

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """Add the inputs `x` [tokens, channels], each token with its weight >= 0 from `weights` [tokens]."""


class Hessian:
    """Weighted mean of ``2 x x^T``: the Hessian of a linear's squared output error (GPTQ, arXiv 2210.17323).

    Attributes:
        matrix: [channels, channels], kept in `dtype` (float32, or float64).
        tokens: number of tokens with a weight above 0. weight: the sum of the weights.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.matrix = torch.zeros(0, 0, dtype=dtype)
        self.tokens = 0
        self.weight = 0.0

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        x, weights, total = _kept(x, weights, self.dtype)
        if self.matrix.numel() == 0:
            self.matrix = torch.zeros(x.shape[1], x.shape[1], dtype=self.dtype, device=x.device)
        if total == 0:
            return
        self.weight += total
        self.tokens += len(x)
        scaled = x * (weights * (2 / self.weight)).sqrt()[:, None]
        kept = 1 - total / self.weight
        for start in range(0, len(self.matrix), STRIP):  # it is symmetric: half of it is computed
            stop = start + STRIP
            self.matrix[start:stop, start:].addmm_(scaled[:, start:stop].T, scaled[:, start:], beta=kept)
            self.matrix[stop:, start:stop] = self.matrix[start:stop, stop:].T


class _Mean:
    """Weighted mean by channel of what `of` makes of ``x`` [tokens, channels].

    Attributes:
        mean: [channels], float64.
    """

    def __init__(self, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._of = of
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.tokens = 0
        self.weight = 0.0

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        x, weights, total = _kept(x, weights, torch.float64)
        if self.mean.numel() == 0:
            self.mean = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        if total == 0:
            return
        self.weight += total
        self.tokens += len(x)
        self.mean += (weights @ self._of(x) - total * self.mean) / self.weight


class MeanSquare(_Mean):
    """Weighted mean of ``x^2`` by channel: the importance that weighs rounding errors (imatrix)."""

    def __init__(self) -> None:
        super().__init__(torch.square)


class Spread:
    """Weighted mean and variance of ``x`` by channel (the fluctuation of FLAP, arXiv 2312.11983).

    Batches are joined by their means and sums of squared deviations (Chan et al. 1979), so nothing cancels.

    Attributes:
        mean, variance: [channels], float64; the variance is the population's.
    """

    def __init__(self) -> None:
        self.mean = self.variance = torch.zeros(0, dtype=torch.float64)
        self.tokens = 0
        self.weight = 0.0

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        x, weights, total = _kept(x, weights, torch.float64)
        if self.mean.numel() == 0:
            self.mean = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            self.variance = torch.zeros_like(self.mean)
        if total == 0:
            return
        before, self.weight = self.weight, self.weight + total
        self.tokens += len(x)
        mean = weights @ x / total
        apart = mean - self.mean
        share = total / self.weight
        inside = weights @ (x - mean).square() / total
        self.variance = (1 - share) * self.variance + share * (inside + apart.square() * (before / self.weight))
        self.mean = self.mean + apart * share


class ColumnNorm(MeanSquare):
    """Weighted root mean square by channel: the ``||X_j||`` of Wanda (arXiv 2306.11695) up to a constant."""

    @property
    def norm(self) -> torch.Tensor:
        """[channels], float64."""
        return self.mean.sqrt()


class MeanAbs(_Mean):
    """Weighted mean of ``|x|`` by channel: the activation scale of AWQ (arXiv 2306.00978)."""

    def __init__(self) -> None:
        super().__init__(torch.abs)


class AbsMax:
    """The largest ``|x|`` by channel over all tokens with a weight above 0 (SmoothQuant, arXiv 2211.10438).

    Attributes:
        value: [channels], float32.
    """

    def __init__(self) -> None:
        self.value = torch.zeros(0)
        self.tokens = 0

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        x, _, _ = _kept(x, weights, torch.float32)
        if self.value.numel() == 0:
            self.value = torch.zeros(x.shape[1], device=x.device)
        if len(x):
            self.tokens += len(x)
            self.value = torch.maximum(self.value, x.abs().amax(0))


class Extremes:
    """The smallest and the largest ``x`` by channel over all tokens with a weight above 0.

    Attributes:
        low, high: [channels], float32; empty until a token counts.
    """

    def __init__(self) -> None:
        self.low = self.high = torch.zeros(0)
        self.tokens = 0

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        x, _, _ = _kept(x, weights, torch.float32)
        if not len(x):
            return
        low, high = x.amin(0), x.amax(0)
        self.low = torch.minimum(self.low, low) if self.tokens else low
        self.high = torch.maximum(self.high, high) if self.tokens else high
        self.tokens += len(x)

    @property
    def largest(self) -> torch.Tensor:
        """max ``|x|``, [channels]."""
        return torch.maximum(-self.low, self.high)


class Histogram:
    """How the values of an input lie between `low` and `high`, by weight of token and channel.

    Args:
        channels: [channels], what a value counts by the channel that it is in (times its token's weight).

    Attributes:
        weight: [bins] float64. values: [bins], the plain number of values.
    """

    def __init__(self, low: float, high: float, channels: torch.Tensor, bins: int = 1 << 14) -> None:
        self.low, self.high, self.channels = low, high, channels.double()
        self.weight = torch.zeros(bins, dtype=torch.float64)
        self.values = torch.zeros(bins, dtype=torch.int64)

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        x, weights, _ = _kept(x, weights, torch.float64)
        bins = len(self.weight)
        step = (self.high - self.low) / bins
        place = ((x - self.low) / step).long().clamp_(0, bins - 1).flatten()
        counted = (weights[:, None] * self.channels).flatten()
        self.weight += torch.bincount(place, counted, minlength=bins).to(self.weight.device)
        self.values += torch.bincount(place, minlength=bins).to(self.values.device)

    @property
    def centres(self) -> torch.Tensor:
        """The middle of each bin, [bins] float64."""
        step = (self.high - self.low) / len(self.weight)
        return self.low + step * (torch.arange(len(self.weight), dtype=torch.float64) + 0.5)


def _kept(x: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The tokens that count, their weights, and the sum of these."""
    if x.ndim != 2 or weights.shape != x.shape[:1]:
        found = f"{tuple(x.shape)}, {tuple(weights.shape)}"
        raise ValueError(f"x [tokens, channels] and weights [tokens] do not fit: {found}")
    counted = weights > 0
    if not bool(counted.all()):
        x, weights = x[counted], weights[counted]
    weights = weights.to(dtype)
    return x.detach().to(dtype), weights, float(weights.sum(dtype=torch.float64))


def input_masks(
    view: ModelView, batch: Mapping[str, Any], ref: LinearRef, kept: Kept | None = None
) -> TokenMasks | None:
    """What the rows of a linear's input are, masks [batch, tokens]; None where all are an image's own.

    Args:
        kept: what token passes left of the sequence. Inside the decoder rows are the tokens that a block works on, and
            what fills a row up is padding; after it the sequence has its full length again, and what was taken out is
            padding.
    """
    tokens = ref.unit.cross if ref.role in ("cross.k", "cross.v") else ref.unit.tokens
    if tokens == "image":
        return None
    if tokens == "all":
        return view.token_masks(batch)
    masks = view.token_masks(batch, tokens)
    if kept is None:
        return masks
    if ref.path.startswith(view.decoder_path + "."):
        rows = kept.inputs(ref.unit.module, ref.role)
        if rows is None:
            return masks
        places, valid = (t.to(masks.text.device) for t in rows)
        vision, text, answer, padding = (m.gather(1, places) for m in vars(masks).values())
        return TokenMasks(vision & valid, text & valid, answer & valid, padding | ~valid)
    seen = kept.after(masks.text)
    if seen is None:
        return masks
    return TokenMasks(masks.vision & seen, masks.text & seen, masks.answer & seen, masks.padding | ~seen)


def modality_weights(
    masks: TokenMasks,
    mode: TokenWeights = "balanced",
    *,
    ratio: float | None = None,
    share: float | None = None,
    drift: torch.Tensor | None = None,
    top: float = 0.0,
) -> torch.Tensor:
    """Weights of a batch's tokens, float32 [batch, tokens]; padding is 0.

    ``uniform``: 1 for every real token. ``text``: 1 for text, 0 for visual tokens; ``vision`` the reverse.
    ``balanced``: the visual and the text tokens of the batch carry half of the total weight each, and the mean weight
    of a real token is 1 (a batch with only one of the two is uniform). ``gradient``: a visual token weighs `ratio`
    times as much as one of text (MBQ's gradient ratio, `balance.Balance`; without one, ``balanced``), scaled so that
    the mean weight is 1 in data of which `share` are visual tokens (default: in this batch). ``drift``: 1 for text and
    for the share `top` of each sample's visual tokens with the highest `drift` [batch, tokens], 0 for the others
    (ATV-Pruning; without a drift, ``balanced``).
    """
    vision, text = masks.vision.float(), masks.text.float()
    if mode == "uniform":
        return vision + text
    if mode in ("text", "vision"):
        return text if mode == "text" else vision
    if mode not in ("balanced", "gradient", "drift"):
        raise ValueError(f"token weights are gradient, balanced, uniform, text, vision or drift, not '{mode}'")
    if mode == "drift" and drift is not None:
        return text + strongest(drift, masks.vision, top).float()
    n_vision, n_text = float(vision.sum()), float(text.sum())
    if mode == "gradient" and ratio is not None:
        if share is None:
            share = n_vision / max(n_vision + n_text, 1.0)
        mean = 1 - share + share * ratio
        return (text + ratio * vision) / (mean or 1.0)
    if n_vision == 0 or n_text == 0:
        return vision + text
    half = (n_vision + n_text) / 2
    return vision * (half / n_vision) + text * (half / n_text)


def fitting(weights: torch.Tensor | None, rows: torch.Tensor, ref: LinearRef) -> torch.Tensor:
    """Weights for the rows of a linear's input, [tokens]; None is all 1."""
    if weights is None:
        return torch.ones(len(rows), device=rows.device)
    if weights.numel() != len(rows):
        raise WorkFailed(
            "the tokens of the batch and of the block's input do not match",
            where=ref.path,
            found=f"{weights.numel()} in the batch, {len(rows)} in the block",
            change="correct 'tokens' (image, prompt, sequence) of this place in the anatomy row",
        )
    return weights.reshape(-1).to(rows.device)
