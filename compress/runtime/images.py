"""The images of a sequence as a token method sees them, and what it answers. Tensors in, tensors out.

A `Choice` says which places of an image's run stay (`positions`) and, where it merges, what each of them becomes: a
mix of the whole image's tokens with `weights`. Choosing is done without gradients; mixing is one matrix product, so
that training reaches everything before it, and it is applied alike to whatever else there is by visual token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def kept_count(tokens: int, keep: float, count: int = 0) -> int:
    """How many of an image's `tokens` stay: `count` if given, else the fraction `keep`, rounded half up; at least one.

    Never more than `tokens`.
    """
    return min(tokens, count) if count else max(1, math.floor(keep * tokens + 0.5))


def square(tokens: int) -> tuple[int, int]:
    """A square number of tokens is a square picture, any other a sequence: a single row."""
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else (1, tokens)


@dataclass(frozen=True)
class Images:
    """n images of T visual tokens each.

    Attributes:
        features: what the language model would be given, [n, T, D]; no gradient.
        relevance: mean cosine with the embeddings of the row's prompt, [n, T]; None where not asked for.
        grid: rows and columns where the model says them (M-RoPE); None: `square`.
        attention: that the tower pays to each token, [n, T]. keys: the tower's, [n, T, d]. None where not asked for.
    """

    features: Tensor
    relevance: Tensor | None = None
    grid: tuple[int, int] | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def tokens(self) -> int:
        return self.features.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the picture, whose tokens come row by row."""
        return self.grid or square(self.tokens)

    def relevant_to(self, text: Tensor) -> Images:
        """The same with the mean cosine of each token with its image's text, by its `mean_direction` [n, D]."""
        unit = torch.nn.functional.normalize(self.features.float(), dim=-1)
        return replace(self, relevance=(unit @ text[:, :, None]).squeeze(-1))

    def same(self, positions: Tensor) -> Tensor:
        """`positions` [k] (or other values [k, ...]) of one image for all of them, [n, k, ...]."""
        return positions.to(self.features.device).expand(len(self), *positions.shape)


@dataclass(frozen=True)
class Choice:
    """What stays of n images.

    Attributes:
        positions: places within the image, [n, k], ascending. A token's position ids are those of its place.
        weights: [n, k, T]: the j-th of them becomes ``sum_t weights[j, t] features[t]``; None: they stay as they are.
    """

    positions: Tensor
    weights: Tensor | None = None


Choose = Callable[[Images, int], Choice]  # (images, k) -> what stays


@dataclass(frozen=True)
class Chosen:
    """A choice and where it applies.

    Attributes:
        places: of the images' tokens in the flattened batch [batch * q], [n, T].
    """

    places: Tensor
    choice: Choice

    @property
    def kept(self) -> Tensor:
        """Places of what stays, [n, k]."""
        return self.places.gather(1, self.choice.positions)


def runs(visual: Tensor, per_image: int = 0) -> list[Tensor]:
    """The images among visual tokens [batch, q]: places in the flattened batch, [n, T], one entry for each length T.

    An image is a run of consecutive visual tokens of a row. A run of several times `per_image` tokens is as many images
    side by side.
    """
    flat = visual.flatten()
    before = torch.nn.functional.pad(visual, (1, 0))[:, :-1].flatten()
    number, length = _numbered(flat, flat & ~before)
    if per_image:
        first = (flat & ~before).nonzero().squeeze(1)
        inside = torch.arange(len(flat), device=flat.device)[flat] - first[number]
        several = (length[number] % per_image == 0) & (inside % per_image == 0)
        starts = flat & ~before
        starts[flat.nonzero().squeeze(1)[several]] = True
        number, length = _numbered(flat, starts)
    places, sizes = flat.nonzero().squeeze(1), length[number]
    return [places[sizes == tokens].view(-1, tokens) for tokens in length.unique().tolist()]


def _numbered(flat: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Of each visual token the number of its run, and the length of each run."""
    number = (starts.long().cumsum(0) - 1)[flat]
    return number, torch.bincount(number)


def mean_direction(embeds: Tensor, which: Tensor) -> Tensor:
    """Mean of the unit embeddings of each row's tokens in the mask `which` [batch, q]: [batch, D]; zeros if none."""
    unit = torch.nn.functional.normalize(embeds.detach().float(), dim=-1) * which[..., None]
    return unit.sum(1) / which.sum(1, keepdim=True).clamp_min(1)


def by_grid(places: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, tuple[int, int] | None]]:
    """Images of equal length apart by their rows and columns, which M-RoPE position ids tell; None where they do not.

    Args:
        places: see `runs`. positions: of the flattened batch, [3 (time, row, column), batch * q]; a plain row before
            them does not matter.
    """
    rows, columns = (p[places].amax(1) - p[places].amin(1) + 1 for p in positions[-2:])
    shapes, which = torch.stack([rows, columns], dim=1).unique(dim=0, return_inverse=True)
    for number, (height, width) in enumerate(shapes.tolist()):
        grid = (height, width) if height * width == places.shape[1] else None
        yield places[which == number], grid


def mixed(values: Tensor, chosen: Sequence[Chosen]) -> Tensor:
    """`values` by place [places, D] with each mixed token in the place where it stays. Differentiable."""
    for one in chosen:
        weights = one.choice.weights
        if weights is not None:
            new = weights.to(values.dtype) @ values[one.places]
            values = values.index_put((one.kept.flatten(),), new.flatten(0, 1))
    return values


def ranks(visual: Tensor) -> Tensor:
    """The number of each visual token among those of the batch, by place [batch * q]."""
    return visual.flatten().long().cumsum(0) - 1


def numbered(chosen: Sequence[Chosen], visual: Tensor) -> list[Chosen]:
    """The same with places counted among the visual tokens alone, [batch, q] in `visual`."""
    rank = ranks(visual)
    return [Chosen(rank[one.places], one.choice) for one in chosen]
