"""HQQ group by group in plain Python numbers, from its equations; none of the product's code.

A group is a list of floats. The error's p-norm is split by an auxiliary error e: in turns, ``e = shrink(w - w^)`` and
``z = mean(q - (w - e) / s)``, rounded; with a moving scale ``s = <w - e, q - z> / <q - z, q - z>``.
"""

import torch


def bf16(x):
    return float(torch.tensor(x).to(torch.bfloat16))


def f32(x):
    return float(torch.tensor(x, dtype=torch.float32))


def nearest_even(x):
    return float(torch.tensor(x, dtype=torch.float32).round())


def plain(w, bits, symmetric):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        s = bf16(max(abs(x) for x in w) / high)
        return (s or 1.0), 0
    top, bottom = max(0.0, *w), min(0.0, *w)
    s = bf16((top - bottom) / (high - low)) or 1.0
    return s, min(max(nearest_even(low - bottom / s), low), high)


def integers(w, s, z, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return [min(max(nearest_even(f32(x) / s) + z, low), high) for x in w]


def error(w, s, z, bits, p):
    return sum(abs(x - bf16((q - z) * s)) ** p for x, q in zip(w, integers(w, s, z, bits)))


def shrunk(e, p, beta):
    if e == 0:
        return 0.0
    size = max(abs(e) - abs(e) ** (p - 1) / beta, 0.0)
    return size if e > 0 else -size


def group(w, bits, symmetric, p=0.7, iterations=20, beta=10.0, kappa=1.01):
    """(scale, zero) with the least ``sum |w - w^|^p`` on the way."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    first = plain(w, bits, symmetric)
    unit, best, least = first[0], first, error(w, *first, bits, p)
    for moving in [True] if symmetric else [False, True]:
        (s, z), tie = first, beta
        for _ in range(iterations):
            q = integers(w, s, z, bits)
            fit = [x - unit * shrunk((x - bf16((i - z) * s)) / unit, p, tie) for x, i in zip(w, q)]
            if not symmetric:
                z = min(max(nearest_even(sum(i - f / s for i, f in zip(q, fit)) / len(w)), low), high)
            if moving:
                length = sum((i - z) ** 2 for i in q)
                product = sum((i - z) * f for i, f in zip(q, fit))
                s = bf16(product / length) if length > 0 and product > 0 else s
            tie *= kappa
            now = error(w, s, z, bits, p)
            if now < least:
                best, least = (s, z), now
    return best
