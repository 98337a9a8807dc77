"""quantize.rtn and quantize.gptq on tiny models: what they refuse, count, promise, and keep across a kill."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svlm import passes
from svlm.calib.stats import Hessian, MeanSquare
from svlm.calib.walk import Walk
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Pass
from svlm.compress.errors import PromiseBroken, SelectorError, Unmet, WorkFailed
from svlm.compress.pipeline import apply_pass
from svlm.compress.runtime.grid import on_grid
from svlm.passes.quantize._common import fitting_group
from svlm.passes.quantize._gptq import gptq
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.quantize.rtn import RTN
from tests import zoo
from tests.passes.quantize.helpers import ALL, BF16, batches, check_resumes, context, fresh, run, weights


def test_settings_that_no_model_could_take() -> None:
    for bad in ({"bits": 5}, {"group": 0}, {"group": -2}, {"bits": 8, "symmetric": False}):
        for kind in (RTN, GPTQ):
            with pytest.raises(ValueError, match=r"bits|group"):
                kind(**bad)
    for wrong in ({"damp": 0.0}, {"blocksize": 0}, {"refine": -1}, {"asymmetric": 1.5}):
        with pytest.raises(ValueError, match=r"damp|blocksize|refine|asymmetric"):
            GPTQ(**wrong)


@pytest.mark.parametrize("kind", [RTN, GPTQ])
def test_the_ladder_goes_up_in_bits_and_ends(kind: type[RTN] | type[GPTQ]) -> None:
    step: Any = kind(bits=2, group=8, symmetric=False, where=("language",), token_weights="text")
    rungs = []
    while step is not None:
        rungs.append((step.bits, step.group, step.symmetric, step.where, step.token_weights))
        step = step.weaker()
    same = (("language",), "text")
    assert rungs == [(2, 8, False, *same), (3, 8, False, *same), (4, 8, False, *same), (8, 8, True, *same)]


@pytest.mark.parametrize("family", ["gemma3", "donut", "trocr"])
def test_parts_that_a_model_lacks_are_no_part_of_the_default(family: str) -> None:
    """Gemma 3's connector has no linear layer; some encoder-decoders have no connector."""
    view, notes = run(GPTQ(group=-1), fresh(family), [zoo.batch(family, samples=2)])
    assert notes.numbers["linears"] == len(view.linears(("vision", "language"))) > 0
    for wrong in ("connector", ["connector"], ["vision", "conector"], ["vision", "connector.projection"]):
        with pytest.raises(SelectorError, match=r"conn?ector"):
            view.linears(wrong)


@pytest.mark.parametrize("kind", [RTN, GPTQ])
def test_what_is_refused_before_a_weight_is_touched(kind: type[RTN] | type[GPTQ]) -> None:
    view = fresh()
    before = weights(view)
    with pytest.raises(SelectorError):
        apply_pass(kind(group=8, where=("language.blocks[7]",)), view, context(view))
    assert not view.grids and all(torch.equal(w, before[path]) for path, w in weights(view).items())
    apply_pass(kind(group=8, where=("language",)), view, context(view))
    with pytest.raises(Unmet, match="quantized already"):
        apply_pass(kind(group=8), view, context(view))
    assert not any(path.startswith("model.vision") for path in view.grids), "refused as a whole"


def test_a_tied_head_is_refused_and_a_free_one_is_rounded_when_named() -> None:
    tied, free = fresh("paligemma"), fresh("llava")
    assert tied.tied_embeddings and not free.tied_embeddings
    with pytest.raises(Unmet, match="shares its weight with the embedding"):
        apply_pass(GPTQ(group=8, where=("head",)), tied, context(tied))
    assert "lm_head" not in run(RTN(group=8))[0].grids
    assert set(run(RTN(group=8, where=("head",)), free)[0].grids) == {"lm_head"}


def test_without_samples_there_is_nothing_to_calibrate_on() -> None:
    with pytest.raises(Unmet, match="needs calibration data"):
        run(GPTQ(group=8), data=[])


