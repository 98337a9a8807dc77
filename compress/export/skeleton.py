"""Which linears another loader may replace by one without `weight`: found out on a model without data.

transformers initialises some modules through the weights of their linears (SigLIP's and T5's attention), even where
everything is about to be loaded. A packed linear has no weight there, and loading fails. No list of such classes is
kept: the model is built without data, its linears are taken for ones without weight, and its initialisation is run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class _Touched(AttributeError):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class _Stub:
    """What some packed linears have for a weight: it is there, and cannot be used."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getattr__(self, name: str) -> Any:
        raise _Touched(self.path)


class _Packed(nn.Module):
    """Stands where a packed linear will: without a weight, or with a stub for one."""

    def __init__(self, path: str, stub: bool) -> None:
        super().__init__()
        self.path, self.stub = path, stub

    def __getattr__(self, name: str) -> Any:
        if name != "weight":
            return super().__getattr__(name)
        if self.stub:
            return _Stub(self.path)
        raise _Touched(self.path)


def initialised_by_weight(model: Any, paths: Iterable[str], *, stub: bool) -> set[str]:
    """Those of the linears at `paths` whose weight the initialisation of `model` (a PreTrainedModel) cannot do without.

    Args:
        stub: the packed linear has a `weight` that is no tensor, so that code which asks whether there is one uses it.
    """
    from transformers import PreTrainedModel

    paths = list(paths)
    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(model.config))
    kept = {path: bare.get_submodule(path) for path in paths}
    for path in paths:
        bare.set_submodule(path, _Packed(path, stub))
    above = {path.rpartition(".")[0] for path in paths}
    above |= {name.rpartition(".")[0] for name in above}
    touched: set[str] = set()
    for name, module in bare.named_modules():
        if name not in above or isinstance(module, PreTrainedModel):
            continue
        owner = _owner(bare, name)
        while (found := _asks(owner, module)) is not None:
            touched.add(found)
            bare.set_submodule(found, kept[found])
    return touched


def _asks(owner: Any, module: nn.Module) -> str | None:
    """The linear whose weight the initialisation of `module` asks for first; None where it asks for none."""
    try:
        owner._init_weights(module)
    except _Touched as error:
        return error.path
    return None


def _owner(model: Any, path: str) -> Any:
    """The innermost PreTrainedModel above `path`: the one that initialises it."""
    from transformers import PreTrainedModel

    words = path.split(".")
    above = (model.get_submodule(".".join(words[:depth])) for depth in range(len(words) - 1, -1, -1))
    return next(module for module in above if isinstance(module, PreTrainedModel))
