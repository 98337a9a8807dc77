"""Greedy answers in a loop of our own: which settings ask for one, and the loop."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# what asks for nothing, where that is neither None nor False (0 would be a value like any other of most settings)
NEUTRAL: dict[str, float] = {
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "min_new_tokens": 0, "min_length": 0, "use_cache": True, "num_beam_groups": 1, "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0,
}  # fmt: skip
READ = {"max_new_tokens", "eos_token_id", "pad_token_id"}
# settings without a say in a greedy answer whose length is given
IDLE = {
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_length",
    "bos_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config", "length_penalty",
    "num_assistant_tokens",
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


def beyond(model: Any, asked: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The first setting, of a call of `generate` or of the model's generation config, that a greedy answer lacks, with
    its value; None where there is none.

    Args:
        asked: the call's keyword arguments; what goes into the model's forward is none of them.
    """
    config = model.generation_config
    settings = given(config) | {k: v for k, v in asked.items() if k in vars(config)}
    for key, value in settings.items():
        nothing = value is None or value is False or (isinstance(value, (list, tuple, dict)) and not value)
        neutral = nothing if key not in NEUTRAL or value is None else value == NEUTRAL[key]
        if not neutral and key not in READ | IDLE:
            return key, value
    return next(((key, asked[key]) for key in _arguments() if asked.get(key) is not None), None)


def given(config: Any) -> dict[str, Any]:
    """What a generation config asks for; transformers' own way to say it takes longer than some models' layers."""
    return {k: v for k, v in vars(config).items() if v is not None and not k.startswith("_")}


@functools.cache
def _arguments() -> tuple[str, ...]:
    """What transformers' `generate` takes by name, besides settings and the model's inputs."""
    from transformers.generation import GenerationMixin

    return tuple(inspect.signature(GenerationMixin.generate).parameters)


def plain_wish(model: Any, asked: Mapping[str, Any]) -> Wish | None:
    """What a call of transformers' `generate` asks for, if that is a greedy answer to one prompt and nothing besides.

    Args:
        asked: the call's keyword arguments.

    Returns:
        None where a setting is `beyond` that; where the number of new tokens is not said; where there are several
        prompts, padding, or no `input_ids`.
    """
    config = model.generation_config
    if beyond(model, asked):
        return None
    ids, mask = asked.get("input_ids"), asked.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or len(ids) != 1 or asked.get("past_key_values") is not None:
        return None
    if mask is not None and (mask.shape != ids.shape or not bool(mask.all())):
        return None
    limit, ends, pad = (asked.get(k, getattr(config, k)) for k in ("max_new_tokens", "eos_token_id", "pad_token_id"))
    return Wish.of(limit, ends, pad) if limit else None
