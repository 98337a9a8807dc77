"""bitsandbytes' 4-bit formats one weight at a time, from their papers; none of the product's code.

NF4 (QLoRA, arXiv 2305.14314): 8 levels from 0 up and 8 from 0 down, each at evenly spaced probabilities of a normal
distribution, the outermost at the mean of 1 - 1/32 and 1 - 1/30, scaled to 1. FP4: a sign and 2 bits of exponent, 1 of
mantissa. The dynamic type (arXiv 1511.04561): per decade twice as many values as in the one below.
"""

import json
import struct
from statistics import NormalDist

import torch


def nf4():
    inverse, outer = NormalDist().inv_cdf, 1 - (1 / 32 + 1 / 30) / 2

    def side(n):
        return [inverse(outer + (0.5 - outer) * i / n) for i in range(n)]

    return [-x / side(7)[0] for x in side(7)] + [0.0] + [x / side(8)[0] for x in side(8)][::-1]


FP4 = [x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)]


def levels(name):
    return nf4() if name == "nf4" else FP4


def f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def dynamic():
    values = [0.0, 1.0]
    for decade in range(7):
        n = 2**decade
        for i in range(n):
            centre = 0.1 + 0.9 * (i + 0.5) / n
            values += [centre * 10 ** (decade - 6), -centre * 10 ** (decade - 6)]
    return sorted(values)


def closest(x, values):
    return min(range(len(values)), key=lambda i: abs(x - values[i]))


def blockwise(w, name):
    """(what each weight is taken for, as a share of its block's absmax, and the absmax of each block), float64."""
    flat = w.double().flatten().tolist()
    table, shares, absmax = levels(name), [], []
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        absmax.append(max(abs(x) for x in block))
        shares += [table[closest(x / (absmax[-1] or 1.0), table)] for x in block]
    return shares, absmax


def read(tensors, name):
    """The weight [out, in], float64, of the tensors that a checkpoint holds of a linear, by their names after `X.`."""
    facts = json.loads(bytes(tensors[f"weight.quant_state.bitsandbytes__{name}"].tolist()))
    table, absmax = tensors["weight.quant_map"].tolist(), tensors["weight.absmax"].tolist()
    if "nested_offset" in facts:
        inner, run = tensors["weight.nested_quant_map"].tolist(), facts["nested_blocksize"]
        outer = tensors["weight.nested_absmax"].tolist()
        absmax = [f32(f32(inner[q] * outer[i // run]) + facts["nested_offset"]) for i, q in enumerate(absmax)]
    out, columns = facts["shape"]
    values = []
    for byte in tensors["weight"].flatten().tolist():
        values += [table[byte // 16], table[byte % 16]]
    flat = [values[i] * absmax[i // facts["blocksize"]] for i in range(out * columns)]
    return torch.tensor(flat, dtype=torch.float64).view(out, columns)
