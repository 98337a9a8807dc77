"""AWQ's scale and clip search as loops over channels, rows, groups and tokens (arXiv 2306.00978), in float64.

Written from the paper's equations and methods' constants with none of the product's code.
"""

import math

import torch


def scales(x, w, ratio, duo):
    """s_j = x_j^r (over w_j^(1-r) with `duo`), over sqrt(max * min); channels that are 0 keep 1."""
    raw = {}
    for j in range(len(x)):
        if float(x[j]) > 0:
            value = max(float(x[j]), 1e-4) ** ratio
            if duo:
                value /= max(float(w[j]), 1e-4) ** (1 - ratio)
            raw[j] = max(value, 1e-4)
    middle = math.sqrt(max(raw.values()) * min(raw.values()))
    return torch.tensor([raw[j] / middle if j in raw else 1.0 for j in range(len(x))], dtype=torch.float64)


def relative_weights(w, group):
    """[in]: mean over rows of |w| over the largest of its group."""
    rows, columns = w.shape
    mean = torch.zeros(columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            first = j // group * group
            mean[j] += abs(float(w[i, j])) / max(float(w[i, first : first + group].abs().max()), 1e-12) / rows
    return mean


def rounded(values, clamped, bits, symmetric):
    """A group of one row on the plain grid of its clamped values (where symmetric, one level lies below)."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scale = max(abs(v) for v in clamped) / high
    else:
        scale = (max(*clamped, 0.0) - min(*clamped, 0.0)) / (high - low)
    scale = float(torch.tensor(scale, dtype=torch.float32).to(torch.bfloat16)) or 1.0
    zero = 0 if symmetric else min(max(round(low - min(*clamped, 0.0) / scale), low), high)
    q = [(min(max(round(v / scale) + zero, low), high) - zero) * scale for v in values]
    return torch.tensor(q, dtype=torch.float32).to(torch.bfloat16).tolist()


def clip(w, x, weights, bits, group, symmetric, steps=10, shrink=0.5):
    """The best share of the largest weight for every row and group, and the error that it leaves, [out, groups]."""
    shares, errors = [], []
    for row in w.double().tolist():
        shares.append([])
        errors.append([])
        for first in range(0, len(row), group):
            part, best = row[first : first + group], None
            for step in range(steps):
                bound = (1 - shrink * step / steps) * max(abs(v) for v in part)
                q = rounded(part, [min(max(v, -bound), bound) for v in part], bits, symmetric)
                error = 0.0
                for token, weight in zip(x.double().tolist(), weights.tolist(), strict=True):
                    there = token[first : first + group]
                    error += weight * sum((a - b) * c for a, b, c in zip(q, part, there, strict=True)) ** 2
                if best is None or error < best[0]:
                    best = (error, 1 - shrink * step / steps)
            errors[-1].append(best[0])
            shares[-1].append(best[1])
    return torch.tensor(shares), torch.tensor(errors)
