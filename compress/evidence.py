"""How much a loss on the check split proves: intervals, one-sided bounds, and the questions that a proof would take.

Questions about one picture are not independent. `design_effect` says how many of them count as one: the variance of
the mean between pictures over the variance that independent flips would have (Kish 1965; Rao and Scott 1992). With n
over it in place of n, the interval is Tango's score interval of a paired difference (Tango 1998, Statistics in
Medicine 17:891), with Student's quantile for the number of pictures. It holds where few answers flip, where a bootstrap
draws the same few pictures again and again; benchmarks/gates.py shows its coverage.

Evidence of a loss: `lost` and `gained`, the sums of losses and of gains over n (for answers that are right or wrong:
the shares of flips); `n`, what the mean is over; `questions`, `images`; `design_effect`. Evidence of a mean such as the
KL: `value`, `error` (standard error over pictures), `skew` (of the pictures' shares), `questions`, `images`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist

from .base import Json

POWER = 0.8  # how often a proof shall succeed, of a model that is as good as the one measured
TYPICAL_FLIPS, TYPICAL_EFFECT = 0.03, 1.25  # before anything is measured: flips, half each way, and their design effect
MOST = 10**8  # questions; beyond it, no number is named

_normal = NormalDist().inv_cdf


def interval(evidence: Mapping[str, Json], confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided interval of the change (gains less losses)."""
    z = student((1 + confidence) / 2, evidence["images"] - 1)
    n = evidence["n"] / evidence["design_effect"]
    return -_loss(evidence["lost"], evidence["gained"], n, z), -_loss(evidence["lost"], evidence["gained"], n, -z)


def bound(evidence: Mapping[str, Json], confidence: float, *, least: bool = False) -> float:
    """The loss (or the mean) that is not exceeded with this confidence, one-sided; with `least`, that is exceeded."""
    z = student(confidence, evidence["images"] - 1) * (-1 if least else 1)
    if "value" in evidence:
        return _skewed(evidence, z)
    return _loss(evidence["lost"], evidence["gained"], evidence["n"] / evidence["design_effect"], z)


def needed(evidence: Mapping[str, Json], allowed: float, confidence: float) -> int | None:
    """Questions after which a model as good as this one proves in four runs of five that it lost no more than allowed.

    Returns:
        None where what was measured is not inside what is allowed: no number would do, or too large a one.
    """
    z = _normal(confidence) + _normal(POWER)

    def proves(questions: int) -> bool:
        times = questions / evidence["questions"]
        if "value" in evidence:
            return bool(evidence["value"] + z * evidence["error"] / math.sqrt(times) <= allowed)
        n = evidence["n"] / evidence["design_effect"] * times
        return _loss(evidence["lost"], evidence["gained"], n, z) <= allowed

    return _first(proves)


def least(allowed: float, confidence: float) -> int:
    """Questions below which no model can prove it, not even one without a flip: ``z^2 / (n + z^2) <= allowed``."""
    return math.ceil(_normal(confidence) ** 2 * (1 / allowed - 1))


def likely(allowed: float, confidence: float) -> int | None:
    """`needed` of a model that lost nothing, with as many flips as are usual (`TYPICAL_FLIPS`)."""
    half = TYPICAL_FLIPS / 2
    return needed(
        {"lost": half, "gained": half, "n": 1, "questions": 1, "design_effect": TYPICAL_EFFECT}, allowed, confidence
    )


def rounded(questions: int) -> int:
    """Up to two digits that say something: 1,834 is 1,900."""
    step = int(10 ** max(0, len(str(questions)) - 2))
    return -(-questions // step) * step


def student(p: float, df: int) -> float:
    """The quantile of Student's t with `df` degrees of freedom (at least one is taken), to four digits.

    Up to 30 from the exact distribution (Abramowitz and Stegun 26.7.3, 26.7.4), then the expansion 26.7.5.
    """
    df, z = max(1, df), _normal(p)
    if df > 30:
        terms = (
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        )
        return z + sum(term / df**k for k, term in enumerate(terms, 1))
    return _crossing(lambda t: _student_mass(t, df) - p, -1e4, 1e4)


def _student_mass(t: float, df: int) -> float:
    angle = math.atan(t / math.sqrt(df))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    odd = df % 2
    for k in range(odd, df - 1, 2):
        total += term * cosine**k
        term *= (k + 1) / (k + 2)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + inside) / 2


def _loss(lost: float, gained: float, n: float, z: float) -> float:
    """The loss whose score test over n pairs just comes to z: above what was seen for z > 0, below it for z < 0."""

    def score(loss: float) -> float:
        # the most likely share of gains, given this loss: the positive root of Tango's quadratic
        b = loss * (2 - lost + gained) - lost - gained  # 2 q^2 + b q + c = 0, q the gains, q + loss the losses
        c = -gained * loss * (1 - loss)
        gains = (math.sqrt(max(0.0, b * b - 8 * c)) - b) / 4
        variance = 2 * gains + loss * (1 - loss)
        return math.inf if variance <= 0 else (loss - lost + gained) * math.sqrt(n / variance)

    seen = lost - gained
    if z < 0:
        return -_loss(gained, lost, n, -z)
    return _crossing(lambda loss: score(loss) - z, seen, 1.0) if seen < 1 else 1.0


def _skewed(evidence: Mapping[str, Json], z: float) -> float:
    """A bound of a mean of skewed shares: Student's t after Hall's cubic transformation (Hall 1992, JRSS B 54:221)."""
    root, skew = math.sqrt(max(2, evidence["images"])), evidence["skew"]
    if abs(skew) < 1e-6:
        return float(evidence["value"] + z * evidence["error"])
    inner = 1 + skew * (-z / root - skew / (6 * root * root))
    t = 3 * root / skew * (math.copysign(abs(inner) ** (1 / 3), inner) - 1)
    return float(evidence["value"] - t * evidence["error"])


def _crossing(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that rises from below zero comes to zero."""
    for _ in range(56):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _first(holds: Callable[[int], bool]) -> int | None:
    """The smallest number for which `holds`, which holds of all larger ones."""
    high = 1
    while not holds(high):
        high *= 2
        if high > MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
