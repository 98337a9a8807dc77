"""After such a pass, calibration and the figures of cost see what inference sees."""

from __future__ import annotations

import copy

import pytest
import torch

from svlm.calib.balance import measure
from svlm.calib.cost import cost
from svlm.calib.stats import MeanSquare
from svlm.calib.walk import Walk
from svlm.compress.anatomy import view_of
from svlm.compress.runtime.seen import seen
from svlm.passes.distill._observe import observe
from svlm.passes.tokens.grid import Grid
from tests import zoo
from tests.passes.tokens.helpers import logits

from .helpers import CASES, put, treated


def naive(view, batch):
    """Mean square of what enters each linear of the language model in a forward of one sample without padding."""
    inputs: dict[str, list[torch.Tensor]] = {}

    def note(path):
        return lambda module, args: inputs.setdefault(path, []).append(args[0].detach().flatten(0, -2))

    hooks = [ref.module.register_forward_pre_hook(note(ref.path)) for ref in view.linears("language")]
    logits(view.model, batch)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(rows).double().square().mean(0) for path, rows in inputs.items()}


SOME = [("gemma3", case) for case in CASES] + [("qwen3-vl", "freeze"), ("qwen3-vl", "pyramid")]


@pytest.mark.parametrize(("name", "case"), SOME)
def test_statistics_are_those_of_inference(name, case):
    """Every linear's inputs, q apart from k and v; and with weights changed on the way, those of the changed prefix."""
    view, batch = treated(zoo.model(name), CASES[case][0]), zoo.batch(name, 1)
    walk = Walk(view, [batch], "language")
    changed = treated(zoo.model(name), CASES[case][0])
    ranked = case in ("fastv", "pyramid")
    for unit in walk:
        expected = naive(changed, batch)
        for ref, stat in unit.observe(MeanSquare, token_weights="uniform").items():
            if not (ranked and ref.role in ("attn.q", "attn.k")):  # ranking runs these once more
                torch.testing.assert_close(stat.mean, expected[ref.path], rtol=1e-4, atol=1e-6)
        for model in (view, changed):
            with torch.no_grad():
                module = model.model.get_submodule(unit.unit.linears[-1].path)
                module.weight.mul_(1.5)
    torch.testing.assert_close(walk.replay(0).logits, logits(changed.model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_weights_know_which_rows_are_visual(case):
    """Padding never counts, nor what fills a row up; half of the weight is the visual tokens', where there are any."""
    view, batch = treated(zoo.model("llava"), CASES[case][0]), zoo.batch("llava", 3)
    texts = int(((batch["input_ids"] != zoo.IMAGE) & batch["attention_mask"].bool()).sum())
    visual = {  # by block: among the rows of queries, and of keys
        "freeze": [(48, 48), (0, 48), (48, 48)],
        "fastv": [(48, 48), (24, 24), (24, 24)],
        "pyramid": [(48, 48), (24, 24), (12, 12)],
        "bypass": [(0, 0), (0, 48), (0, 0)],
    }
    for unit, (asking, held) in zip(Walk(view, [batch], "language"), visual[case]):
        found = unit.observe(MeanSquare, token_weights="balanced")
        tokens = {ref.role: stat.tokens for ref, stat in found.items()}
        assert tokens["attn.q"] == tokens["attn.o"] == tokens["mlp.down"] == texts + asking
        assert tokens["attn.k"] == tokens["attn.v"] == texts + held
        (_, weights), output = next(unit.rows()), next(unit.outputs())
        assert weights.shape == output.shape[:2] and int((weights > 0).sum()) == texts + asking


def test_drift_is_that_of_the_rows_that_are_there():
    view, batch = treated(zoo.model("llava"), CASES["fastv"][0]), zoo.batch("llava", 3)
    walk = Walk(view, [batch], "language", drifting=0.5)
    texts = int(((batch["input_ids"] != zoo.IMAGE) & batch["attention_mask"].bool()).sum())
    counted = [{s.tokens for s in unit.observe(MeanSquare, token_weights="drift").values()} for unit in walk]
    assert counted == [{texts + 24}, {texts + 12}, {texts + 12}] and not walk.without_drift


def test_both_mechanisms_in_one_walk():
    view, batch = treated(zoo.model("llava")), zoo.batch("llava", 3)
    Grid(keep=0.5).rebuild(view, {})
    put(view, CASES["freeze"][0])
    tokens = [unit.observe(MeanSquare, token_weights="vision") for unit in Walk(view, [batch], "language")]
    counted = [{ref.role: stat.tokens for ref, stat in found.items()} for found in tokens]
    assert [(c["attn.q"], c["attn.k"], c["mlp.up"]) for c in counted] == [(24, 24, 24), (0, 24, 0), (24, 24, 24)]


@pytest.mark.parametrize("case", CASES)
def test_gradient_ratios_and_states_are_of_the_same_tokens(case):
    model, batch = zoo.model("llava"), zoo.batch("llava")
    view = treated(model, CASES[case][0])
    measured = measure(view, [batch])
    assert all(g.answer for units in measured.gradients.values() for g in units.values())
    units = view.parts["language"]
    made = observe(view, batch, units)
    assert [states[0].shape for states in made.states] == [(2, *batch["input_ids"].shape[1:], 32)] * 3
    worked = made.kept.returned(units[1].module, torch.ones_like(made.kept.inputs(units[1].module, "attn.q")[1]))
    visual = batch["input_ids"] == zoo.IMAGE
    assert int(worked[visual].sum()) == {"freeze": 0, "bypass": 0, "fastv": 16, "pyramid": 16}[case]
    with torch.no_grad():
        whole = view.model(**batch).logits[:, :-1][batch["labels"][:, 1:] != -100]
    torch.testing.assert_close(made.logits, whole, rtol=1e-4, atol=1e-4)


def test_cost_is_true():
    """FLOPs by hand: what the visual tokens do not do any more; bytes of the cache: what it does not hold."""
    batch = zoo.batch("llava", 1)
    plain = cost(view_of(zoo.model("llava")), batch, latency=False)
    length, width, inner, token = batch["input_ids"].shape[1], 32, 48, 2 * 2 * 8 * 4  # bytes a token and block
    assert plain["kv_bytes"] == 3 * length * token
    found = {case: cost(treated(zoo.model("llava"), step), batch, latency=False) for case, (step, _) in CASES.items()}
    assert [found[case]["visual_tokens"] for case in CASES] == [16, 32 / 3, 28 / 3, 16 / 3]
    saved = {"freeze": 0, "fastv": 16, "pyramid": 8 + 12, "bypass": 32}
    for case, tokens in saved.items():
        assert plain["kv_bytes"] - found[case]["kv_bytes"] == tokens * token
    projections = 2 * 16 * (2 * width * width + 3 * width * inner)  # queries, outputs, MLP of 16 tokens in one block
    attention = 2 * 2 * width * 16 * length  # their scores and mixtures
    assert plain["flops"]["prefill"] - found["freeze"]["flops"]["prefill"] == projections + attention
    keys = 2 * 16 * 2 * width * 16  # keys and values of 16 tokens in one block, two heads of eight
    nobody = 2 * (2 * 2 * width * 16 * (length - 16))  # text does not look at them in two blocks
    expected = 3 * (projections + attention) + 2 * keys + nobody
    assert plain["flops"]["prefill"] - found["bypass"]["flops"]["prefill"] == expected
    assert found["fastv"]["flops"]["prefill"] < plain["flops"]["prefill"]
    assert found["bypass"]["flops"]["decode"] < plain["flops"]["decode"]


def test_the_choice_follows_the_prompt():
    """Another question about the same picture keeps other tokens; another picture beside it does not."""
    model, batch = zoo.model("llava"), zoo.batch("llava", 3)
    view = treated(model, CASES["fastv"][0])
    logits(view.model, batch)
    first = seen(view.model).through
    other = copy.deepcopy(batch)
    other["input_ids"][0, -4] = 3 + (other["input_ids"][0, -4] - 2) % 50  # the last token of the first row's prompt
    other["pixel_values"][2] = -other["pixel_values"][2]
    logits(view.model, other)
    now = seen(view.model).through
    assert not torch.equal(now[0], first[0]) and torch.equal(now[1], first[1]) and not torch.equal(now[2], first[2])
