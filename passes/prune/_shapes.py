"""Which change of a model's config gives it the wanted shapes, and how a live model takes them on.

No table of families: a handful of keys that configs use for widths and head counts are tried, the model is built from
the edited config on the meta device (no memory, no data), and its shapes are compared with the wanted ones. What passes
is what a stock `from_pretrained` will build; what does not is refused with the tensor that stands in the way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...compress.blueprint import blueprint, config_tree, shapes_of
from ...compress.errors import Unmet
from ._groups import Target, attention_of, mlp_of

MLP_KEYS = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff")
HEAD_KEYS = ("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
KV_KEY, DIM_KEY = "num_key_value_heads", "head_dim"
KEYS = (*MLP_KEYS, *HEAD_KEYS, KV_KEY, DIM_KEY)

Edits = dict[str, int]  # "text_config.intermediate_size" -> value


def find_edits(model: Any, targets: Sequence[Target]) -> tuple[Edits, nn.Module]:
    """The config edits after which the model has the shapes of `targets`, and that model on the meta device.

    Raises:
        Unmet: no stock config says these shapes.
    """
    now = shapes_of(model)
    wanted = dict(now)
    for target in targets:
        for path, (rows, columns) in target.shapes().items():
            wanted[f"{path}.weight"] = (rows, columns)
            if f"{path}.bias" in now:
                wanted[f"{path}.bias"] = (rows,)
    config = copy.deepcopy(model.config)
    edits: Edits = {}
    built = blueprint(model, config)
    current, obstacles = shapes_of(built), []
    for trial in _candidates(config, targets):
        if current == wanted:
            break
        edited = edit(copy.deepcopy(config), trial)
        try:
            attempt = blueprint(model, edited)
        except Exception as error:  # configs refuse head counts in their own ways
            obstacles.append(f"{_say(trial)}: {str(error).strip().splitlines()[-1].strip()}")
            continue
        shapes = shapes_of(attempt)
        changed = {name for name in {*shapes, *current} if shapes.get(name) != current.get(name)}
        wrong = sorted(name for name in changed if shapes.get(name) != wanted.get(name))
        if wrong:
            obstacles.append(f"{_say(trial)} would also change {wrong[0]}")
        elif changed:
            edits |= trial
            config, built, current = edited, attempt, shapes
        else:
            obstacles.append(f"{_say(trial)} would change nothing")
    missing = sorted(name for name in wanted if current.get(name) != wanted[name])
    if missing:
        raise Unmet(
            "no stock config expresses these shapes, so `from_pretrained` could not load them",
            found=f"{missing[0]} to become {wanted[missing[0]]}" + ("; " + "; ".join(obstacles) if obstacles else ""),
            change="select all blocks of the part, or another 'what' or 'where'",
        )
    return edits, built


def _candidates(config: Any, targets: Sequence[Target]) -> Iterator[Edits]:
    """Edits worth trying, each on top of those accepted before."""
    widths = {(mlp_of(t.unit).width, t.size) for t in targets if t.kind == "mlp"}
    for old, new in sorted(widths):
        for place, part in config_tree(config):
            for key in MLP_KEYS:
                if vars(part).get(key) == old:
                    yield {f"{place}{key}": new}
    heads = {(a.n_heads, a.n_kv_heads, a.head_dim, t.size, t.groups) for t, a in _with_heads(targets)}
    for n_heads, n_kv, head_dim, new_heads, new_kv in sorted(heads):
        for place, part in config_tree(config):
            for key in HEAD_KEYS:
                if vars(part).get(key) != n_heads:
                    continue
                trial = {f"{place}{key}": new_heads, f"{place}{DIM_KEY}": head_dim}
                if vars(part).get(KV_KEY) == n_kv:
                    trial[f"{place}{KV_KEY}"] = new_kv
                yield trial


def _with_heads(targets: Sequence[Target]) -> list[tuple[Target, Any]]:
    return [(t, attention_of(t.unit)) for t in targets if t.kind == "heads"]


def _say(trial: Edits) -> str:
    return ", ".join(f"{key}={value}" for key, value in trial.items())


def edit(config: Any, edits: Mapping[str, int]) -> Any:
    """Set the values in place; returns `config`."""
    parts = dict(config_tree(config))
    for path, value in edits.items():
        place, dot, key = path.rpartition(".")
        setattr(parts[place + dot], key, value)
    return config


def take_on(model: Any, built: nn.Module, edits: Mapping[str, int]) -> None:
    """Make everything on `model` but its weights what it is on `built`: config values, and counts kept by modules.

    Linears whose shape differs get new, empty parameters of the right shape.
    """
    edit(model.config, edits)
    theirs = dict(built.named_modules())
    for name, mine in model.named_modules():
        other = theirs.get(name)
        if other is None:  # something that a pass put onto the model
            continue
        for key, value in vars(other).items():
            own = vars(mine).get(key)
            if type(value) is int and type(own) is int and own != value:
                setattr(mine, key, value)
            elif key == "config" and own is not None:
                _same_values(own, value)
        for key, parameter in list(mine.named_parameters(recurse=False)):
            shape = other.get_parameter(key).shape
            if parameter.shape != shape:
                empty = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
                setattr(mine, key, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def _same_values(mine: Any, theirs: Any) -> None:
    """Widths and head counts of a module's own copy of its config."""
    for (_, own), (_, other) in zip(config_tree(mine), config_tree(theirs), strict=True):
        for key in KEYS:
            if key in vars(other) and vars(own).get(key) != vars(other)[key]:
                setattr(own, key, vars(other)[key])
