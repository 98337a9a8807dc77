"""Packed layouts read one value and one bit at a time, from their description, with none of the product's code."""

import torch

AWQ_PLACES = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}  # output among eight -> nibble of the word


def bit(words, position):
    """Bit `position` of a list of 32-bit words, the lowest of the first word being number 0."""
    return (words[position // 32] >> (position % 32)) & 1


def field(words, number, bits):
    """Unsigned field `number` of a dense stream of `bits`-bit fields."""
    return sum(bit(words, number * bits + i) << i for i in range(bits))


def gptq(qweight, qzeros, scales, g_idx, bits, v2):
    """The weight [out, in], float64: (q - zero) * scale with unsigned q and zero."""
    inputs, outputs = len(g_idx), scales.shape[1]
    zeros = [[field(row, o, bits) + (0 if v2 else 1) for o in range(outputs)] for row in qzeros.tolist()]
    weight = torch.zeros(outputs, inputs, dtype=torch.float64)
    for o in range(outputs):
        words = qweight[:, o].tolist()
        for i in range(inputs):
            group = int(g_idx[i])
            weight[o, i] = (field(words, i, bits) - zeros[group][o]) * float(scales[group, o])
    return weight


def awq(qweight, qzeros, scales):
    """The weight [out, in], float64, of AWQ's GEMM layout at 4 bits."""
    inputs, (groups, outputs) = qweight.shape[0], scales.shape

    def nibble(matrix, row, o):
        return (int(matrix[row, o // 8]) >> (4 * AWQ_PLACES[o % 8])) & 15

    weight = torch.zeros(outputs, inputs, dtype=torch.float64)
    for i in range(inputs):
        group = i * groups // inputs
        for o in range(outputs):
            weight[o, i] = (nibble(qweight, i, o) - nibble(qzeros, group, o)) * float(scales[group, o])
    return weight