def test_rounding_to_nearest_needs_no_samples_and_says_what_it_did_without() -> None:
    view, notes = run(RTN(bits=4, group=8, search="none"), data=[])
    assert notes.numbers["linears"] == len(view.linears(ALL)) == len(view.grids)
    assert "searched_without_importance" not in notes.numbers
    blind, counted = run(RTN(bits=4, group=8), data=[])
    assert counted.numbers["searched_without_importance"] == len(blind.grids) == notes.numbers["linears"]
    assert counted.numbers["relative_weight_error"] < 0.8 * notes.numbers["relative_weight_error"], "still searched"
    seeing, of_data = run(RTN(bits=4, group=8))
    assert of_data.numbers["searched_without_importance"] == 0
    assert any(not torch.equal(w, weights(blind)[path]) for path, w in weights(seeing).items())


@pytest.mark.parametrize(
    ("width", "group", "fits"),
    [
        (4304, 64, 16), (3420, 64, -1), (3420, 128, -1), (192, 128, 64), (24, 8, 8), (24, 16, -1), (40, 1024, -1),
        (96, 1024, 32), (4304, -1, -1), (100, 100, 100), (50, 100, 50), (75, 100, 25), (30, 60, 30),
    ],
)  # fmt: skip
def test_the_group_of_a_width_that_is_not_a_multiple(width: int, group: int, fits: int) -> None:
    assert fitting_group(width, group) == fits


@pytest.mark.parametrize("step", [GPTQ(group=32), RTN(group=32)], ids=["gptq", "rtn"])
def test_linears_that_the_group_does_not_divide_take_a_smaller_one_and_the_promise_knows(step: Any) -> None:
    view = fresh()  # language 32 and 48 wide, vision 24 and 40
    _, notes = run(step, view)
    groups = {path: grid.group for path, grid in view.grids.items()}
    assert groups == {path: fitting_group(view.linear(path).module.in_features, 32) for path in view.grids}
    wanted = {"32": 0, "16": 0, "row": 0}
    for size in groups.values():
        wanted["row" if size == -1 else str(size)] += 1
    assert notes.numbers["group_sizes"] == wanted and all(wanted.values())
    assert notes.numbers["linears_with_another_group"] == wanted["16"] + wanted["row"]
    step.ensures(view)
    (path, *_) = [path for path, size in groups.items() if size == 16]
    grid = view.grids[path]
    wide = grid.scale.repeat_interleave(16 // 8, 1)
    view.grids[path] = type(grid)(grid.bits, 8, True, wide)  # the same values, but not what the record says
    with pytest.raises(PromiseBroken, match="group 16"):
        step.ensures(view)


@pytest.mark.parametrize("step", [RTN(bits=3, group=8), GPTQ(bits=3, group=8)], ids=["rtn", "gptq"])
def test_a_touched_weight_or_grid_breaks_the_promise(step: Pass) -> None:
    view, _ = run(step)
    step.ensures(view)
    ref = view.linears("language.blocks[1].mlp")[0]
    kept = ref.module.weight.detach().clone()
    with torch.no_grad():
        ref.module.weight[0, :4] *= 1.07
    with pytest.raises(PromiseBroken, match="3-bit grid") as caught:
        step.ensures(view)
    assert caught.value.where == ref.path and "%" in caught.value.found
    ref.module.weight.data.copy_(kept)
    step.ensures(view)
    grid = view.grids.pop(ref.path)
    with pytest.raises(PromiseBroken, match="3 bits, group 8, symmetric"):
        step.ensures(view)
    view.grids[ref.path] = type(grid)(4, 8, True, grid.scale)
    with pytest.raises(PromiseBroken, match="3 bits"):
        step.ensures(view)


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(2, True), (2, False), (3, True), (3, False), (4, True), (4, False), (8, True)]
)
def test_few_bits_are_few_values_and_gptq_moves_the_outputs_less(bits: int, symmetric: bool) -> None:
    data = batches()
    nearest, _ = run(RTN(bits=bits, group=8, symmetric=symmetric, where=("language",), search="none"))
    solved, notes = run(GPTQ(bits=bits, group=8, symmetric=symmetric, where=("language",)))
    for view in (nearest, solved):
        for path, weight in weights(view, ("language",)).items():
            rows = weight.reshape(-1, 8)
            assert max(len(row.unique()) for row in rows) <= 2**bits
            assert on_grid(weight, view.grids[path]) and torch.equal(weight, weight.to(BF16).float())
    assert notes.numbers["rounded_to_nearest"] == 0 and 0 < notes.numbers["worst_relative_error"] < 1
    original = view_of(zoo.model("llava")).model
    if bits < 8:  # at 8 bits both are as near as bfloat16 gets
        assert distance(solved.model, original, data) < distance(nearest.model, original, data)


