"""What the config does not say of a model: shapes of linears, and modules of passes, taken from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .errors import ModelError


def adopt(model: Any, state: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> list[str]:
    """Give the linears of `model` the weights and biases of `state` that did not fit.

    Args:
        state: the checkpoint's tensors under the names that transformers saves.
        info: what `from_pretrained` told: `mismatched_keys` and `unexpected_keys`, under the model's own names.

    Returns:
        Names of tensors that no linear can take, but for those of modules that are not there (see `fill`).
    """
    from transformers.core_model_loading import revert_weight_conversion

    modules = dict(model.named_modules())
    strange = []
    for name in sorted({key[0] for key in info["mismatched_keys"]} | set(info["unexpected_keys"])):
        path, _, key = name.rpartition(".")
        if path not in modules:
            continue
        (saved,) = revert_weight_conversion(model, {name: torch.zeros(1)})
        module = modules[path]
        if not isinstance(module, nn.Linear) or key not in ("weight", "bias") or saved not in state:
            strange.append(name)
            continue
        setattr(module, key, nn.Parameter(state[saved].to(module.weight.dtype).contiguous()))
        module.out_features, module.in_features = module.weight.shape
    return strange


def fill(model: Any, state: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
    """Give the modules that passes put onto `model` their tensors of `state`, in the shapes that these have there.

    Args:
        names: of tensors that the model as built from its config did not take, as it calls them.

    Raises:
        ModelError: a tensor for which there is no module.
    """
    from transformers.core_model_loading import revert_weight_conversion

    modules = dict(model.named_modules())
    for name in names:
        path, _, key = name.rpartition(".")
        (saved,) = revert_weight_conversion(model, {name: torch.zeros(1)})
        module = modules.get(path)
        if module is None or key not in module._parameters or saved not in state:
            raise ModelError("the saved model has a weight that nothing takes", where=name)
        old = module._parameters[key]
        dtype = state[saved].dtype if old is None else old.dtype
        module._parameters[key] = nn.Parameter(state[saved].to(dtype).contiguous())
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
