"""Greedy answers that a teacher-forced forward has told already: they need not be generated token by token.

Where each token of the reference answer is the model's own first choice after the ones before it, greedy decoding says
exactly that answer. The forward that measures the KL knows. What is close, cut off, or not ended by a token at which
`generate` stops, is generated; and so is everything where `generate` is told to do more than to choose the most
probable token, or works with another cache than the forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..compress.anatomy import ModelView
from ..compress.runtime.kv_cache import installed
from .asking import Said

MARGIN = 0.1  # nats between the first and the second choice; closer ones might change places in another order of sums
PLAIN = frozenset(  # settings of generation that do not change what greedy decoding chooses
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens"),
        *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "use_cache", "cache_implementation"),
        *("transformers_version", "output_attentions", "output_hidden_states", "return_dict_in_generate"),
        "_from_model_config",
    )
)


class Foretold:
    """What `generate(max_new_tokens=tokens, do_sample=False)` of `view` is known to say without being asked.

    Attributes:
        generated: answers that were generated all the same.
    """

    def __init__(self, view: ModelView, tokens: int, decode: Callable[[torch.Tensor], list[str]]) -> None:
        settings = getattr(view.model, "generation_config", None)
        told = {} if settings is None else {k for k, v in settings.to_diff_dict().items() if v is not None}
        end = getattr(settings, "eos_token_id", None)
        self.tokens, self.decode, self.generated = tokens, decode, 0
        self.known: dict[int, tuple[str, float]] = {}
        self.ends: set[int] = set()
        if end is not None and PLAIN.issuperset(told) and installed(view.model) is None:
            self.ends = {end} if isinstance(end, int) else set(end)

    def hear(self, sample: int, log_p: torch.Tensor, target: torch.Tensor, chosen: torch.Tensor) -> None:
        """Note the answer to a sample where it `says` its reference answer, and its probability.

        Args:
            chosen: of `log_p`, those of `target` [tokens].
        """
        if self.says(log_p, target):
            self.known[sample] = self.decode(target[None])[0], math.exp(min(float(chosen.double().sum()), 0.0))

    def says(self, log_p: torch.Tensor, target: torch.Tensor) -> bool:
        """Whether the answer is `target` [tokens], for log-probabilities [tokens, vocabulary] given `target`."""
        ids = target.tolist()
        if not ids or len(ids) > self.tokens or ids[-1] not in self.ends or not self.ends.isdisjoint(ids[:-1]):
            return False
        first, second = log_p.topk(2, dim=-1).values.unbind(-1)
        return bool((log_p.argmax(-1) == target).all() and (first - second >= MARGIN).all())

    def all_answers(self, samples: int, trial: int, generate: Callable[[list[int]], Said]) -> Said:
        """The answer to each of so many samples: the known ones, the others from `generate`.

        So many of the known ones as `trial` says are generated too, to see that both agree; if not, all are.
        """
        tried = list(self.known)[:trial]
        asked = sorted({*range(samples)} - self.known.keys() | {*tried})
        found = _by_sample(asked, generate(asked))
        if any(found[i][0] != self.known[i][0] for i in tried):
            rest = sorted({*range(samples)} - found.keys())
            found |= _by_sample(rest, generate(rest))
        self.generated = len(found)
        texts, confidence = zip(*((self.known | found)[i] for i in range(samples)))
        return Said([*texts], [*confidence])


def _by_sample(asked: list[int], said: Said) -> dict[int, tuple[str, float]]:
    return dict(zip(asked, zip(said.texts, said.confidence)))
