"""Statistics against naive loops over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from svlm.calib.stats import AbsMax, ColumnNorm, Hessian, MeanSquare, Spread, Stat, modality_weights
from svlm.compress.anatomy import TokenMasks

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5, 0.1, 0, 2, 1])
WEIGHTS = torch.rand(40, generator=torch.Generator().manual_seed(2))
WEIGHTS[::5] = 0


def naive_hessian() -> torch.Tensor:
    total = torch.zeros(6, 6, dtype=torch.float64)
    for x, w in zip(X.double(), WEIGHTS.double()):
        total += w * 2 * torch.outer(x, x)
    return total / WEIGHTS.double().sum()


def feed(stat: Any, cuts: tuple[int, ...]) -> Any:
    for x, w in zip(torch.tensor_split(X, cuts), torch.tensor_split(WEIGHTS, cuts)):
        stat.update(x, w)
    return stat


@pytest.mark.parametrize("cuts", [(), (1,), (3, 17, 18), (5, 5, 30)])
def test_statistics_do_not_depend_on_the_batches(cuts: tuple[int, ...]) -> None:
    hessian = feed(Hessian(torch.float64), cuts)
    torch.testing.assert_close(hessian.matrix, naive_hessian(), rtol=1e-12, atol=1e-12)
    assert hessian.tokens == 32 and hessian.weight == pytest.approx(float(WEIGHTS.sum()), rel=1e-6)
    square = feed(MeanSquare(), cuts)
    torch.testing.assert_close(square.mean, naive_hessian().diagonal() / 2)
    torch.testing.assert_close(feed(ColumnNorm(), cuts).norm, (naive_hessian().diagonal() / 2).sqrt())
    peak = feed(AbsMax(), cuts)
    assert torch.equal(peak.value, X[WEIGHTS > 0].abs().amax(0)) and peak.tokens == 32


def test_hessian_in_float32_is_close() -> None:
    hessian = feed(Hessian(), (7, 20))
    assert hessian.matrix.dtype == torch.float32
    torch.testing.assert_close(hessian.matrix.double(), naive_hessian(), rtol=1e-5, atol=1e-5)
    assert hessian.matrix[3].abs().sum() == 0, "a dead channel stays dead"


@pytest.mark.parametrize("make", [Hessian, MeanSquare, ColumnNorm, AbsMax])
def test_tokens_of_weight_zero_do_not_count(make: Callable[[], Stat]) -> None:
    one, two, blank = make(), make(), make()
    spoilt = X.clone()
    spoilt[WEIGHTS == 0] = float("nan")
    one.update(X, WEIGHTS)
    two.update(spoilt, WEIGHTS)
    two.update(torch.full((3, 6), 1e9), torch.zeros(3))
    blank.update(X, torch.zeros(40))
    tensors = [vars(s).get("matrix", vars(s).get("mean", vars(s).get("value"))) for s in (one, two, blank)]
    assert torch.equal(tensors[0], tensors[1]) and not tensors[2].any() and tensors[2].shape == tensors[0].shape


def test_mean_and_variance_equal_the_loop_far_from_zero() -> None:
    x, w = torch.randn(12, 3).double() + 1e6, torch.rand(12).double()
    w[4] = 0
    stat = Spread()
    for start, end in ((0, 1), (1, 5), (5, 5), (5, 12)):
        stat.update(x[start:end], w[start:end])
    total = float(w.sum())
    for channel in range(3):
        mean = sum(float(w[t]) * float(x[t, channel]) for t in range(12)) / total
        variance = sum(float(w[t]) * (float(x[t, channel]) - mean) ** 2 for t in range(12)) / total
        assert float(stat.mean[channel]) == pytest.approx(mean, rel=1e-12)
        assert float(stat.variance[channel]) == pytest.approx(variance, rel=1e-6)
    assert stat.tokens == 11 and stat.weight == pytest.approx(total)


def test_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Hessian().update(X, WEIGHTS[:3])
    with pytest.raises(ValueError, match="do not fit"):
        Hessian().update(X[None], WEIGHTS)


def masks(text: str) -> TokenMasks:
    """One row a word: v visual, t text, a answer, . padding."""
    rows = [list(word) for word in text.split()]
    of = [torch.tensor([[c in kinds for c in row] for row in rows]) for kinds in ("v", "ta", "a", ".")]
    return TokenMasks(*of)


def test_modality_weights() -> None:
    m = masks("..vvvvvvta .vvvvvvtta")
    uniform, text, balanced = (modality_weights(m, mode) for mode in ("uniform", "text", "balanced"))
    assert torch.equal(uniform, (~m.padding).float())
    assert torch.equal(text, m.text.float())
    assert balanced[m.padding].sum() == 0
    assert balanced[m.vision].sum() == pytest.approx(float(balanced[m.text].sum()))
    assert balanced.sum() == pytest.approx(17) and balanced[m.vision].unique().numel() == 1
    only = masks(".tta")
    assert torch.equal(modality_weights(only, "balanced"), (~only.padding).float())
    with pytest.raises(ValueError, match="not 'pictures'"):
        modality_weights(m, "pictures")  # type: ignore[arg-type]
