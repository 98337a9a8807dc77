"""A linear that runs in one form for few tokens and in another for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import UsageError
from .table import Run


class KernelLinear(nn.Module):
    """What stands for an `nn.Linear` in a model that only runs.

    It has no parameters and no state: its weight is in forms that depend on this processor and must not reach a disk.
    `weight` is an empty tensor that tells dtype and device to code that asks for them.

    Args:
        forms: (most tokens, form), by rising number of tokens; the last takes any number.
    """

    def __init__(self, linear: nn.Linear, forms: Sequence[tuple[float, Run]], names: Sequence[str]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.forms, self.names = tuple(forms), tuple(names)
        # a trace finds modules by their place in the tree alone
        self.held_for_traces = nn.ModuleList(run for _, run in forms if isinstance(run, nn.Module))
        self.register_buffer("weight", linear.weight.detach().new_empty(0), persistent=False)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.numel() // self.in_features
        if not tokens:
            return x.new_empty(*x.shape[:-1], self.out_features)
        for most, run in self.forms:
            if tokens <= most:
                return run(x)
        raise AssertionError("the last form takes any number of tokens")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise UsageError(
            "a model that runs in kernels cannot be saved",
            where=prefix.removesuffix("."),
            change="load it without runtime=, or copy the folder that it was loaded from",
        )

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {' / '.join(self.names)}"
