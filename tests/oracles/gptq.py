"""GPTQ as one would write it first: a column at a time, no blocks, the inverse Hessian updated by elimination.

Written from Algorithm 1 and equations 2 and 3 of arXiv 2210.17323, in float64, with none of the product's code: the
remaining inverse Hessian is shrunk by Gaussian elimination after every column instead of using a Cholesky factor.
"""

import torch


def scales(w, bits, symmetric):
    """One row's scale and zero of a group `w` [out, columns], rounded to bfloat16; integers are signed."""
    high, low = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    if symmetric:
        scale = (w.abs().amax(1) / high).to(torch.bfloat16).double()
        scale[scale == 0] = 1.0
        return scale, torch.zeros_like(scale)
    top, bottom = w.amax(1).clamp(min=0), w.amin(1).clamp(max=0)
    scale = ((top - bottom) / (high - low)).to(torch.bfloat16).double()
    scale[scale == 0] = 1.0
    return scale, (low - bottom / scale).round().clamp(low, high)


def point(value, scale, zero, bits):
    q = ((value / scale).round() + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return ((q - zero) * scale).to(torch.bfloat16).double()


def gptq(w, h, bits, group, symmetric, damp=0.01, act_order=True, drift=None, mask=None):
    """The rounded weight and its error ``tr((W - Q) H (W - Q)^T)``.

    With `drift` (GPTAQ, arXiv 2504.02692) the columns still to come also take, after every column i, the change that
    answers best to ``w_i (x_original_i - x_i)``: ``w_i D_iF (H_FF)^-1``, F the columns to come.

    Where `mask` [out, in] is true, weights are rounded to 0 whatever they have become.
    """
    mask = torch.zeros(w.shape, dtype=torch.bool) if mask is None else mask
    original, h = w.double(), h.double()
    w, columns = original.clone(), w.shape[1]
    size = columns if group == -1 else group
    damped = h.clone()
    dead = torch.diag(h) == 0
    damped[dead, dead] = 1.0
    w[:, dead] = 0.0
    damped += damp * torch.diag(damped).mean() * torch.eye(columns, dtype=torch.float64)
    order = torch.argsort(torch.diag(h), descending=True, stable=True) if act_order else torch.arange(columns)
    before = [scales(w[:, g * size : (g + 1) * size], bits, symmetric) for g in range(columns // size)]
    inverse = torch.linalg.inv(damped)
    left = order.tolist()
    rounded = torch.zeros_like(w)
    current = before[0]
    for step, column in enumerate(order.tolist()):
        if act_order:
            current = before[column // size]
        elif step % size == 0:
            inside = slice(column, column + size)
            current = scales(torch.where(mask[:, inside], 0.0, w[:, inside]), bits, symmetric)
        rounded[:, column] = torch.where(mask[:, column], 0.0, point(w[:, column], *current, bits))
        before_error = w[:, column].clone()
        error = (w[:, column] - rounded[:, column]) / inverse[column, column]
        w[:, left] -= error[:, None] * inverse[column, left][None, :]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column, :]) / inverse[column, column]
        left.remove(column)
        if drift is not None and left:
            w[:, left] += before_error[:, None] * (
                drift.double()[column, left] @ torch.linalg.inv(damped[left][:, left])
            )
    difference = original - rounded
    return rounded, float(((difference @ h) * difference).sum())
