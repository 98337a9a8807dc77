"""Linears whose shapes the config does not say: taking them from the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def adopt(model: Any, state: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> list[str]:
    """Give the linears of `model` the weights and biases of `state` that did not fit.

    Args:
        state: the checkpoint's tensors under the names that transformers saves.
        info: what `from_pretrained` told: `mismatched_keys` and `unexpected_keys`, under the model's own names.

    Returns:
        Names of tensors that no linear can take.
    """
    from transformers.core_model_loading import revert_weight_conversion

    modules = dict(model.named_modules())
    strange = []
    for name in sorted({key[0] for key in info["mismatched_keys"]} | set(info["unexpected_keys"])):
        path, _, key = name.rpartition(".")
        (saved,) = revert_weight_conversion(model, {name: torch.zeros(1)})
        module = modules.get(path)
        if not isinstance(module, nn.Linear) or key not in ("weight", "bias") or saved not in state:
            strange.append(name)
            continue
        setattr(module, key, nn.Parameter(state[saved].to(module.weight.dtype).contiguous()))
        module.out_features, module.in_features = module.weight.shape
    return strange
