"""Greedy answers in a loop of our own: which settings ask for one, and the loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

GREEDY: dict[str, tuple[Any, ...]] = {
    "do_sample": (False, None), "num_beams": (1, None), "num_return_sequences": (1, None),
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0, None), "no_repeat_ngram_size": (0, None), "min_new_tokens": (0, None),
    "return_dict_in_generate": (False, None),
}  # fmt: skip
READ = {"max_new_tokens", "eos_token_id", "pad_token_id"}
# settings without a say in a greedy answer whose length is given
IDLE = {
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_length",
    "bos_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config",
}  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        limit: most new tokens. ends: ids that end an answer. filler: what follows in a row that has ended.
    """

    limit: int
    ends: np.ndarray
    filler: int

    @classmethod
    def of(cls, limit: int, ends: Any, pad: Any) -> Wish:
        known = np.array([] if ends is None else ends, dtype=np.int64).reshape(-1)
        return cls(limit, known, int(pad if pad is not None else (known[0] if len(known) else 0)))


def answer(first: np.ndarray, step: Callable[[np.ndarray], np.ndarray], wish: Wish) -> np.ndarray:
    """New tokens [B, new] that begin with `first` [B]; `step` gives each row's next token [B] from its last one."""
    tokens, done = [first], np.isin(first, wish.ends)
    while len(tokens) < wish.limit and not done.all():
        new = np.where(done, wish.filler, step(tokens[-1])).astype(np.int64)
        done = done | np.isin(new, wish.ends)
        tokens.append(new)
    return np.stack(tokens, 1)


def plain_wish(model: Any, asked: Mapping[str, Any]) -> Wish | None:
    """What a call of transformers' `generate` asks for, if that is a greedy answer to one prompt and nothing besides.

    Args:
        asked: the call's keyword arguments.

    Returns:
        None where a setting, of the call or of the model's generation config, is none of those above; where the number
        of new tokens is not said; where there are several prompts, padding, or no `input_ids`.
    """
    from transformers.generation import GenerationMixin

    config = model.generation_config
    settings = config.to_diff_dict() | {k: v for k, v in asked.items() if k in config.to_dict()}
    neutral = GREEDY | NEUTRAL | {"use_cache": (True, None)}
    if any(v not in neutral.get(k, (None, False, 0)) for k, v in settings.items() if k not in READ | IDLE):
        return None
    if any(asked.get(k) is not None for k in inspect.signature(GenerationMixin.generate).parameters):
        return None
    ids, mask = asked.get("input_ids"), asked.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or len(ids) != 1 or asked.get("past_key_values") is not None:
        return None
    if mask is not None and (mask.shape != ids.shape or not bool(mask.all())):
        return None
    limit = settings.get("max_new_tokens")
    return Wish.of(limit, settings.get("eos_token_id"), settings.get("pad_token_id")) if limit else None
