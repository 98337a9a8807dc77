"""The images of a sequence as a token method sees them, and what it answers. Tensors in, tensors out.

A `Choice` says which places of an image's run stay (`positions`) and, where it merges, what each of them becomes: a
mix of the whole image's tokens with `weights`. Choosing is done without gradients; mixing is one matrix product, so
that training reaches everything before it, and it is applied alike to whatever else there is by visual token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def kept_count(tokens: int, keep: float, count: int = 0) -> int:
    """How many of an image's `tokens` stay: `count` if given, else the fraction `keep`, rounded half up; at least one.

    Never more than `tokens`.
    """
    return min(tokens, count) if count else max(1, math.floor(keep * tokens + 0.5))


@dataclass(frozen=True)
class Images:
    """n images of T visual tokens each.

    Attributes:
        features: what the language model would be given, [n, T, D]; no gradient.
        relevance: mean cosine with the embeddings of the row's prompt, [n, T]; None where not asked for.
    """

    features: Tensor
    relevance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def tokens(self) -> int:
        return self.features.shape[1]

    def same(self, positions: Tensor) -> Tensor:
        """`positions` [k] of one image for all of them, [n, k]."""
        return positions.to(self.features.device).expand(len(self), -1)


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


def mixed(values: Tensor, chosen: Sequence[Chosen]) -> Tensor:
    """`values` by place [places, D] with each mixed token in the place where it stays. Differentiable."""
    for one in chosen:
        weights = one.choice.weights
        if weights is not None:
            new = weights.to(values.dtype) @ values[one.places]
            values = values.index_put((one.kept.flatten(),), new.flatten(0, 1))
    return values


def numbered(chosen: Sequence[Chosen], visual: Tensor) -> list[Chosen]:
    """The same with places counted among the visual tokens alone, [batch, q] in `visual`."""
    rank = visual.flatten().long().cumsum(0) - 1
    return [Chosen(rank[one.places], one.choice) for one in chosen]