def distance(model: Any, original: Any, data: list[dict[str, torch.Tensor]]) -> float:
    """Mean squared difference of the logits of real tokens."""
    total = 0.0
    with torch.no_grad():
        for batch in data:
            real = batch["attention_mask"].bool()
            total += float((model(**batch).logits - original(**batch).logits)[real].square().mean())
    return total


def test_the_importance_search_lowers_the_weighted_error_of_rounding() -> None:
    data = batches()
    plain, before = run(RTN(bits=3, group=8, where=("language",), search="none"))
    searched, after = run(RTN(bits=3, group=8, where=("language",)))
    original = view_of(zoo.model("llava")).model
    assert distance(searched.model, original, data) < distance(plain.model, original, data)
    assert "visual_token_share" in after.numbers and "visual_token_share" not in before.numbers


def first_stage(view: ModelView, token_weights: Any) -> Hessian:
    unit = next(iter(Walk(view, batches(), "language.blocks[0].attn.q")))
    (stat,) = unit.observe(Hessian, token_weights=token_weights).values()
    return stat


def solve(weight: torch.Tensor, h: torch.Tensor, step: GPTQ) -> torch.Tensor:
    return gptq(
        weight, h, bits=step.bits, group=step.group, symmetric=step.symmetric, dtype=BF16, scale_search=True, refine=2
    ).weight


@pytest.mark.parametrize("mode", ["gradient", "balanced", "uniform", "text"])
def test_token_weights_reach_the_hessian(mode: Any) -> None:
    step = GPTQ(bits=3, group=8, where=("language.blocks[0].attn.q",), token_weights=mode)
    view, notes = run(step)
    original = fresh()
    (ref,) = original.linears(step.where)
    for other in ("gradient", "balanced", "uniform", "text"):
        wanted = solve(ref.module.weight, first_stage(original, other).matrix, step)
        assert torch.equal(view.linear(ref.path).module.weight, wanted) == (other == mode)
    masks = [original.token_masks(batch) for batch in batches()]
    visual, text = (sum(int(getattr(m, kind).sum()) for m in masks) for kind in ("vision", "text"))
    assert notes.numbers["visual_token_share"] == pytest.approx(visual / (visual + text))
    weight = notes.numbers["visual_token_weight"]
    if mode == "gradient":
        assert 0 < weight["attn"]["min"] <= weight["attn"]["median"] <= weight["attn"]["max"] and weight["mlp"]
    else:
        assert weight == pytest.approx({"balanced": text / visual, "uniform": 1, "text": 0}[mode])


@pytest.mark.parametrize("step", [GPTQ(group=8), RTN(group=8, search="importance")], ids=["gptq", "rtn"])
def test_gradient_weights_need_answers(step: Pass) -> None:
    bare = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches()]
    with pytest.raises(Unmet, match="needs answers"):
        run(step, data=bare)
    run(type(step).from_settings(step.settings() | {"token_weights": "balanced"}), data=bare)


def test_true_sequential_takes_statistics_after_the_earlier_linears_were_rounded() -> None:
    where = ("language.blocks[0]",)
    kind: dict[str, Any] = {"bits": 2, "group": 8, "where": where, "token_weights": "balanced", "equalize": False}
    together, _ = run(GPTQ(**kind, true_sequential=False))
    one_by_one, _ = run(GPTQ(**kind))
    a, b = weights(together, where), weights(one_by_one, where)
    same = {path.rsplit(".", 1)[1]: torch.equal(a[path], b[path]) for path in a}
    assert same["q_proj"] and same["k_proj"] and same["v_proj"], "nothing comes before them"
    assert not (same["o_proj"] or same["gate_proj"] or same["up_proj"] or same["down_proj"])
    view = fresh()  # by hand: the second stage sees what the first one, rounded, gives
    unit = next(iter(Walk(view, batches(), where)))
    for ref in unit.stages[0]:
        ref.module.weight.data.copy_(b[ref.path])
    ((ref, stat),) = unit.observe(Hessian, unit.stages[1]).items()
    assert torch.equal(solve(ref.module.weight, stat.matrix, GPTQ(bits=2, group=8)), b[ref.path])


