"""The exceptions of svlm, in one tree.

::

    SvlmError                    what, where, what was found, what to change; `exit_code` is the command line's
    ├── UsageError        2      the request cannot be carried out as asked; nothing was touched
    │   ├── RecipeError          unknown key, pass or setting; a value of the wrong kind
    │   ├── SelectorError        a `where` that matches nothing
    │   ├── DataError            missing or broken image, empty file, a row without question, no samples
    │   ├── ModelError           checkpoint missing, incomplete, not finite, or of an unknown family
    │   ├── OutputError          OUT exists and is not ours, or cannot be written
    │   └── Unmet                a pass's `requires` does not hold
    ├── GateFailed        1      a gate failed with `on_fail: stop`
    ├── PromiseBroken     1      a pass undid what an earlier pass had promised
    └── WorkFailed        3      the work itself failed: NaN, disk full, reload differs
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SvlmError(Exception):
    """Base of all errors that svlm raises on purpose.

    Args:
        what: what is wrong, one sentence.
        where: the place: file and line, pass index and name, module path, sample.
        found: what was found there.
        change: what the user can do about it.
    """

    exit_code = 3

    def __init__(self, what: str, *, where: str = "", found: str = "", change: str = "") -> None:
        self.what, self.where, self.found, self.change = what, where, found, change
        lines = [what]
        lines += [f"  {label}: {text}" for label, text in (("where", where), ("found", found), ("try", change)) if text]
        super().__init__("\n".join(lines))


class UsageError(SvlmError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class SelectorError(UsageError):
    pass


class DataError(UsageError):
    pass


class ModelError(UsageError):
    pass


class OutputError(UsageError):
    pass


class Unmet(UsageError):
    pass


class GateFailed(SvlmError):
    exit_code = 1


class PromiseBroken(SvlmError):
    exit_code = 1


class WorkFailed(SvlmError):
    exit_code = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"did you mean 'bits'? known: bits, group, ..."`` for an unknown `word`."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(names)}"
