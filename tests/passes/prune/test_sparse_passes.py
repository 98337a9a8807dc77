"""prune.wanda and prune.sparsegpt on tiny models: what they refuse, count, promise, and who keeps the promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from svlm import passes
from svlm.calib.stats import ColumnNorm
from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.anatomy import ModelView
from svlm.compress.base import Pass
from svlm.compress.errors import PromiseBroken, Unmet, WorkFailed
from svlm.compress.ledger import Ledger
from svlm.compress.pipeline import apply_pass, ask_promises
from svlm.passes.prune._sparse import follows, least, wanda
from svlm.passes.prune.sparsegpt import SparseGPT
from svlm.passes.prune.wanda import Wanda
from svlm.passes.quantize.gptq import GPTQ
from tests.passes.quantize.helpers import ALL, batches, check_resumes, context, fresh, run, weights

both = pytest.mark.parametrize("kind", [Wanda, SparseGPT])
LANGUAGE = ("language",)


def zeros(view: ModelView) -> dict[str, torch.Tensor]:
    return {path: weight == 0 for path, weight in weights(view, ALL).items()}


@both
def test_settings_that_no_model_could_take(kind: Any) -> None:
    for wrong in ({"sparsity": 0.0}, {"sparsity": 1.0}, {"pattern": "4:2"}, {"drift_share": 1.5}):
        with pytest.raises(ValueError, match=r"sparsity|pattern|drift_share"):
            kind(**wrong)
    for wrong in ({"damp": 0.0}, {"blocksize": 0}, {"blocksize": 6, "pattern": "2:4"}):
        with pytest.raises(ValueError, match=r"damp|blocksize"):
            SparseGPT(**wrong)


@both
def test_the_ladder_halves_the_sparsity_and_a_pattern_has_none(kind: Any) -> None:
    step, rungs = kind(where=LANGUAGE), []
    while step is not None:
        rungs.append(step.sparsity)
        step = step.weaker()
    assert rungs == [0.5, 0.25, 0.125, 0.0625]
    assert kind(pattern="2:4").weaker() is None


@both
def test_what_is_refused_before_a_weight_is_touched(kind: Any) -> None:
    view = fresh()
    before = weights(view)
    with pytest.raises(Unmet, match="pattern 3:7 does not divide") as caught:
        apply_pass(kind(pattern="3:7", **({"blocksize": 14} if kind is SparseGPT else {})), view, context(view))
    assert caught.value.where and "linears of" in caught.value.found
    with pytest.raises(Unmet, match="needs calibration data"):
        apply_pass(kind(), view, context(view, []))
    assert all(torch.equal(w, before[path]) for path, w in weights(view).items())
    apply_pass(GPTQ(group=8, where=LANGUAGE), view, context(view))
    with pytest.raises(Unmet, match="quantized already"):
        apply_pass(kind(), view, context(view))


@both
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_are_as_many_as_asked_for_and_stay_on_disk(kind: Any, pattern: str, tmp_path: Path) -> None:
    view, notes = run(kind(pattern=pattern))
    for path, mask in zeros(view).items():
        assert int(mask.sum()) == pytest.approx(mask.numel() / 2, abs=mask.shape[0] / 2 + 1), path
        assert pattern == "unstructured" or follows(view.weight(path), (2, 4))
        assert view.ledger.promised_zeros[path] == float(mask.double().mean())
    assert notes.numbers["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert notes.numbers["linears"] == len(view.linears(ALL)) and notes.numbers["pruned_by_magnitude"] == 0
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    assert ask_promises(again, passes.find) == ([kind.name], None)
    assert all(torch.equal(mask, zeros(again)[path]) for path, mask in zeros(view).items())


@both
def test_a_single_weight_that_comes_back_breaks_the_promise(kind: Any) -> None:
    step = kind(pattern="2:4", where=LANGUAGE)
    view, _ = run(step)
    weight = view.linears("language.blocks[1].mlp")[0].module.weight
    place = tuple((weight == 0).nonzero()[0].tolist())
    with torch.no_grad():
        weight[place] = 0.01
    with pytest.raises(PromiseBroken, match=r"promised 50.0 % of zeros"):
        step.ensures(view)
    with torch.no_grad():  # as many zeros, but not two of every four
        weight[place[0], place[1] // 4 * 4 + 4 : place[1] // 4 * 4 + 8] = 0
    with pytest.raises(PromiseBroken, match="pattern 2:4"):
        step.ensures(view)


def test_wanda_takes_the_inputs_of_the_pruned_prefix() -> None:
    view, by_hand, data = fresh(), fresh(), batches()
    apply_pass(Wanda(sparsity=0.6, token_weights="text"), view, context(view, data))
    for unit in Walk(by_hand, data, ALL):
        for stage in unit.stages:
            for ref, stat in unit.observe(ColumnNorm, stage, "text").items():
                ref.module.weight.data.masked_fill_(wanda(ref.module.weight, stat.norm, 0.6, None), 0.0)
    assert all(torch.equal(w, weights(by_hand)[path]) for path, w in weights(view).items())


def test_the_choice_of_tokens_matters_and_is_in_the_notes() -> None:
    found = {}
    for mode, share in (("text", 0.5), ("uniform", 0.5), ("drift", 0.0), ("drift", 0.5), ("drift", 1.0)):
        step = Wanda(where=("language.blocks[1]",), token_weights=mode, drift_share=share)  # type: ignore[arg-type]
        view, notes = run(step, data=batches()[:1])
        found[mode, share] = torch.cat([mask.flatten() for mask in zeros(view).values()])
        assert notes.numbers["visual_token_weight"] == {"text": 0.0, "uniform": 1.0, "drift": share}[mode]
        assert notes.numbers.get("linears_without_drift") == (0 if mode == "drift" else None)
    assert torch.equal(found["drift", 0.0], found["text", 0.5])
    assert torch.equal(found["drift", 1.0], found["uniform", 0.5])
    assert not torch.equal(found["drift", 0.5], found["text", 0.5])
    assert not torch.equal(found["drift", 0.5], found["uniform", 0.5])


def test_a_linear_beside_the_blocks_has_no_drift_and_is_counted() -> None:
    _, notes = run(Wanda(where=("head", "language.blocks[2]")))
    assert notes.numbers["linears_without_drift"] == 1 and notes.numbers["linears"] == 8
    drifting, balanced = (run(Wanda(where=("head",), token_weights=mode))[0] for mode in ("drift", "balanced"))
    assert torch.equal(weights(drifting, "head")["lm_head"], weights(balanced, "head")["lm_head"])


class Mute(torch.nn.Module):
    """A norm that lets nothing through."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, self.value)


