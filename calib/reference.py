"""What the original says of the check split, kept so that every other model is compared with the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .asking import Said
from .metrics.divergence import kl, kl_shortened


@dataclass
class Reference:
    """What the original says of the check split: greedy answers, and of every reference answer's tokens, in order:

    Attributes:
        values: log-probabilities [tokens, vocabulary]; where `indices` is there, those of the top ones [tokens, k].
        indices, rest: ids of the top ones, and the log of the mass of all others [tokens].
        chosen: log-probability of the reference token [tokens].
        counts: tokens of each sample's reference answer [samples].
        confidence: of its own answers [samples].
        blind: log-probability of reference tokens where it sees a blank picture [tokens of `Judge.blank`].
    """

    answers: list[str]
    values: torch.Tensor
    chosen: torch.Tensor
    counts: torch.Tensor
    confidence: torch.Tensor
    blind: torch.Tensor
    indices: torch.Tensor | None = None
    rest: torch.Tensor | None = None

    @property
    def said(self) -> Said:
        """Its own answers."""
        return Said(self.answers, self.confidence.tolist())

    def fits(self, samples: int, places: Sequence[int]) -> bool:
        """Whether it is whole: answers of so many samples, and of those at `places` what was said of blank pictures."""
        tokens = len(self.chosen)
        if not isinstance(self.answers, list) or not all(isinstance(answer, str) for answer in self.answers):
            return False
        if not len(self.answers) == len(self.counts) == len(self.confidence) == samples:
            return False
        more = [part for part in (self.indices, self.rest) if part is not None]
        return (
            int(self.counts.sum()) == len(self.values) == tokens
            and len(self.blind) == int(self.counts[list(places)].sum())
            and all(len(part) == tokens for part in more)
        )

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *self.counts.cumsum(0).tolist()]

    @property
    def by_sample(self) -> Sequence[torch.Tensor]:
        """`chosen`, a tensor for each sample."""
        return self.chosen.split(self.counts.tolist())

    def against(self, sample: int, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL in nats and whether the most probable token is the same, by token, for `log_q` [tokens, vocabulary]."""
        rows = slice(self._starts[sample], self._starts[sample + 1])
        values = self.values[rows]
        if self.indices is None or self.rest is None:
            return kl(values, log_q), values.argmax(-1) == log_q.argmax(-1)
        indices = self.indices[rows]
        best = indices.gather(-1, values.argmax(-1, keepdim=True)).squeeze(-1)
        return kl_shortened(values, indices, self.rest[rows], log_q), best == log_q.argmax(-1)
