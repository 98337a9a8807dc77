"""The command line in this process."""

from __future__ import annotations

from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]  # arguments -> exit code, stdout, stderr; the fixture `run`