def test_a_linear_without_input_is_rounded_to_nearest_and_counted() -> None:
    view = fresh()
    block = next(unit for unit in view.units if unit.name == "language.blocks[1]").module
    block.post_attention_layernorm.weight.data.zero_()  # nothing reaches the MLP of this block
    _, notes = run(GPTQ(bits=4, group=8, where=("language",)), view)
    assert notes.numbers["rounded_to_nearest"] == 3, "gate, up, down"
    assert notes.numbers["dead_columns"] >= 32 + 32 + 48
    assert notes.numbers["linears_without_tokens"] == 0, "tokens came, and were zero"


def test_single_channels_without_input_are_zeroed_and_counted() -> None:
    view = fresh()
    block = next(unit for unit in view.units if unit.name == "language.blocks[1]").module
    block.post_attention_layernorm.weight.data[[3, 17]] = 0  # two dead inputs of gate and up
    _, notes = run(GPTQ(bits=4, group=8, where=("language.blocks[1].mlp",)), view)
    assert notes.numbers["dead_columns"] == 4 and notes.numbers["rounded_to_nearest"] == 0
    for ref in view.linears("language.blocks[1].mlp.gate"):
        assert not ref.module.weight[:, [3, 17]].any() and ref.module.weight[:, 4].any()


def test_a_linear_that_no_token_reaches_is_rounded_to_nearest_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hessian, "update", lambda self, x, weights: None)
    monkeypatch.setattr(MeanSquare, "update", lambda self, x, weights: None)
    where = ("language.blocks[0]",)
    view, notes = run(GPTQ(bits=4, group=8, where=where, equalize=False))
    assert notes.numbers["linears_without_tokens"] == notes.numbers["rounded_to_nearest"] == len(view.grids) == 7
    plain, _ = run(RTN(bits=4, group=8, where=where, search="none"))
    assert all(torch.equal(w, weights(plain)[path]) for path, w in weights(view).items())
    view, notes = run(RTN(bits=4, group=8, where=where))
    assert notes.numbers["searched_without_importance"] == len(view.grids)


