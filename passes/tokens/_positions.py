"""Learned position embeddings for another number of patches: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def resized(table: Tensor, before: int, after: int, axis: int = 0) -> Tensor:
    """A table of position embeddings for `after` x `after` patches instead of `before` x `before`.

    Bicubic (a = -0.75), half-pixel centres, no antialiasing, in float32: what transformers compute as they interpolate
    positions on the fly. Rows before the patches (a class token) stay as they are.

    Args:
        table: `axis` counts extra rows and then patches, row by row; exactly one other axis is longer than 1.

    Returns:
        The same with after^2 in place of before^2, in the dtype of `table`.
    """
    moved = table.movedim(axis, 0)
    extra = len(moved) - before**2
    flat = moved.reshape(len(moved), -1)
    grid = flat[extra:].float().T.reshape(1, -1, before, before)
    small = interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    patches = small.reshape(-1, after**2).T.to(table.dtype)
    made = torch.cat([flat[:extra], patches])
    return made.reshape(len(made), *moved.shape[1:]).movedim(0, axis).contiguous()
