"""distill.features: compares the right blocks, tokens and channels, heals, and refuses what cannot be compared."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.errors import Unmet, WorkFailed
from svlm.compress.ledger import Record
from svlm.passes.distill._losses import state_distance
from svlm.passes.distill._mapping import Mapped, mapped
from svlm.passes.distill._observe import Seen, observe
from svlm.passes.distill._observe import pair as states_of
from svlm.passes.distill.features import Features
from svlm.passes.prune.structured import Structured
from svlm.passes.tokens.dpp import DPP
from tests import zoo
from tests.oracles.distill import distance
from tests.passes.distill.test_logits import context, distilled, divergence, pair

QUICK = Features(steps=12, lr=3e-3, batch_size=2)


def without(view: ModelView, number: int, record: bool = True) -> None:
    """Take a language block out, as prune.layers does."""
    layers = view.model.model.language_model.layers
    view.model.model.language_model.layers = nn.ModuleList([b for i, b in enumerate(layers) if i != number])
    view.model.config.text_config.num_hidden_layers -= 1
    view.refresh()
    if record:
        kept = [i for i in range(len(layers)) if i != number]
        view.ledger._records.append(Record("prune.layers", {}, {"kept": {"language": kept}}))


def hidden(view: ModelView, batch: dict[str, Tensor], block: int) -> Tensor:
    """What a language block returned at the real tokens, by transformers' own account (not for the last block)."""
    with torch.no_grad():
        states = view.model(**batch, use_cache=False, output_hidden_states=True).hidden_states
    return states[block + 1][batch["attention_mask"].bool()]


@pytest.mark.parametrize("distance_of", ["mse", "cosine"])
def test_the_loss_is_that_of_mapped_blocks_on_real_tokens(distance_of: Any) -> None:
    student, teacher = pair()
    without(student, 1)
    batch = zoo.batch("llava", 3)
    step = replace(QUICK, distance=distance_of, weight=0.5, features="language.blocks[0]")
    (first,) = step.watched(student, teacher)
    assert (first.here.name, first.there.name) == ("language.blocks[0]", "language.blocks[0]")
    both = mapped(student, teacher, student.select("language"), "x")
    assert [m.there.name for m in both] == ["language.blocks[0]", "language.blocks[2]"]
    seen, wanted = (observe(v, batch, [u]) for v, u in ((student, first.here), (teacher, first.there)))
    found = step.lost(student, batch, [first], seen, wanted).item()
    apart = distance(hidden(student, batch, 0), hidden(teacher, batch, 0), distance_of)
    assert apart > 0.01 and found == pytest.approx(apart + 0.5 * divergence(student, teacher, batch), rel=1e-4)
    last = replace(step, weight=0.0, features="language.blocks[1]")
    (origin,) = last.watched(student, teacher)
    seen, wanted = (observe(v, batch, [u]) for v, u in ((student, origin.here), (teacher, origin.there)))
    ends = [view.model.model.language_model.norm for view in (student, teacher)]
    assert last.lost(student, batch, [origin], seen, wanted).item() > 0
    normed = [end(s.states[0][0])[batch["attention_mask"].bool()] for end, s in zip(ends, (seen, wanted))]
    for view, found_states in zip((student, teacher), normed):
        blocks = view.model.config.text_config.num_hidden_layers
        torch.testing.assert_close(found_states, hidden(view, batch, blocks - 1), msg="the last one is normed")


