"""The recipes that ship, by name: `svlm compress MODEL -r NAME`. Each file says in comments what it is for."""

from __future__ import annotations

from pathlib import Path

SHIPPED: dict[str, Path] = {path.stem: path for path in sorted(Path(__file__).resolve().parent.glob("*.yaml"))}
