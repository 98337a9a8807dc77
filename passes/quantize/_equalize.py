"""Input channels of one size before they are rounded, after data-free weight equalization (arXiv 1906.04721).

The weights of a group share a scale, which its largest one sets. Where the columns of a group differ in size, as where
a norm or an `up` projection lets some channels become far larger than others and the weights behind make up for it, the
small columns are left with few of the levels. The sizes can be moved to what writes the channels (`_fold`), without
data and exactly but for the rounding of norms' biases. With ``c_j`` what an error in column j costs and ``s_j`` its new
scale, rounding costs about ``sum_rows range(w s)^2 sum_j c_j / s_j^2``; where a range grows as the root mean square
does, the least is at ``s_j^4 = c_j / rms_j^2``, and where the largest column sets it, at ``s_j = 1 / rms_j``. The
exponent `POWER` lies between; c, to the small power that it then gets, changes next to nothing, so that no data is
asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...compress.mapped import release
from ._fold import fold, joined, pairs_of

if TYPE_CHECKING:
    from ...compress.anatomy import LinearRef, ModelView

POWER = 0.8


def column_scale(w: torch.Tensor, power: float = POWER) -> torch.Tensor:
    """By what to multiply each column of `w` [out, in], [in] float32: ``rms_j^-power``, their geometric mean 1.

    Columns of zeros, or with a value that is not finite, keep 1.
    """
    rms = w.float().square().mean(0).sqrt()
    usable = (rms > 0) & rms.isfinite()
    size = torch.where(usable, rms, 1.0).log()
    middle = size[usable].mean() if bool(usable.any()) else 0.0
    return torch.where(usable, (-power * (size - middle)).exp(), 1.0)


def equalize(model: ModelView, refs: Iterable[LinearRef], power: float = POWER) -> int:
    """Equalize the input channels of the linears `refs` wherever they can be moved; the model's function stays.

    They can where all linears that read a norm are among `refs`, or where the linear before is: its rows are scaled,
    which changes no grid of rows, but would be rounded when it is saved as it is.

    Returns:
        The number of linears that were equalized.
    """
    by_unit: dict[object, list[LinearRef]] = {}
    for ref in refs:
        by_unit.setdefault(ref.unit, []).append(ref)
    count = 0
    for mine in by_unit.values():
        paths = {ref.path for ref in mine}
        for pair in reversed(list(pairs_of(model, mine[0].unit, mine))):  # `down` first: it scales rows of `up`
            writer = model.model.get_submodule(pair.source)
            if pair.obstacle is None and (pair.source in paths or not isinstance(writer, nn.Linear)):
                fold(model, pair, column_scale(joined(pair.targets), power))
                count += len(pair.targets)
        for parameter in mine[0].unit.module.parameters():
            release(parameter)
    return count


__all__ = ["POWER", "column_scale", "equalize"]