@pytest.mark.parametrize("family", ["llava", "qwen3-vl", "blip-2-t5", "florence-2"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_states_and_answers_come_nearer(family: str, weight: float) -> None:
    student, teacher = pair(family)
    batch = zoo.batch(family)
    before = divergence(student, teacher, batch)
    step = replace(QUICK, weight=weight, features=("vision", "language"), where="language")
    numbers = distilled(step, student, context(teacher, [batch])).numbers
    assert numbers["training_loss_last"] < 0.8 * numbers["training_loss_first"]
    assert divergence(student, teacher, batch) == pytest.approx(numbers["kl_best"], rel=1e-3)
    assert numbers["kl_best"] < before
    assert numbers["units_compared"] == len(student.parts["vision"]) + len(student.parts["language"])
    assert numbers["units_renumbered"] == 0


def test_a_model_without_a_block_heals_and_maps() -> None:
    student, teacher = pair()
    without(student, 1)
    batch = zoo.batch("llava")
    before = divergence(student, teacher, batch)
    numbers = distilled(QUICK, student, context(teacher, [batch])).numbers
    assert divergence(student, teacher, batch) < 0.8 * before and numbers["units_renumbered"] == 1


def test_after_a_token_pass_the_same_tokens_are_compared() -> None:
    student, teacher = pair()
    DPP(keep=0.5).rebuild(student, {})
    batch = zoo.batch("llava", 3)
    (unit,) = QUICK.watched(student, teacher)[:1]
    seen = observe(student, batch, [unit.here])
    assert seen.kept is not None and seen.states[0][0].shape[1] < batch["input_ids"].shape[1]
    rows, tokens = batch["input_ids"].shape
    width = seen.states[0][0].shape[-1]
    numbered = torch.arange(rows * tokens).view(rows, tokens, 1).expand(-1, -1, width).float()
    mine, theirs = states_of(student, batch, unit, seen, Seen(seen.logits, [[numbered]]), 0)
    places, valid = seen.kept.whole
    wanted = [r * tokens + int(p) for r in range(rows) for p, v in zip(places[r], valid[r]) if v]
    wanted = [n for n in wanted if batch["attention_mask"].flatten()[n]]
    assert theirs[:, 0].long().tolist() == wanted and len(mine) == len(wanted)
    torch.testing.assert_close(mine, seen.states[0][0][valid & batch["attention_mask"].gather(1, places).bool()])
    before = divergence(student, teacher, batch)
    distilled(QUICK, student, context(teacher, [batch]))
    assert divergence(student, teacher, batch) < before


def test_kept_channels_are_compared_and_other_widths_refused() -> None:
    student, teacher = pair()
    narrow = copy.copy(student.parts["language"][0].linears[-1].module)
    object.__setattr__(student.parts["language"][0].linears[-1], "module", narrow)
    narrow.out_features = 3
    units = student.select("language.blocks[0]")
    with pytest.raises(Unmet, match="different widths"):
        mapped(student, teacher, units, "x")
    student.ledger._records.append(Record("prune.structured", {}, {"channels": {"language": [0, 5, 9]}}))
    (found,) = mapped(student, teacher, units, "x")
    assert found.channels == (0, 5, 9)
    batch = zoo.batch("llava")
    wide = torch.randn(*batch["input_ids"].shape, 32)
    here, there = Seen(torch.zeros(1), [[wide[..., [0, 5, 9]] + 1]]), Seen(torch.zeros(1), [[wide]])
    mine, theirs = states_of(student, batch, found, here, there, 0)
    torch.testing.assert_close(mine, theirs + 1)


def test_heals_narrower_states_by_the_channels_that_stayed() -> None:
    student, teacher = view_of(zoo.model("llava")), view_of(zoo.model("llava"))
    batch = zoo.batch("llava")
    for seed in (0, 1):  # twice: the second counts from what the first left
        narrow = Structured(ratio=0.25, where="language", what=("hidden",), importance="random", multiple=4, seed=seed)
        narrow.requires(student, context(teacher, [batch]))
        student.ledger.add(narrow, narrow.apply(student, context(teacher, [batch])).record)
    (unit,) = mapped(student, teacher, student.select("language.blocks[0]"), "x")
    table, whole = student.table.module.weight, teacher.table.module.weight
    assert unit.channels is not None and len(unit.channels) == table.shape[1] < 0.75 * whole.shape[1]
    assert torch.equal(table, whole[:, list(unit.channels)])
    before = divergence(student, teacher, batch)
    numbers = distilled(QUICK, student, context(teacher, [batch])).numbers
    assert (
        numbers["units_compared"] == len(student.select("language"))
        and divergence(student, teacher, batch) < 0.8 * before
    )


def test_padding_and_holes_do_not_count() -> None:
    student, teacher = pair()
    batch = zoo.batch("llava", 3)
    (unit,) = QUICK.watched(student, teacher)[:1]
    seen, wanted = observe(student, batch, [unit.here]), observe(teacher, batch, [unit.there])
    assert not bool(batch["attention_mask"].all())
    before = state_distance(*states_of(student, batch, unit, seen, wanted, 0))
    seen.states[0][0] = seen.states[0][0].masked_fill((batch["attention_mask"] == 0)[..., None], float("nan"))
    assert torch.equal(state_distance(*states_of(student, batch, unit, seen, wanted, 0)), before)
    with pytest.raises(WorkFailed, match="same tokens"):
        states_of(student, batch, unit, Seen(seen.logits, [[seen.states[0][0][:, 1:]]]), wanted, 0)


def test_blocks_of_unknown_origin_are_refused() -> None:
    student, teacher = pair()
    without(student, 1, record=False)
    ctx = context(teacher, [zoo.batch("llava")])
    with pytest.raises(Unmet, match="which block of the original") as caught:
        QUICK.requires(student, ctx)
    assert caught.value.where == "language.blocks[0]"
    replace(QUICK, features="vision").requires(student, ctx)
    for wrong in ([0], [0, 7]):
        student.ledger._records[:] = [Record("prune.layers", {}, {"kept": {"language": wrong}})]
        with pytest.raises(Unmet, match="which block of the original"):
            QUICK.requires(student, ctx)
    with pytest.raises(ValueError, match="weight"):
        Features(weight=-1.0)


def test_the_newest_record_holds_and_loose_units_keep_their_names() -> None:
    student, teacher = pair()
    without(student, 1)
    without(student, 0, record=False)
    student.ledger._records.append(Record("prune.layers", {}, {"kept": {"language": [2]}}))
    found = mapped(student, teacher, student.select(("connector", "language")), "x")
    assert [m.there.name for m in found] == ["connector", "language.blocks[2]"]
    assert all(isinstance(m, Mapped) and m.there in teacher.units for m in found)
    assert view_of(student.model).parts["language"][0].index == 0
