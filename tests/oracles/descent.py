"""Scales and integers of a rounded weight under its Hessian, the slow way: all choices tried, all systems written out.

Written from the error ``tr((W - Q) H (W - Q)^T)`` alone, in float64, with none of the product's code.
"""

import torch


def error(w, values, h, drift):
    """[out]: every row's error; `drift` adds ``2 (w - q) (w D)^T``."""
    off = w - values
    return torch.stack([o @ h @ o + 2 * o @ (row @ drift) for o, row in zip(off, w, strict=True)])


def sweep(w, ints, scale, zero, bits, h, drift):
    """Column by column, row by row: of all integers of the grid the one with the least error, the others standing."""
    ints = ints.clone()
    out, columns = ints.shape
    size = columns // scale.shape[1]
    for row in range(out):
        for column in range(columns):
            g = column // size
            low, high = -(2 ** (bits - 1)) - zero[row, g], 2 ** (bits - 1) - 1 - zero[row, g]
            best, least = None, None
            for q in range(int(low), int(high) + 1):
                trial = ints[row].clone()
                trial[column] = q
                values = trial * scale[row].repeat_interleave(size)
                now = float(error(w[row : row + 1], values[None], h, drift)[0])
                if least is None or now < least:
                    best, least = q, now
            ints[row, column] = best
    return ints


def scales(w, ints, groups, h, drift):
    """[out, groups]: least squares with one unknown a group, solved with the square root of H."""
    root = torch.linalg.cholesky(h)  # H = R R^T, and the error is |(w - q) R|^2
    size = w.shape[1] // groups
    found = torch.empty(len(w), groups, dtype=w.dtype)
    for row in range(len(w)):
        design = torch.zeros(groups, w.shape[1], dtype=w.dtype)
        for g in range(groups):
            design[g, g * size : (g + 1) * size] = ints[row, g * size : (g + 1) * size]
        target = w[row] + torch.linalg.solve(h, w[row] @ drift)  # completes the square
        found[row] = torch.linalg.lstsq((design @ root).T, (target @ root)[:, None]).solution[:, 0]
    return found