@both
def test_a_linear_that_gets_nothing_is_pruned_by_magnitude_and_counted(kind: Any) -> None:
    view = fresh()
    view.units[-2].module.post_attention_layernorm = Mute(0.0)
    view, notes = run(kind(where=LANGUAGE), view)
    down = 1  # gate and up get nothing, so that down gets nothing either
    assert notes.numbers["pruned_by_magnitude"] == 2 + down
    assert notes.numbers["dead_channels"] == 32 + 32 + 48
    gate = view.units[-2].linears[-3]
    plain = fresh().linear(gate.path).module.weight.detach()
    smallest = plain.masked_fill(least(plain.abs(), 0.5, None), 0.0)
    assert gate.role == "mlp.gate" and torch.equal(gate.module.weight, smallest)


@both
def test_inputs_that_are_not_finite_are_named(kind: Any) -> None:
    view = fresh()
    view.units[-2].module.post_attention_layernorm = Mute(float("nan"))
    with pytest.raises(WorkFailed, match="not finite") as caught:
        apply_pass(kind(where=LANGUAGE), view, context(view))
    assert "mlp" in str(caught.value.where)


@both
def test_it_goes_on_where_it_was_killed(kind: Any, tmp_path: Path) -> None:
    check_resumes(kind(), 4, tmp_path)


def test_a_second_pass_keeps_the_zeros_of_the_first() -> None:
    view, _ = run(Wanda(sparsity=0.3))
    before = zeros(view)
    run(SparseGPT(pattern="2:4"), view)
    assert all(bool((zeros(view)[path] | ~mask).all()) for path, mask in before.items())
    assert ask_promises(view, passes.find) == (["prune.wanda", "prune.sparsegpt"], None)


QUANTIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {"group": 8}),
    "gptq, asymmetric": ("gptq", {"group": 8, "symmetric": False, "bits": 3}),
    "gptq, left to right": ("gptq", {"group": 8, "act_order": "none", "refine": 0}),
    "gptaq": ("gptq", {"group": 8, "asymmetric": 0.25}),
    "rtn": ("rtn", {"group": 8, "bits": 3}),
    "rtn, asymmetric": ("rtn", {"group": 8, "symmetric": False, "search": "none"}),
    "hqq": ("hqq", {"group": 8}),
    "hqq, symmetric": ("hqq", {"group": 8, "symmetric": True}),
    "awq": ("awq", {"group": 8, "steps": 3, "symmetric": False}),
    "awq, gptq": ("awq", {"group": 8, "steps": 3, "solver": "gptq"}),
    "round": ("round", {"group": 8, "steps": 3, "rate": 10.0, "clip_rate": 5.0, "symmetric": False}),
    "round, rtn": ("round", {"group": 8, "steps": 3, "rate": 10.0, "init": "rtn"}),
    "mixed": ("mixed", {"group": 8, "bits": 3.5}),
    "smooth": ("smooth", {}),
    "static": ("static", {}),
}


FEW = ("language.blocks[1]", "vision.blocks[0]")


@pytest.fixture(scope="module")
def pruned() -> ModelView:
    return run(Wanda(pattern="2:4", where=FEW), data=batches()[:1])[0]


def copied(view: ModelView) -> ModelView:
    other = fresh()
    other.model.load_state_dict(view.model.state_dict())
    other.ledger = Ledger(list(view.ledger))
    return other


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizing_keeps_the_zeros(name: str, pruned: ModelView, tmp_path: Path) -> None:
    view = copied(pruned)
    before = {path: mask for path, mask in zeros(view).items() if path in view.ledger.promised_zeros}
    kind, settings = QUANTIZERS[name]
    step: Pass = passes.find(f"quantize.{kind}").from_settings({"where": FEW, **settings})
    run(step, view, batches()[:2])
    assert set(view.grids) == set(before)
    assert all(not bool(view.weight(path)[mask].any()) for path, mask in before.items())
    assert ask_promises(view, passes.find) == (["prune.wanda", step.name], None)
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    assert ask_promises(again, passes.find) == (["prune.wanda", step.name], None), "packed and unpacked"


def test_zeros_that_nobody_promised_are_weights_like_others(pruned: ModelView) -> None:
    promised, free = copied(pruned), copied(pruned)
    free.ledger = Ledger()
    before = zeros(free)
    for view in (promised, free):
        run(GPTQ(group=8, where=FEW), view, batches()[:1])
    assert all(not bool(promised.weight(path)[mask].any()) for path, mask in before.items() if path in promised.grids)
    assert any(bool(free.weight(path)[mask].any()) for path, mask in before.items() if path in free.grids)
