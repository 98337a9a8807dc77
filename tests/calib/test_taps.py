"""Which blocks are read by more than their successor: right for every pattern, and in few runs of the model."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from svlm.calib.replay import Probe


def probed(readers: dict[str, set[str]], names: list[str]) -> tuple[set[str], int]:
    """What a probe finds of a stack in which `readers` reads each block's output, and in how many runs."""
    probe = object.__new__(Probe)
    probe.successor, probe.tapped = dict(pairwise(names)), set()
    runs = 0

    def read_elsewhere(_batch: Any, _outputs: Any, paths: list[str]) -> bool:
        nonlocal runs
        runs += 1
        allowed = {probe.successor[path] for path in paths}
        return any(reader not in allowed for path in paths for reader in readers[path])

    probe._read_elsewhere = read_elsewhere  # type: ignore[assignment]
    probe._find_taps({}, {name: [0] for name in names})
    return probe.tapped, runs


@pytest.mark.parametrize("blocks", [2, 3, 8, 42])
def test_every_block_that_something_else_reads_is_found(blocks: int) -> None:
    rng, names = random.Random(blocks), [str(number) for number in range(blocks)]
    for _ in range(50):
        readers: dict[str, set[str]] = {a: {b} for a, b in pairwise(names)}
        for path in rng.sample(names[:-1], rng.randint(0, min(3, blocks - 1))):
            readers[path].add(rng.choice([*names, "outside"]))
        wanted = {path for path, after in pairwise(names) if readers[path] != {after}}
        assert probed(readers, names)[0] == wanted


def test_a_stack_that_nothing_else_reads_takes_few_runs() -> None:
    names = [str(number) for number in range(42)]
    tapped, runs = probed({a: {b} for a, b in pairwise(names)}, names)
    assert not tapped and runs == 12, "two for each of the six bits of 41 numbers"
