"""One thread for work in pieces so small that waking a second one takes longer than the piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside (or in a function that it decorates) torch computes with one thread, afterwards with as many as before.

    Of this Python thread: one that is begun meanwhile computes with one thread until it is told otherwise.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
