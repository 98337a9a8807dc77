"""How numbers and settings are spelled, in every table, page and sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"


def size(count: float | None) -> str:
    """Bytes in decimal units: ``1.66 MB``."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def amount(count: float | None) -> str:
    """A count with a metric prefix: ``3.90 M``; whole numbers below a thousand."""
    if count is not None and count < 1000:
        return f"{count:.0f}" if float(count).is_integer() else f"{count:.1f}"
    return _scaled(count, ("", "k", "M", "G", "T", "P"))


def _scaled(count: float | None, units: Sequence[str]) -> str:
    if count is None:
        return NOTHING
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {units[unit]}".rstrip()


def percent(fraction: float | None) -> str:
    """``0.9141`` as ``91.4 %``."""
    return NOTHING if fraction is None else f"{100 * fraction:.1f} %"


def points(fraction: float | None) -> str:
    """A difference of fractions in points, with its sign: ``−1.2``, ``+0.3``, ``0.0``."""
    if fraction is None:
        return NOTHING
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings in one line, as they would stand on the command line."""
    return ", ".join(f"{k} {_value(v)}" for k, v in settings.items() if v is not None)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(_value(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def number(value: float | None, form: str) -> str:
    """`value` by a format spec, or a dash."""
    return NOTHING if value is None else format(value, form)


def signed(value: float | None, form: str = "+.3f") -> str:
    """`value` with its sign by a format spec, a true minus for a hyphen."""
    return number(value, form).replace("-", "−")


def whole(text: str) -> str:
    """`text` with spaces that no line breaks at between a figure and its unit."""
    return re.sub(r"(\d) (%|ms\b|points\b|[kMGT]?B\b)", "\\1\u00a0\\2", text)
