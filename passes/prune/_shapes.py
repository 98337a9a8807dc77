"""What a model becomes when its config is edited: its shapes, without memory, and how a live model takes them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...compress.base import Pass
from ...compress.blueprint import config_tree
from ...compress.errors import Unmet

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView

MLP_KEYS = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff")
HEAD_KEYS = ("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
BIAS_KEYS = ("mlp_bias", "attention_bias", "use_bias", "enable_bias", "bias")
KV_KEY, DIM_KEY = "num_key_value_heads", "head_dim"
KEYS = (*MLP_KEYS, *HEAD_KEYS, KV_KEY, DIM_KEY)

Edits = dict[str, Any]  # "text_config.intermediate_size" -> value


def refuse_added(step: Pass, view: ModelView) -> None:
    """Raise Unmet where a pass put blocks onto the model: they follow no config, and would no longer fit."""
    added = [unit.name for unit in view.units if unit.added]
    if added:
        raise Unmet(
            f"{step.name} cannot change the shape of a model that has more parts than its config says",
            where=added[0],
            found=f"{len(added)} units that a pass added",
            change=f"put {step.name} before that pass",
        )


def edit(config: Any, edits: Mapping[str, Any]) -> Any:
    """Set the values in place; returns `config`."""
    for path, value in edits.items():
        part, key = config_place(config, path)
        setattr(part, key, value)
    return config


def config_place(config: Any, path: str) -> tuple[Any, str]:
    """The (sub-)config of a dotted place, and the name under which it keeps the value."""
    place, dot, key = path.rpartition(".")
    part = dict(config_tree(config))[place + dot]
    return part, part.attribute_map.get(key, key)


def take_on(model: Any, built: nn.Module, edits: Mapping[str, Any]) -> dict[str, list[float]]:
    """Make everything on `model` but its weights what it is on `built`: config values, and numbers kept by modules.

    Parameters of another shape, and biases that were not there, are made anew and hold zeros; ties hold.

    Returns:
        The factors (not whole numbers: an embedding's scale that follows the width) that changed: name -> [old, new].
    """
    edit(model.config, edits)
    keys = {*KEYS, *(path.rpartition(".")[2] for path in edits)}
    fresh: dict[int, nn.Parameter] = {}
    factors: dict[str, list[float]] = {}
    for name, mine, other in alike(model, built):
        for owner, key, value in differing(mine, other, keys, _is_size):
            setattr(owner, key, value)
        for key, value in vars(other).items():
            own = vars(mine).get(key)
            if type(value) is float and type(own) is float and own != value:
                factors[f"{name}.{key}"] = [own, value]
                _rescale(mine, own, value)
                setattr(mine, key, value)
        for key, theirs_ in other.named_parameters(recurse=False):
            parameter = mine.get_parameter(key) if getattr(mine, key) is not None else None
            if parameter is None:
                like = next(mine.parameters(recurse=False))
                empty = torch.zeros(theirs_.shape, dtype=like.dtype, device=like.device)
                setattr(mine, key, nn.Parameter(empty, requires_grad=like.requires_grad))
            elif parameter.shape != theirs_.shape:
                if id(parameter) not in fresh:
                    empty = torch.zeros(theirs_.shape, dtype=parameter.dtype, device=parameter.device)
                    fresh[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(mine, key, fresh[id(parameter)])
    return factors


def _is_size(value: Any) -> bool:
    """A whole number that is no flag, or a tuple of such (a norm's shape)."""
    return type(value) is int or (type(value) is tuple and all(type(v) is int for v in value))


def _rescale(module: nn.Module, old: float, new: float) -> None:
    """The buffer beside a factor that holds its value."""
    for buffer in module.buffers(recurse=False):
        if buffer.ndim == 0 and buffer.is_floating_point() and buffer == torch.tensor(old, dtype=buffer.dtype):
            buffer.fill_(new)


def alike(model: nn.Module, built: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, module, the module of that name in `built`); not what a pass put onto the model."""
    theirs = dict(built.named_modules())
    return ((name, mine, theirs[name]) for name, mine in model.named_modules() if name in theirs)


def differing(
    mine: nn.Module, other: nn.Module, keys: Iterable[str], counts: Callable[[Any], bool]
) -> Iterator[tuple[Any, str, Any]]:
    """(owner, key, value of the other) for what two modules do not say alike: `keys` of their configs, and numbers.

    Args:
        keys: in the module's config and its parts. counts: whether a value is a number that a module keeps of its own.
    """
    for key, value in vars(other).items():
        own = vars(mine).get(key)
        if key == "config" and own is not None:
            for (_, part), (_, theirs) in zip(config_tree(own), config_tree(value), strict=True):
                for setting in keys:
                    if setting in vars(theirs) and vars(part).get(setting) != vars(theirs)[setting]:
                        yield part, setting, vars(theirs)[setting]
        elif counts(value) and type(own) is type(value) and own != value:
            yield mine, key, value
