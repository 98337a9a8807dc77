"""The passes: what they require, choose, record and promise; blocks that are taken out before or after them."""

from __future__ import annotations

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch

from svlm import passes
from svlm.calib.metrics.divergence import kl, log_probabilities
from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.anatomy import view_of
from svlm.compress.base import Context, evaluating
from svlm.compress.errors import PromiseBroken, RecipeError, Unmet
from svlm.compress.pipeline import apply_pass, ask_promises
from svlm.compress.preflight import needs_all_blocks
from svlm.compress.recipe import Recipe
from svlm.compress.runtime.layered import install
from svlm.compress.runtime.rules import blocks_of, held_shares, rule_of
from svlm.passes.fuse.bypass import Bypass
from svlm.passes.fuse.freeze_vision import FreezeVision
from svlm.passes.prune.layers import Layers
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.tokens._layered import decoder_blocks
from svlm.passes.tokens.fastv import FastV
from svlm.passes.tokens.pyramid import Pyramid
from tests import zoo
from tests.passes.tokens.helpers import ELSEWHERE, generate, logits, prompts

from .helpers import CASES, treated


def context(view, batches, scratch=None):
    teacher = view_of(copy.deepcopy(view.model))

    @contextmanager
    def lend():
        with evaluating(teacher.model):
            yield teacher

    return Context(batches, lambda where=None, **o: Walk(view, batches, where, **o), lend, scratch=scratch)


def answers(model, batch):
    with torch.no_grad():
        found = model(**batch).logits[:, :-1]
    return log_probabilities(found[batch["labels"][:, 1:] != -100])


def brute(batch, steps):
    """Mean KL of an answer token from the original's, for each pass."""
    model = zoo.model("llava")
    original = answers(model, batch)
    return [float(kl(original, answers(treated(model, step).model, batch)).mean()) for step in steps]


@pytest.mark.parametrize("criterion", ["kl", "greedy"])
@pytest.mark.parametrize("kind", [FreezeVision, Bypass])
def test_blocks_are_chosen_by_what_the_answers_lose(kind, criterion, tmp_path):
    batch = zoo.batch("llava", 3)
    view = view_of(zoo.model("llava"))
    step = kind(count=2, criterion=criterion)
    ctx = context(view, [batch], tmp_path)
    step.requires(view, ctx)
    notes = step.apply(view, ctx)
    alone = brute(batch, [kind(blocks=(i,)) for i in range(3)])
    scores = notes.numbers["kl"][0]
    torch.testing.assert_close(torch.tensor(list(scores.values())), torch.tensor(alone), rtol=1e-3, atol=1e-7)
    first = alone.index(min(alone))
    if criterion == "kl":
        chosen = sorted(sorted(range(3), key=lambda i: alone[i])[:2])
        assert len(notes.numbers["kl"]) == 1
    else:
        rest = [i for i in range(3) if i != first]
        pairs = brute(batch, [kind(blocks=tuple(sorted((first, i)))) for i in rest])
        chosen = sorted((first, rest[pairs.index(min(pairs))]))
    assert list(next(v for v in notes.numbers.values() if isinstance(v, list))) == [
        f"language.blocks[{i}]" for i in chosen
    ]
    again = kind(count=2, criterion=criterion).apply(view_of(zoo.model("llava")), context(view, [batch], tmp_path))
    assert again.record == notes.record, "a killed pass goes on with what it scored"
    torch.testing.assert_close(
        logits(view.model, batch), logits(treated(zoo.model("llava"), kind(blocks=tuple(chosen))).model, batch)
    )


@pytest.mark.parametrize("family", ELSEWHERE)
@pytest.mark.parametrize("case", CASES)
def test_refused_by_name(family, case):
    view = view_of(zoo.model(family))
    with pytest.raises(Unmet) as caught:
        CASES[case][0].requires(view, context(view, [zoo.batch(family)]))
    assert view.family.name in str(caught.value) and not blocks_of(view.model)


def test_what_does_not_go_together_is_refused():
    batch = zoo.batch("llava")
    together = {("freeze", "fastv"), ("freeze", "pyramid")}
    for one, other in itertools.product(CASES, CASES):
        view = treated(zoo.model("llava"), CASES[one][0])
        if (one, other) in together or (other, one) in together:
            CASES[other][0].requires(view, context(view, [batch]))
            continue
        with pytest.raises(Unmet, match="already"):
            CASES[other][0].requires(view, context(view, [batch]))


def test_what_cannot_be_is_refused():
    view = view_of(zoo.model("llava"))
    ctx = context(view, [zoo.batch("llava")])
    for step in (FastV(block=3), Pyramid(blocks=(1, 5)), FreezeVision(count=4), Bypass(blocks=(3,))):
        with pytest.raises(Unmet, match="does not have"):
            step.requires(view, ctx)
    with pytest.raises(Unmet, match="needs fit samples"):
        FreezeVision().requires(view, context(view, []))
    FreezeVision(criterion="random").requires(view, context(view, []))
    view.model.set_attn_implementation("flex_attention")
    with pytest.raises(Unmet, match="flex_attention"):
        FastV(block=1).requires(view, ctx)
    for kind, wrong in (
        (FastV, {"keep": 0.0}), (FastV, {"block": 0}), (Pyramid, {"ratio": 1.5}), (Pyramid, {"blocks": [2, 1]}),
        (FreezeVision, {"share": 2.0}), (FreezeVision, {"blocks": [1, 1]}), (Bypass, {"count": 0}),
    ):  # fmt: skip
        with pytest.raises(RecipeError):
            kind.from_settings(wrong)


