"""Where the time of a walk goes: each second belongs to exactly one kind of work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

KINDS = ("forward", "statistics", "balance", "solve", "write")


class Clock:
    """Adds the seconds of nested work to `seconds`; what is inside belongs to the inner kind and not to the outer.

    Kinds: ``forward`` runs the model or a unit; ``statistics`` grow from a linear's inputs; ``balance`` measures the
    gradient ratios; ``solve`` is all else that the pass does with a unit; ``write`` keeps a finished unit on disk.
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = {} if seconds is None else seconds
        self._inner = [0.0]  # by depth: seconds that belong to what is nested there

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            own = spent - self._inner.pop()
            self._inner[-1] += spent
            self.seconds[kind] = self.seconds.get(kind, 0.0) + own