@pytest.mark.parametrize("kind", [GPTQ, RTN, functools.partial(GPTQ, asymmetric=0.25)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_by_name(kind: Callable[..., Pass], value: float) -> None:
    view = fresh()
    block = next(unit for unit in view.units if unit.name == "language.blocks[1]").module
    block.input_layernorm.weight.data[5] = value
    with pytest.raises(WorkFailed, match="token_weights: balanced"):
        run(kind(group=8), view)
    with pytest.raises(WorkFailed, match="not finite") as caught:
        run(kind(group=8, token_weights="balanced"), view)
    assert caught.value.where.endswith("layers.1.self_attn.q_proj") and "32 channels" in caught.value.found
    assert not any("language_model.layers.1" in path for path in view.grids), "nothing of it was rounded"


def test_the_factor_of_a_hessian_is_computed_once_for_all_linears_that_share_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from svlm.passes.quantize import _gptq

    calls: list[int] = []
    original = _gptq.inverse_factor
    monkeypatch.setattr(_gptq, "inverse_factor", lambda h, damp: calls.append(len(h)) or original(h, damp))
    run(GPTQ(bits=4, group=8, where=("language.blocks[0]",)))
    assert calls == [32, 32, 32, 48], "q, k, v; o; gate, up; down"


def test_a_hessian_that_is_not_positive_definite_is_damped_more_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Hessian.update

    def shifted(self: Hessian, x: torch.Tensor, weights: torch.Tensor) -> None:
        update(self, x, weights)
        self.matrix -= 0.05 * self.matrix.diagonal().mean() * torch.eye(len(self.matrix))

    monkeypatch.setattr(Hessian, "update", shifted)
    _, notes = run(GPTQ(bits=4, group=8, where=("language.blocks[0]",)))
    assert notes.numbers["damp_retries"] > 0 and notes.numbers["rounded_to_nearest"] == 0


def test_the_inputs_before_and_after_rounding_are_those_of_the_same_tokens() -> None:
    """GPTAQ's statistic by hand: the inputs of the second block in the whole model, before and after the first."""
    from svlm.passes.quantize._drift import Drift, Twin

    view, where, data = fresh(), ("language",), batches()
    untouched, view.storage_dtype = fresh(), torch.float32  # by hand it is computed in float32 on every machine
    twin, walk = Twin(view, context(view), where), iter(Walk(view, data, where))
    unit = next(walk)
    for ref in unit.linears:
        ref.module.weight.data.mul_(0.9)
    unit = next(walk)
    twin.follow(unit.name)
    stage = unit.stages[0]
    before = twin.inputs(stage)
    (ref, stat), *_ = unit.observe(lambda: Drift(before[stage[0].path]), stage, "uniform").items()
    rows: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for batch in data:
        for late, model in ((False, untouched.model), (True, view.model)):
            seen: list[torch.Tensor] = []
            linear = model.get_submodule(ref.path)
            hook = linear.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                model(**batch)
            hook.remove()
            rows[late].append(seen[0][batch["attention_mask"].bool()])
    old, new = (torch.cat(rows[late]).double() for late in (False, True))
    assert stat.cross is not None and stat.tokens == len(new)
    torch.testing.assert_close(stat.cross.double(), 2 * (old - new).T @ new / len(new), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(stat.matrix.double(), 2 * new.T @ new / len(new), rtol=1e-3, atol=1e-5)


def test_the_asymmetric_term_changes_the_later_blocks_and_not_the_first_stage() -> None:
    where = ("language",)
    plain, _ = run(GPTQ(bits=2, group=8, where=where))
    drifted, notes = run(GPTQ(bits=2, group=8, where=where, asymmetric=0.5))
    a, b = weights(plain, where), weights(drifted, where)
    first = [path for path in a if "layers.0.self_attn" in path and not path.endswith("o_proj")]
    assert len(first) == 3 and all(torch.equal(a[path], b[path]) for path in first), "nothing differs yet"
    assert not any(torch.equal(a[path], b[path]) for path in a if "layers.1" in path)
    assert notes.numbers["linears_without_a_pair"] == 0


def test_calls_that_cannot_be_paired_leave_the_term_out() -> None:
    from svlm.passes.quantize._drift import Drift, Kept

    kept = Kept()
    kept.update(torch.ones(4, 3), torch.ones(4))
    stat = Drift(kept)
    stat.update(torch.ones(5, 3), torch.ones(5))
    assert stat.cross is None and stat.tokens == 5 and torch.equal(stat.matrix, torch.full((3, 3), 2.0))


def test_the_asymmetric_term_is_refused_where_tokens_are_dropped() -> None:
    view = fresh()
    apply_pass(passes.find("tokens.grid").from_settings({"keep": 0.5}), view, context(view))
    with pytest.raises(Unmet, match="same tokens"):
        run(GPTQ(group=8, asymmetric=0.25), view)


@pytest.mark.parametrize(
    "step",
    [GPTQ(bits=3, group=8), RTN(bits=3, group=32), GPTQ(bits=3, group=8, asymmetric=0.25)],
    ids=["gptq", "rtn", "gptaq"],
)
def test_a_killed_pass_resumes_at_the_finished_block_with_the_same_numbers(step: Pass, tmp_path: Path) -> None:
    check_resumes(step, 4, tmp_path)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3", "blip-2", "florence-2", "trocr"])
def test_all_parts_of_other_families(family: str) -> None:
    if family not in zoo.FAMILIES:
        pytest.fail(f"{family} is not in the zoo: {zoo.FAMILIES}")
    view = fresh(family)
    parts = [part for part in ALL if view.parts.get(part) and any(unit.linears for unit in view.parts[part])]
    step = GPTQ(bits=4, group=-1, where=tuple(parts))
    _, notes = run(step, view, data=[zoo.batch(family)])
    assert set(view.grids) == {ref.path for ref in view.linears(step.where)}
    assert 0 <= notes.numbers["visual_token_share"] < 1
