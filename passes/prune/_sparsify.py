"""What prune.wanda and prune.sparsegpt share: settings, what they refuse, the walk, the promise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import PromiseBroken, SelectorError, Unmet
from ..quantize._common import check_data, check_linears, visual_share

if TYPE_CHECKING:
    from ...calib.stats import Stat
    from ...compress.anatomy import LinearRef, ModelView
    from ._sparse import Pattern

LEAST_SPARSITY = 0.05


@dataclass(frozen=True)
class Sparsify(Pass, ABC):
    """The settings are explained in the passes; `_statistic` and `_prune` are theirs."""

    sparsity: float = 0.5
    pattern: str = "unstructured"
    where: tuple[str, ...] | str = ("vision", "connector", "language")
    token_weights: Literal["drift", "gradient", "balanced", "uniform", "text"] = "drift"
    drift_share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity is a share in (0, 1), not {self.sparsity}")
        if not 0 <= self.drift_share <= 1:
            raise ValueError(f"drift_share is a share in [0, 1], not {self.drift_share}")
        pattern_of(self.pattern)

    @abstractmethod
    def _statistic(self) -> Callable[[], Stat]:
        """What is observed of the inputs."""

    @abstractmethod
    def _prune(self, model: ModelView, stage: Sequence[LinearRef], stat: Any) -> dict[str, dict[str, Json]]:
        """Put zeros into linears that share an input; path -> numbers, `blind` and `dead` among them."""

    def requires(self, model: ModelView, ctx: Context) -> None:
        refs = model.linears(self.where)
        check_linears(self, model, refs)
        check_data(self, ctx)
        pattern = pattern_of(self.pattern)
        if not pattern and all(int(self.sparsity * ref.module.in_features) == 0 for ref in refs):
            widest = max(ref.module.in_features for ref in refs)
            raise Unmet(
                f"{self.name}: a sparsity of {self.sparsity} rounds to nothing",
                where=f"where: {self.where}",
                found=f"rows of at most {widest} weights",
                change="a larger sparsity",
            )
        odd = [ref for ref in refs if pattern and ref.module.in_features % pattern[1]]
        if odd:
            raise Unmet(
                f"{self.name}: pattern {self.pattern} does not divide a linear's inputs",
                where=odd[0].path,
                found=f"{odd[0].module.in_features} inputs; {len(odd)} linears of {len(refs)} like it",
                change="another pattern, 'unstructured', or a 'where' without them",
            )

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        walk = ctx.walk(self.where, name="sparsify", drifting=self.drift_share)
        for unit in walk:
            rows: dict[str, dict[str, Json]] = {}
            for stage in unit.stages:
                stat = unit.observe(self._statistic(), stage, self.token_weights)[stage[0]]
                for path, row in self._prune(model, stage, stat).items():
                    weight = model.weight(path)
                    zeros = {"zeros": int((weight == 0).sum()), "weights": weight.numel()}
                    seen = {"tokens": stat.tokens, "undrifted": stage[0].path in walk.without_drift}
                    rows[path] = zeros | seen | row
            unit.notes["linears"] = rows
        rows = {path: row for notes in walk.notes.values() for path, row in notes["linears"].items()}
        numbers = _numbers(rows)
        if self.token_weights == "drift":
            numbers["linears_without_drift"] = sum(row["undrifted"] for row in rows.values())
        numbers["visual_token_share"] = visual_share(model, ctx.fit)
        numbers["visual_token_weight"] = walk.weights_used(self.token_weights)
        return Notes(numbers, {"promised_zeros": {path: row["zeros"] / row["weights"] for path, row in rows.items()}})

    def ensures(self, model: ModelView) -> None:
        """Every linear that is still there has its share of exact zeros, and the pattern."""
        from ._sparse import follows

        seen, pattern = 0, pattern_of(self.pattern)
        for path, share in model.ledger.record_of(self)["promised_zeros"].items():
            try:
                weight = model.linear(path).module.weight
            except SelectorError:  # its block was taken out
                continue
            seen += 1
            found = float((weight == 0).double().mean())
            if found < share - 1e-9:
                raise PromiseBroken(
                    f"{self.name} promised {100 * share:.1f} % of zeros",
                    where=path,
                    found=f"{100 * found:.1f} %",
                    change="prune after what trains or rounds without regard to zeros",
                )
            if pattern and not follows(weight, pattern):
                raise PromiseBroken(f"{self.name} promised the pattern {self.pattern}", where=path)
        if not seen:
            raise PromiseBroken(f"none of the linears that {self.name} pruned is there any more")

    def weaker(self) -> Self | None:
        """Half the sparsity, down to 0.05; a pattern has nothing milder that the same hardware takes."""
        milder = self.sparsity / 2
        return replace(self, sparsity=milder) if self.pattern == "unstructured" and milder >= LEAST_SPARSITY else None


def pattern_of(text: str) -> Pattern:
    """``"2:4"`` as (2, 4), ``"unstructured"`` as None.

    Raises:
        ValueError: it is neither, or not 0 < n < m.
    """
    if text == "unstructured":
        return None
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise ValueError(f"pattern is 'unstructured' or n:m with 0 < n < m, as in '2:4', not '{text}'")
    return int(n), int(m)


def _numbers(rows: dict[str, dict[str, Json]]) -> dict[str, Json]:
    lost = [row["lost"] for row in rows.values()]
    worst = max(rows, key=lambda path: rows[path]["lost"])
    zeros, weights = (sum(row[key] for row in rows.values()) for key in ("zeros", "weights"))
    return {
        "linears": len(rows),
        "zeros": zeros,
        "sparsity": zeros / weights,
        "mean_lost": sum(lost) / len(lost),
        "most_lost": rows[worst]["lost"],
        "worst_linear": worst,
        "dead_channels": sum(row["dead"] for row in rows.values()),
        "linears_without_tokens": sum(row["tokens"] == 0 for row in rows.values()),
        "pruned_by_magnitude": sum(row["blind"] for row in rows.values()),
        "damp_retries": sum(row["retries"] for row in rows.values()),
        "storage": "a zero takes as many bytes as any other weight",
    }
