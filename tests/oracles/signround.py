"""Learned rounding as one would write it first: the equation of arXiv 2309.05516 with autograd, weight by weight.

None of the product's code. Straight-through rounding is ``x + (round(x) - x).detach()``; the clip is `torch.clamp`,
whose gradient is 0 outside; scales and zero points come from learned ends of a group's range and are rounded the same
way, so that autograd gives every gradient that the product has in closed form.
"""

import torch


def through(x, rounded):
    return x + (rounded - x).detach()


def value(w, shift, upper, lower, scale, zero, bits, dtype):
    """One group: w, shift [columns]; upper, lower, scale, zero are scalars, zero None for a symmetric grid."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if zero is None:
        s = upper * scale
        z = torch.zeros(())
    else:
        top, bottom = upper * (high - zero) * scale, lower * (low - zero) * scale
        s = (top - bottom) / (high - low)
    s = through(s, s.to(dtype).float())
    if zero is not None:
        z = low - bottom / s
        z = through(z, z.round()).clamp(low, high)
    steps = w / s + shift
    q = (through(steps, steps.round()) + z).clamp(low, high)
    exact = (q - z) * s
    return through(exact, exact.to(dtype).float())


def weight(w, shift, upper, lower, scale, zero, bits, group, dtype):
    """[out, in] from loops over rows and groups; shift [out, in], the rest [out, groups]."""
    size = w.shape[1] if group == -1 else group
    rows = []
    for r in range(w.shape[0]):
        cells = []
        for g in range(w.shape[1] // size):
            at = slice(g * size, (g + 1) * size)
            z = None if zero is None else zero[r, g].float()
            cells.append(value(w[r, at], shift[r, at], upper[r, g], lower[r, g], scale[r, g].float(), z, bits, dtype))
        rows.append(torch.cat(cells))
    return torch.stack(rows)


def descend(w, x, wanted, scale, zero, bits, group, dtype, steps):
    """Sign descent on ``mean (x W^T - wanted)^2`` over all of `x` at every step; the weight after the last one."""
    shift = torch.zeros_like(w, requires_grad=True)
    upper = torch.ones(scale.shape, requires_grad=True)
    lower = torch.ones(scale.shape, requires_grad=True)
    learned = [shift, upper] if zero is None else [shift, upper, lower]
    for step in range(steps):
        loss = (x @ weight(w, shift, upper, lower, scale, zero, bits, group, dtype).T - wanted).square().mean()
        slopes = torch.autograd.grad(loss, learned)
        with torch.no_grad():
            for parameter, slope in zip(learned, slopes):
                parameter -= (1 / steps) * (1 - step / steps) * slope.sign()
            shift.clamp_(-0.5, 0.5)
            upper.clamp_(0.5, 1.5)
            lower.clamp_(0.5, 1.5)
    with torch.no_grad():
        return weight(w, shift, upper, lower, scale, zero, bits, group, dtype)
