"""Token weights `drift`: text, and the visual tokens that a block turns the furthest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from svlm.calib.drift import drift, strongest
from svlm.calib.stats import MeanSquare, modality_weights
from svlm.calib.walk import Walk
from svlm.compress.anatomy import TokenMasks, view_of
from tests import zoo


def test_the_highest_of_each_sample_rounded_up_and_nan_is_the_highest() -> None:
    drifts = torch.tensor([[0.9, 0.1, 0.3, 0.2, 0.5], [0.9, 0.1, float("nan"), 0.2, 0.5], [0.1, 0.1, 0.1, 0.1, 0.1]])
    among = torch.tensor([[False, True, True, True, True]] * 2 + [[True] * 5])
    assert strongest(drifts, among, 0.5).int().tolist() == [[0, 0, 1, 0, 1], [0, 0, 1, 0, 1], [1, 1, 1, 0, 0]]
    assert not strongest(drifts, among, 0.0).any() and torch.equal(strongest(drifts, among, 1.0), among)
    assert not strongest(drifts, torch.zeros_like(among), 1.0).any()


def test_the_drift_is_one_less_the_cosine_and_none_where_shapes_differ() -> None:
    x, out = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    found = drift(((torch.ones(1, 1), x), {}), (out, None))
    assert found is not None
    for i in range(2):
        for t in range(3):
            a, b = x[i, t].tolist(), out[i, t].tolist()
            dot, size = sum(p * q for p, q in zip(a, b)), math.hypot(*a) * math.hypot(*b)
            assert float(found[i, t]) == pytest.approx(1 - dot / size, abs=1e-5)
    assert drift(((x,), {}), out[..., :4]) is None and drift(((x,), {}), None) is None


def test_text_counts_whole_and_padding_never() -> None:
    vision = torch.tensor([[False, True, True, True, False, False]])
    padding = torch.tensor([[True, False, False, False, False, False]])
    masks = TokenMasks(vision, ~vision & ~padding, torch.zeros_like(vision), padding)
    drifts = torch.tensor([[9.0, 0.1, 0.3, 0.2, 0.0, 0.0]])
    assert modality_weights(masks, "drift", drift=drifts, top=0.3).tolist() == [[0, 0, 1, 0, 1, 1]]
    assert torch.equal(modality_weights(masks, "drift"), modality_weights(masks, "balanced"))


@pytest.mark.parametrize("family", ["llava", "qwen3-vl", "paligemma"])
def test_the_walk_measures_each_block_as_it_finds_it(family: str) -> None:
    """Held against hooks in the model's own forward."""
    view, batch = view_of(zoo.model(family)), zoo.batch(family, samples=3, seed=1)
    for unit in (walk := Walk(view, [batch], "language", drifting=0.4)):
        if not (vision := view.token_masks(batch).vision).any():
            continue
        seen: list[Any] = []

        def keep(module: Any, args: Any, kwargs: Any, out: Any, seen: list[Any] = seen) -> None:
            seen.append(drift((args, kwargs), out))

        handle = unit.unit.module.register_forward_hook(keep, with_kwargs=True)
        with torch.no_grad():
            view.model(**batch, use_cache=False)
        handle.remove()
        ((_, weights),) = unit.rows("drift")
        (drifts,) = seen
        wanted = view.token_masks(batch).text.float()
        for sample, (row, places) in enumerate(zip(drifts, vision)):
            order = sorted(places.nonzero().flatten().tolist(), key=lambda t, row=row: -float(row[t]))  # type: ignore[misc]
            wanted[sample, order[: math.ceil(0.4 * len(order))]] = 1
        assert torch.equal(weights, wanted), unit.name
        for ref in unit.linears:
            ref.module.weight.data.mul_(0.5)
        assert torch.equal(next(unit.rows("drift"))[1], wanted), "as it was when it was first asked"
    assert not walk.without_drift


@pytest.mark.parametrize("family", ["llava", "blip-2-t5", "florence-2", "donut"])
def test_all_have_weights_and_tell_where_there_is_no_drift(family: str) -> None:
    view, batch = view_of(zoo.model(family)), zoo.batch(family, samples=2)
    walk = Walk(view, [batch], drifting=0.5)
    for unit in walk:
        for stat in unit.observe(MeanSquare, token_weights="drift").values():
            assert stat.tokens and bool(stat.mean.isfinite().all())
    beside = {ref.path for unit in view.units if unit.stack is None or unit.cross_attention for ref in unit.linears}
    assert walk.without_drift <= beside