def test_promises():
    for case, (step, _) in CASES.items():
        view = treated(zoo.model("llava"), step)
        step.ensures(view)
        block = list(blocks_of(view.model).values())[1]
        rule_of(block).frozen = not rule_of(block).frozen
        rule_of(block).keep = 0.9
        with pytest.raises(PromiseBroken, match="another rule"):
            step.ensures(view)
        view = treated(zoo.model("llava"), step)
        blocks = list(blocks_of(view.model).values())
        blocks[2]._forward_pre_hooks.clear()
        with pytest.raises(PromiseBroken, match="without its hooks"):
            step.ensures(view)
        with pytest.raises(PromiseBroken, match="nothing on the model"):
            fresh = view_of(zoo.model("llava"))
            fresh.ledger = view.ledger
            step.ensures(fresh)
        assert case


def test_defaults_of_deep_decoders():
    assert Pyramid().stages(32) == ([8, 16, 24], {8: 0.5, 16: 0.25, 24: 0.125})
    assert Pyramid().stages(4) == ([1, 2, 3], {1: 0.5, 2: 0.25, 3: 0.125})
    assert FastV().stages(32) == ([1], {2: 0.5})
    assert Bypass().number(32) == 8 and Bypass().number(2) == 1
    assert FreezeVision().number(32) == 16 and FreezeVision(count=19).number(32) == 19
    rungs = [FreezeVision(share=0.8)]
    while (milder := rungs[-1].weaker()) is not None:
        rungs.append(milder)
    assert [step.share for step in rungs] == [0.8, 0.75, 0.5, 0.25, 0.125]
    for step in (FastV(), Pyramid(), FreezeVision(), Bypass()):
        recipe = Recipe.from_json({"name": "r", "passes": [{step.name: {}}]}, passes.find)
        assert needs_all_blocks(recipe), "two blocks would not do to rehearse it"


@pytest.mark.parametrize(("family", "case"), [("llava", "freeze"), ("gemma3", "bypass")])
def test_blocks_go_afterwards(case, family, tmp_path):
    """Rules lie on blocks: those that stay keep theirs, in the model, in the ledger and on disk."""
    model, batch = zoo.model(family), zoo.batch(family)
    view = treated(model, CASES[case][0])
    before = [vars(rule_of(block)) for block in blocks_of(view.model).values()]
    view.storage_dtype = torch.float32
    ctx = context(view, [batch])
    _candidates, stay = Layers()._candidates(view, {})
    assert not any("visual" in why for why in stay.values())
    step = Layers(count=1, where=("language",), criterion="kl")
    notes = apply_pass(step, view, ctx)
    gone = int(notes.record["removed"][next(iter(notes.record["removed"]))][0])
    left = [rule for i, rule in enumerate(before) if i != gone]
    assert [vars(rule_of(block)) for block in blocks_of(view.model).values()] == left
    assert ask_promises(view, passes.find)[1] is None
    wanted = logits(view.model, batch)
    answers = generate(view.model, prompts(family))
    assert torch.equal(answers, generate(view.model, prompts(family), use_cache=False))
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    torch.testing.assert_close(logits(again.model, batch), wanted)
    assert ask_promises(again, passes.find)[1] is None
    assert torch.equal(generate(again.model, prompts(family)), answers)


def test_blocks_that_rank_or_drop_stay():
    view = treated(zoo.model("llava"), CASES["fastv"][0])
    candidates, stay = Layers()._candidates(view, {})
    assert list(candidates) == ["language.blocks[2]"]
    assert stay == {f"language.blocks[{i}]": "it ranks or drops visual tokens" for i in (0, 1)}


def test_quantized_afterwards():
    """GPTQ finds every linear's inputs, asymmetric GPTQ is refused where other tokens could be chosen."""
    batch = zoo.batch("llava")
    for case in ("freeze", "pyramid"):
        step = CASES[case][0]
        view = treated(zoo.model("llava"), step)
        gptq = GPTQ(bits=8, group=-1, where=("language",))
        apply_pass(gptq, view, context(view, [batch]))
        assert ask_promises(view, passes.find)[1] is None
        assert torch.equal(
            generate(view.model, prompts("llava")), generate(view.model, prompts("llava"), use_cache=False)
        )
        asymmetric = GPTQ(bits=8, group=-1, where=("language",), asymmetric=1.0)
        fresh = treated(zoo.model("llava"), step)
        if case == "pyramid":
            with pytest.raises(Unmet, match="asymmetric"):
                asymmetric.requires(fresh, context(fresh, [batch]))
        else:
            asymmetric.requires(fresh, context(fresh, [batch]))


def test_installed_once():
    view = treated(zoo.model("llava"), CASES["freeze"][0])
    blocks = {unit.module: ("self_attn", "self_attn.q_proj", "self_attn.v_proj") for unit in decoder_blocks(view)}
    assert install(view.model, view.decoder_path, zoo.IMAGE, blocks) is install(
        view.model, view.decoder_path, zoo.IMAGE, {}
    )
    assert rule_of(list(blocks)[1]).frozen and held_shares(view.model) == [1.0, 1.0, 1.0]
    assert held_shares(zoo.model("llava")) is None
