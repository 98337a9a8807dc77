"""The ledger: which passes made a model what it is. Saved with the model as `svlm.json`, replayed by `svlm.load`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from .base import Json
from .errors import ModelError

if TYPE_CHECKING:
    from .base import Pass

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """One pass that was applied: its name, its settings, and what `rebuild` and `ensures` need to know."""

    name: str
    settings: Mapping[str, Json]
    record: Mapping[str, Json] = field(default_factory=dict)


class Ledger:
    """The passes applied to a model, in order."""

    def __init__(self, records: list[Record] | None = None) -> None:
        self._records = list(records or [])

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def uneven(self) -> bool:
        """Whether a pass left linears in shapes that the config does not say, so that only svlm loads the model."""
        return any(entry.record.get("uneven") for entry in self._records)

    def add(self, step: Pass, record: Mapping[str, Json]) -> None:
        """Append what `step` did."""
        self._records.append(Record(step.name, step.settings(), dict(record)))

    def record_of(self, step: Pass) -> Mapping[str, Json]:
        """What the newest application of exactly this pass (name and settings) recorded.

        Raises:
            ModelError: this pass was never applied to the model.
        """
        for entry in reversed(self._records):
            if entry.name == step.name and dict(entry.settings) == step.settings():
                return entry.record
        raise ModelError(
            f"{step.name} was never applied to this model", found=", ".join(r.name for r in self) or "no pass"
        )

    def rename(self, rename: Callable[[str], str | None]) -> None:
        """What the records say by dotted path of a module, they say by its new path; None: of a module that is gone."""

        def anew(value: Json) -> Json:
            if isinstance(value, str):
                return rename(value)
            if isinstance(value, Mapping):
                pairs = ((rename(str(key)), anew(entry)) for key, entry in value.items())
                return {key: entry for key, entry in pairs if key is not None}
            if isinstance(value, (list, tuple)):
                return [entry for entry, old in ((anew(old), old) for old in value) if entry is not None or old is None]
            return value

        self._records = [Record(r.name, r.settings, anew(r.record)) for r in self._records]

    @property
    def promised_zeros(self) -> dict[str, float]:
        """Path of a linear -> the share of zeros that a pass promised of it, as records say under this name."""
        return {path: share for entry in self for path, share in entry.record.get("promised_zeros", {}).items()}

    def to_json(self) -> list[Json]:
        return [asdict(r) for r in self._records]

    @classmethod
    def from_json(cls, rows: list[Json]) -> Ledger:
        return cls([Record(r["name"], r["settings"], r["record"]) for r in rows])
