"""Where a model's forward is listened to, and the arguments of a call by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError


class Generating:
    """Stands in for a model's `generate`, and knows while that runs where the prompt ends.

    Without a cache prompt and answer run together; they can then be told apart as they are with one.

    Attributes:
        given: tokens of the prompt, of one row; None outside of `generate`.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.given = model, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        ids = args[0] if args else next((kwargs[n] for n in ("inputs", "input_ids") if kwargs.get(n) is not None), None)
        self.given = None if ids is None else ids.shape[1]
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            self.given = None


def generating(model: nn.Module) -> Generating:
    """What knows where the prompt of `model` ends, put in the place of its `generate` where it is not there yet."""
    known = vars(model).get("generate")
    if not isinstance(known, Generating):
        known = vars(model)["generate"] = Generating(model)
    return known


def merger(model: nn.Module, decoder_path: str) -> nn.Module | None:
    """The innermost module above the decoder that is given ids and pixels; None where there is none."""
    parts = decoder_path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        if {"input_ids", "pixel_values"} <= set(parameters(type(module).forward)):
            return module
    return None


@functools.cache
def parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a method, without self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def named(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(parameters(type(module).forward), args)) | kwargs


def ids_of(module: nn.Module, values: Mapping[str, Any], image_token_id: int) -> Tensor:
    """The token ids of a call [batch, q]; of a single new embedding per row, any id that is no image's.

    Raises:
        UsageError: several embeddings without ids, in which visual tokens cannot be told from text.
    """
    ids = values.get("input_ids")
    if ids is not None:
        return ids
    embeds = values["inputs_embeds"]
    if embeds.shape[1] > 1:
        raise UsageError(
            "a model that takes visual tokens away needs input_ids",
            where=type(module).__name__,
            found="inputs_embeds alone, in which visual tokens cannot be told from text",
            change="pass input_ids and pixel_values",
        )
    return torch.full(embeds.shape[:2], image_token_id - 1, device=embeds.device)


def owner(hook: Any) -> Any:
    """Whose method a hook is; None for a plain function."""
    return hook.__self__ if isinstance(hook, MethodType) else None


def setting(decoder: Any, name: str) -> Any:
    """A value of the decoder's config; None where it has none of that name."""
    return decoder.config.to_dict().get(name)


def layer_types(decoder: Any) -> list[str]:
    """What kind of attention each layer of the decoder has, where its config says so."""
    return list(setting(decoder, "layer_types") or ())


def window_of(decoder: Any) -> int:
    """The sliding window of those decoder layers that have one; 0 where none has."""
    kinds = layer_types(decoder)
    if kinds and "sliding_attention" not in kinds:
        return 0
    return setting(decoder, "sliding_window") or 0
