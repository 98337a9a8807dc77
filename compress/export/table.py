"""The formats that `svlm export` writes: what each can express, where it runs packed, where its loader unpacks it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from ..errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Format:
    """One row.

    Attributes:
        module: the file in this folder that writes it.
        bits: numbers of bits. groups: sizes of a group of inputs that share a scale (-1: a whole row); None for any.
        grids: how symmetric and asymmetric grids, and several kinds in one model, are expressed.
        packed: where the weights stay packed in memory. unpacked: whose loader decompresses them, and when.
        loader: the project whose loader proves it in tests/peers.
    """

    module: str
    bits: tuple[int, ...]
    groups: tuple[int, ...] | None
    grids: str
    packed: str
    unpacked: str
    loader: str


_GPTQ = Format(
    module="gptq",
    bits=(2, 3, 4, 8),
    groups=(-1, 16, 32, 64, 128, 256, 512, 1024),
    grids="one kind in a model; symmetric, and asymmetric where no zero point is 0",
    packed="gptqmodel on CPU at 4 bits with groups of 32 to 256; its GPU kernels, which svlm does not test",
    unpacked="gptqmodel on CPU with other bits or groups: a linear at a time, in every forward",
    loader="transformers + optimum + gptqmodel",
)

FORMATS: dict[str, Format] = {
    "compressed-tensors": Format(
        module="compressed_tensors",
        bits=(2, 3, 4, 8),
        groups=None,
        grids="symmetric, asymmetric, several kinds in one model; inputs rounded to 8 bits",
        packed="svlm.load, and runtimes with kernels for it",
        unpacked="stock transformers: while it loads, so memory and speed are those of 16 bits",
        loader="transformers + compressed-tensors",
    ),
    "gptq": _GPTQ,
    "gptq_v2": Format(
        **{**vars(_GPTQ), "grids": "one kind in a model; symmetric and asymmetric"},
    ),
    "awq": Format(
        module="awq",
        bits=(4,),
        groups=(-1, 16, 32, 64, 128),
        grids="one kind in a model; symmetric (written with zero points of 8) and asymmetric",
        packed="gptqmodel on CPU with groups of 32 to 128; its GPU kernels, which svlm does not test",
        unpacked="gptqmodel on CPU with groups of 16 and -1: a linear at a time, in every forward",
        loader="transformers + gptqmodel",
    ),
    "bnb": Format(
        module="bnb",
        bits=(4, 8),
        groups=(64, -1),
        grids="4 bits: the codes of quantize.bnb (NF4, FP4); 8 bits: symmetric, one scale a row, of any pass; one of "
        "the two in a model",
        packed="bitsandbytes on CPU; its GPU kernels, which svlm does not test. 8 bits: inputs are rounded as well",
        unpacked="4 bits on CPU where there is more than one token: a linear at a time, in every forward",
        loader="transformers + bitsandbytes",
    ),
}


def find_format(name: str) -> Format:
    """The row of a format. UsageError for a name that is not in the table."""
    if name not in FORMATS:
        raise UsageError(f"no format '{name}'", change=did_you_mean(name, FORMATS))
    return FORMATS[name]


def format_table() -> str:
    """The table as text, for --help."""
    lines = []
    for name, row in FORMATS.items():
        groups = "any group" if row.groups is None else f"group {spell(row.groups)}"
        lines.append(f"  {name}: {spell(row.bits)} bits; {groups}")
        for label, text in (("grids", row.grids), ("packed", row.packed), ("unpacked", row.unpacked)):
            lines += textwrap.wrap(f"{label}: {text}", 104, initial_indent="      ", subsequent_indent="        ")
        lines += [f"      loader: {row.loader}"]
    return "\n".join(lines)


def spell(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
