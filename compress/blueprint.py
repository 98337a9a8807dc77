"""What a config says that a model looks like: its shapes, without memory and without data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

Shapes = dict[str, tuple[int, ...]]  # name of a parameter or buffer -> shape


def config_tree(config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The config and its sub-configs, each with its dotted place ("", "text_config.", ...)."""
    yield place, config
    for key in config.sub_configs:
        part = vars(config).get(key)
        if part is not None:
            yield from config_tree(part, f"{place}{key}.")


def blueprint(model: Any, config: Any) -> nn.Module:
    """The model of `config`, read back from its JSON form as `from_pretrained` would, on the meta device."""
    from transformers import initialization

    fresh = type(config).from_dict(json.loads(config.to_json_string()))
    with initialization.no_init_weights(), initialization.meta_device_safe_creation_ops(), torch.device("meta"):
        return type(model)(fresh)


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
