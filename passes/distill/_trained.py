"""What trains: whole blocks, their norms, the connector, low-rank updates, or scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...calib.balance import frozen
from ...compress.anatomy import LinearRef, ModelView, Unit
from ...compress.runtime.codebook import integer_grids
from ._lora import adapted, merge
from ._scales import loosened, settle

Train = Literal["full", "lora", "scales", "connector", "norms"]


@dataclass
class Trained:
    """Parameters to train, and `settle`, which makes the model what it computed with them."""

    parameters: list[nn.Parameter]
    settle: Callable[[], None] = lambda: None


@contextmanager
def training(
    model: ModelView,
    train: Train,
    linears: Sequence[LinearRef],
    more: Sequence[Unit],
    rank: int,
    generator: torch.Generator,
) -> Iterator[Trained]:
    """Nothing of the model asks for gradients inside but what `train` names among `linears` and the units `more`.

    Args:
        linears: that are selected. more: units without linears that train as well, where whole blocks do.
        rank, generator: of LoRA, and of its start.
    """
    with frozen(model.model):
        if train == "lora":
            with adapted([ref.module for ref in linears], rank, generator) as adapters:
                yield Trained([p for one in adapters for p in (one.down, one.up)], lambda: merge(adapters))
        elif train == "scales":
            grids = integer_grids(model.grids)
            paths = [ref.path for ref in linears if ref.path in grids]
            modules = [model.linear(path).module for path in paths]
            with loosened(modules, [grids[path] for path in paths]) as loose:
                yield Trained([one.move for one in loose], lambda: settle(loose))
        else:
            parameters = norms(linears, more) if train == "norms" else whole(linears, more)
            for parameter in parameters:
                parameter.requires_grad_(True)
            with zeros_kept([ref.module.weight for ref in sparse(model, linears)]):
                yield Trained(parameters)


def sparse(model: ModelView, linears: Sequence[LinearRef]) -> list[LinearRef]:
    """Those of which an earlier pass promised zeros."""
    promised = {path for entry in model.ledger for path in entry.record.get("promised_zeros", {})}
    return [ref for ref in linears if ref.path in promised]


@contextmanager
def zeros_kept(weights: Sequence[Tensor]) -> Iterator[None]:
    """What is 0 in `weights` has no gradient inside, and so AdamW leaves it at 0."""

    def silenced(gone: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient.masked_fill(gone, 0)

    hooks = [w.register_hook(silenced(w.detach() == 0)) for w in weights if w.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def whole(linears: Sequence[LinearRef], more: Sequence[Unit]) -> list[nn.Parameter]:
    """All parameters of those units of which every linear is there, of the others those of the linears alone."""
    modules: list[nn.Module] = []
    for unit, mine in _by_unit(linears).items():
        modules += [unit.module] if len(mine) == len(unit.linears) else [ref.module for ref in mine]
    return _floating(p for module in [*modules, *(unit.module for unit in more)] for p in module.parameters())


def norms(linears: Sequence[LinearRef], more: Sequence[Unit]) -> list[nn.Parameter]:
    """Every parameter of one dimension in the units of `linears`: weights and biases of norms, biases, layer scales."""
    modules = [unit.module for unit in [*_by_unit(linears), *more]]
    return _floating(p for module in modules for p in module.parameters() if p.ndim == 1)


def _by_unit(linears: Sequence[LinearRef]) -> dict[Unit, list[LinearRef]]:
    found: dict[Unit, list[LinearRef]] = {}
    for ref in linears:
        found.setdefault(ref.unit, []).append(ref)
    return found


def _floating(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> list[nn.Parameter]:
    """Each once, in order."""
    return list({id(p): p for p in parameters if p.is_floating_point()}.values())
