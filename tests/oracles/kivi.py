"""KIVI's cache (arXiv 2402.02750) one number at a time: what attention sees of one head of one row."""

from __future__ import annotations


def rounded(group: list[float], bits: int) -> list[float]:
    """A group on its grid between its smallest and its largest value."""
    low, high = min(group), max(group)
    if low == high:
        return list(group)
    step = (high - low) / (2**bits - 1)
    return [low + step * int((x - low) / step + 0.5) for x in group]


def seen(tokens: list[list[float]], *, keys: bool, bits: int, group: int, width: int, residual: int, sink: int):
    """The states that are held of `tokens` (each a list of channels). `width`: channels of a value's group."""
    out = [list(token) for token in tokens]
    start = sink
    while start + group + residual <= len(tokens):
        if keys:
            for channel in range(len(tokens[0])):
                column = rounded([tokens[t][channel] for t in range(start, start + group)], bits)
                for t, value in enumerate(column):
                    out[start + t][channel] = value
        else:
            for t in range(start, start + group):
                for c in range(0, len(tokens[0]), width):
                    out[t][c : c + width] = rounded(tokens[t][c : c + width], bits)
        start += group
    return out
