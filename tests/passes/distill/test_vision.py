"""distill.logits with vision: matched: visual tokens that are left learn from the original's nearest ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from svlm.compress.errors import Unmet
from svlm.passes.distill._observe import answer_logits, observe
from svlm.passes.distill.features import Features
from svlm.passes.distill.logits import Logits
from svlm.passes.tokens.dpp import DPP
from tests import zoo
from tests.oracles.distill import greedy_pairs, kl, softmax
from tests.passes.distill.test_logits import context, distilled, divergence, pair

MATCHED = Logits(steps=12, lr=3e-3, batch_size=3, vision="matched", vision_weight=0.5)


@pytest.mark.parametrize("family", ["llava", "qwen3-vl"])
def test_the_loss_compares_the_tokens_that_are_left_with_their_nearest(family: str) -> None:
    student, teacher = pair(family)
    DPP(keep=0.5).rebuild(student, {})
    batch = zoo.batch(family, 3)
    seen, wanted = (observe(view, batch, visual=True) for view in (student, teacher))
    torch.testing.assert_close(seen.logits, answer_logits(student, batch))
    assert seen.kept is not None
    left = torch.zeros_like(batch["input_ids"], dtype=torch.bool).scatter(1, *seen.kept.whole)
    visual = batch["input_ids"] == zoo.IMAGE
    total, count = 0.0, 0
    with torch.no_grad():
        mine, theirs = student.model(**batch).logits, teacher.model(**batch).logits
    for row in range(3):
        s, t = mine[row][left[row] & visual[row]], theirs[row][visual[row]]
        assert len(s) == len(t) // 2
        for q, number in zip(s, greedy_pairs(s, t)):
            total += kl(softmax(q.tolist(), 1.0), softmax(t[number].tolist(), 1.0))
            count += 1
    found = float(MATCHED.lost(student, batch, [], seen, wanted).detach())
    assert found == pytest.approx(divergence(student, teacher, batch) + 0.5 * total / count, rel=1e-4)


@pytest.mark.parametrize("kind", [Logits, Features])
def test_it_heals_a_model_with_fewer_visual_tokens(kind: Any) -> None:
    student, teacher = pair()
    DPP(keep=0.5, relevance="prompt").rebuild(student, {})
    batch = zoo.batch("llava", 3)
    before = divergence(student, teacher, batch)
    step = kind(**{name: getattr(MATCHED, name) for name in ("steps", "lr", "batch_size", "vision", "vision_weight")})
    numbers = distilled(step, student, context(teacher, [batch])).numbers
    assert divergence(student, teacher, batch) == pytest.approx(numbers["kl_best"], rel=1e-3)
    assert numbers["kl_best"] < 0.7 * before
    assert numbers["training_loss_last"] < 0.8 * numbers["training_loss_first"]


def test_pictures_are_not_needed_in_every_batch() -> None:
    student, teacher = pair()
    batch = zoo.batch("llava")
    text = {"input_ids": batch["input_ids"].clamp_max(90), "attention_mask": batch["attention_mask"]}
    text["labels"] = batch["labels"]
    seen, wanted = (observe(view, text, visual=True) for view in (student, teacher))
    found = MATCHED.lost(student, text, [], seen, wanted).item()
    assert found == pytest.approx(replace(MATCHED, vision="none").lost(student, text, [], seen, wanted).item())


def test_models_without_visual_tokens_in_the_sequence_are_refused() -> None:
    for family in ("blip-2-t5", "florence-2", "trocr"):
        student, teacher = pair(family)
        with pytest.raises(Unmet, match="logits at visual tokens"):
            MATCHED.requires(student, context(teacher, [zoo.batch(family)]))
    with pytest.raises(ValueError, match="vision_weight"):
        Logits(vision_weight=-0.1)
