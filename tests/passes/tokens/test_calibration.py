"""Passes that calibrate after a token pass see what inference will see."""

from __future__ import annotations

import pytest
import torch

from svlm.calib.walk import Walk
from svlm.passes.tokens.grid import Grid
from tests import zoo

from .helpers import generate, logits, reduced, single, two_images


class Weights:
    """A statistic that keeps inputs and weights as they come."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        self.rows.append(x)
        self.weights.append(weights)


@pytest.mark.parametrize("name", ["language.blocks[1]", "head"])
def test_walk_weighs_the_tokens_that_are_left(name):
    """Two rows of 8 and 4 visual tokens, filled up: the filling weighs nothing, and each modality weighs half."""
    view = reduced(zoo.model("llava"), Grid(keep=0.25))
    batch = two_images()
    unit = next(iter(Walk(view, [batch], name)))
    stat = next(iter(unit.observe(Weights, token_weights="balanced").values()))
    weights = stat.weights[0]
    texts = int((batch["input_ids"] != zoo.IMAGE).sum())
    counted = weights[weights > 0]
    assert len(counted) == 8 + 4 + texts, "what fills a row up, or was taken out, does not count"
    values = counted.unique()
    visual, text = (values[0], values[1]) if (counted == values[0]).sum() == 12 else (values[1], values[0])
    assert int((counted == visual).sum()) == 12 and int((counted == text).sum()) == texts
    torch.testing.assert_close(visual * 12, text * texts)
    if name != "head":
        assert len(stat.rows[0]) < batch["input_ids"].numel(), "the block is given the shorter sequence"


def test_pruned_and_reduced_still_generates_alike():
    """A change of the weights after the token pass changes both ways of generating in the same way."""
    view = reduced(zoo.model("llava"), Grid(keep=0.5))
    batch = zoo.batch("llava", 3)
    batch.pop("labels")
    before = logits(view.model, batch)
    with torch.no_grad():
        for ref in view.linears("language.mlp"):
            ref.module.weight.mul_(0.5)
    assert not torch.allclose(logits(view.model, batch), before)
    answers = generate(view.model, batch)
    assert torch.equal(answers, generate(view.model, batch, use_cache=False))
    assert torch.equal(answers[2], generate(view.model, single(batch, 2))[0])
