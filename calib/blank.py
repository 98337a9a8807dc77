"""Blank pictures: how well a model finds the right answers without seeing anything.

Much of an answer follows from the question alone, so the perplexity of a vision-language model may hardly change when
it looks away. What tells is the distance between the two: where it shrinks, a model has come to answer blindly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from PIL import Image

from ..compress.anatomy import ModelView
from ..compress.base import Json, Progress, evaluating
from .asking import Layout, by_picture, of_target, scored
from .encode import Encode
from .metrics.divergence import perplexity
from .sample import ImageSource, Sample

MOST, LEAST, SHARE = 128, 16, 8  # of the check questions an eighth, within these bounds
GREY = (128, 128, 128)


def blanked(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions about mid-grey pictures of the same sizes."""
    grey: dict[tuple[int, int], ImageSource] = {}

    def blank(image: ImageSource) -> ImageSource:
        size = image.open().size
        return grey.setdefault(size, ImageSource(picture=Image.new("RGB", size, GREY), where="a blank picture"))

    return [dataclasses.replace(s, images=tuple(map(blank, s.images))) for s in samples]


class Blank:
    """Some of `samples`, taken evenly, without their pictures.

    Attributes:
        places: which of the samples these are. samples: the same about blank pictures. batches: of these, by place.
    """

    def __init__(self, samples: Sequence[Sample], batch_size: int) -> None:
        some = [i for i, sample in enumerate(samples) if sample.images]
        count = min(len(some), MOST, max(LEAST, len(some) // SHARE))
        self.places = [some[k * len(some) // count] for k in range(count)]
        self.samples = blanked([samples[i] for i in self.places])
        order = by_picture(self.samples)
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def ask(self, view: ModelView, encode: Encode, layout: Layout, progress: Progress) -> torch.Tensor:
        """Log-probabilities of the right answers' tokens [tokens]; `progress` gets a step for every batch."""
        rows: list[torch.Tensor] = []
        progress.start("asking about blank pictures", len(self.batches))
        with evaluating(view.model):
            for part in self.batches:
                rows += [of_target(*row) for row in scored(view, encode, [self.samples[i] for i in part], layout)]
                progress.step()
        progress.done()
        return torch.cat(rows) if rows else torch.empty(0)

    def compare(
        self,
        blind: torch.Tensor,
        seeing: Sequence[torch.Tensor],
        was_blind: torch.Tensor,
        was_seeing: Sequence[torch.Tensor],
    ) -> dict[str, Json] | None:
        """report.json's ``blank``: perplexity of the right answers to the same questions without pictures and with.

        Args:
            blind: what `ask` gave. seeing: log-probabilities of the right answers' tokens with the real pictures, of
                all samples. was_blind, was_seeing: of the original.

        Returns:
            n (questions), perplexity, reference_perplexity, seeing_perplexity, reference_seeing_perplexity; None where
            no sample has a picture.
        """
        if not self.places:
            return None
        return {
            "n": len(self.places),
            "perplexity": perplexity(blind),
            "reference_perplexity": perplexity(was_blind),
            "seeing_perplexity": perplexity(torch.cat([seeing[i] for i in self.places])),
            "reference_seeing_perplexity": perplexity(torch.cat([was_seeing[i] for i in self.places])),
        }
