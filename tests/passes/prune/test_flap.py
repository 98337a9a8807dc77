"""Importance `flap`, its compensation, and `allocation: global`."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svlm import passes
from svlm.compress import storage
from svlm.compress.anatomy import view_of
from svlm.compress.errors import ModelError, PromiseBroken, Unmet, UsageError
from svlm.compress.export.run import export_model
from svlm.compress.pipeline import ask_promises
from svlm.passes.prune._groups import attention_of, mlp_of
from svlm.passes.prune._importance import allocate, best, fluctuation, shares
from svlm.passes.prune.structured import Structured
from tests import zoo
from tests.oracles import flap
from tests.passes.prune.test_structured import context, kept_rows, logits, pruned, reloaded

FLAP = Structured(ratio=0.5, multiple=4, importance="flap", token_weights="uniform")
ALIKE = ("llava-next", "llava-onevision", "idefics3", "smolvlm", "qwen2-vl", "paligemma", "trocr")
UNEVEN = replace(FLAP, allocation="global", ratio=0.4)


def test_scores_equal_the_loop() -> None:
    x, weights, matrix = torch.randn(7, 6).double(), torch.rand(7).double(), torch.randn(4, 6).double()
    mean = weights @ x / weights.sum()
    variance = weights @ (x - mean).square() / weights.sum()
    wanted = flap.wifv(x.tolist(), weights.tolist(), matrix.tolist())
    assert fluctuation(variance, matrix, 6).tolist() == pytest.approx(wanted, rel=1e-9)
    assert fluctuation(variance, matrix, 3).tolist() == pytest.approx(
        [wanted[0] + wanted[1], wanted[2] + wanted[3], wanted[4] + wanted[5]], rel=1e-9
    )
    assert shares(torch.tensor(wanted)).tolist() == pytest.approx(flap.shares(wanted), rel=1e-5)
    assert shares(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio, floor", [(0.3, 0.2), (0.5, 0.5), (0.7, 0.4), (0.1, 0.0)])
def test_global_sizes_equal_the_loop(seed: int, ratio: float, floor: float) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=g, dtype=torch.float64) ** p for n, p in ((12, 1), (20, 3), (7, 6))]
    assert allocate(scores, ratio, floor) == flap.global_sizes([s.tolist() for s in scores], ratio, floor)


def test_global_sizes_are_multiples_near_the_ratio_and_above_the_floor() -> None:
    dull, sharp = torch.cat([torch.zeros(60), torch.ones(4)]), torch.linspace(0, 1, 64)
    sizes = allocate([dull.double(), sharp.double()], 0.5, 0.25, 8)
    assert sum(sizes) == 64 and all(size % 8 == 0 and size >= 16 for size in sizes)
    assert sizes[0] < sizes[1], "the dead channels of the first go before what the second uses"
    assert allocate([torch.rand(10), torch.rand(10)], 0.5, 0.0, 8) == [8, 8], "what is no multiple goes first"
    assert allocate([torch.rand(4)], 0.5, 0.9) == [4], "the floor"


def test_flap_takes_what_moves_least_and_gives_its_mean_to_the_bias(tmp_path: Path) -> None:
    """Llama has no biases: the config says mlp_bias, and stock transformers loads them."""
    model, batch = zoo.build("llava")
    view, original = view_of(model), view_of(copy.deepcopy(model))
    seen: dict[str, Tensor] = {}
    for unit in original.parts["language"]:
        down = mlp_of(unit).down
        original.linear(down).module.register_forward_pre_hook(
            lambda module, args, down=down: seen.__setitem__(down, args[0])
        )
    logits(original, batch)
    masks = view.token_masks(batch)
    real = masks.text | masks.vision
    notes = pruned(FLAP, view, batch)
    assert (notes.numbers["compensated"], notes.numbers["not_compensated"]) == (3, 0)
    assert notes.numbers["config"] == {"text_config.intermediate_size": 24, "text_config.mlp_bias": True}
    for unit in original.parts["language"]:
        mlp = mlp_of(unit)
        x, weight = seen[mlp.down][real].double(), original.linear(mlp.down).module.weight.detach()
        scores = flap.wifv(x.tolist(), [1.0] * len(x), weight.tolist())
        kept = kept_rows(original.linear(mlp.up).module.weight, view.linear(mlp.up).module.weight)
        assert kept == best(torch.tensor(scores), 24)
        gone = sorted(set(range(mlp.width)) - set(kept))
        small = view.linear(mlp.down).module
        torch.testing.assert_close(small.bias, (weight[:, gone].double() @ x.mean(0)[gone]).float())
        whole = original.linear(mlp.down).module  # held at its mean: what compensation means
        y = x.clone()
        y[:, gone] = x.mean(0)[gone]
        torch.testing.assert_close(small(x.float()[:, kept]), whole(y.float()), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(reloaded(view, tmp_path), batch), logits(view, batch))
    model.config.text_config.mlp_bias = False
    with pytest.raises(PromiseBroken, match="config"):
        FLAP.ensures(view)


def test_a_bias_that_is_there_takes_the_mean_and_one_that_none_can_say_is_counted(tmp_path: Path) -> None:
    model, batch = zoo.build("blip-2")  # OPT: fc2 has a bias
    original = copy.deepcopy(model)
    view = view_of(model)
    notes = pruned(FLAP, view, batch)
    assert notes.numbers["compensated"] == 3 and len(notes.numbers["config"]) == 1
    down = mlp_of(view.parts["language"][0]).down
    assert not torch.allclose(view.linear(down).module.bias, original.get_submodule(down).bias)
    assert torch.equal(logits(reloaded(view, tmp_path), batch), logits(view, batch))
    model, batch = zoo.build("gemma3")  # no key gives its MLPs biases
    view = view_of(model)
    with pytest.raises(Unmet, match="bias that compensates"):
        replace(FLAP, compensate="always").requires(view, context(view, batch))
    notes = pruned(FLAP, view, batch)
    assert (notes.numbers["compensated"], notes.numbers["not_compensated"]) == (0, 3)
    silent = view_of(zoo.model("blip-2"))
    notes = pruned(replace(FLAP, compensate="never"), silent, zoo.batch("blip-2"))
    assert notes.numbers["compensated"] == 0
    assert torch.equal(silent.linear(down).module.bias, original.get_submodule(down).bias)


def test_heads_are_compensated_too() -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    notes = pruned(replace(FLAP, what=("mlp", "heads")), view, batch)
    assert notes.numbers["compensated"] == 6
    assert notes.numbers["config"]["text_config.attention_bias"] is True
    unit = view.parts["language"][0]
    assert bool(view.linear(attention_of(unit).o).module.bias.any())
    assert not bool(view.linear(str(attention_of(unit).q)).module.bias.any()), "the config gives it one, of zeros"


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[pytest.mark.slow] if family in ALIKE else []) for family in zoo.FAMILIES],
)
def test_blocks_of_different_widths_load_with_svlm(family: str, tmp_path: Path) -> None:
    model, batch = zoo.build(family)
    view, original = view_of(model), view_of(copy.deepcopy(model))
    what: tuple[Any, ...] = ("mlp", "heads") if family in ("llava", "qwen3-vl", "gemma3") else ("mlp",)
    step = replace(UNEVEN, what=what, multiple=4, floor=0.3)
    notes = pruned(step, view, batch)
    assert "svlm.load alone" in notes.numbers["loads_with"] and not notes.numbers["config"]
    widths = [mlp_of(unit).width for unit in view.parts["language"] if unit.mlp]
    before = [mlp_of(unit).width for unit in original.parts["language"] if unit.mlp]
    assert abs(sum(widths) - 0.6 * sum(before)) <= 2 and all(w % 4 == 0 and w >= 0.3 * 48 for w in widths)
    readers = [unit.mlp.down for unit in view.parts["language"] if unit.mlp]
    assert notes.numbers["compensated"] >= sum(a != b for a, b in zip(widths, before))
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    assert [again.linear(path).module.weight.shape for path in readers] == [
        view.linear(path).module.weight.shape for path in readers
    ]
    assert torch.equal(logits(again, batch), logits(view, batch))
    assert ask_promises(again, passes.find) == (["prune.structured"], None)
    fresh = view_of(zoo.model(family, seed=1))
    step.rebuild(fresh, notes.record)
    fresh.model.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, batch), logits(view, batch))


def test_uneven_heads_keep_whole_groups_or_are_refused() -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    pruned(replace(UNEVEN, what=("heads",), ratio=0.34), view, batch)
    geometry = [attention_of(unit) for unit in view.parts["language"]]
    assert sorted(a.n_kv_heads for a in geometry) == [1, 1, 2]
    assert all(a.n_heads == 2 * a.n_kv_heads for a in geometry)
    for family in ("qwen2-vl", "blip-2"):
        other = view_of(zoo.model(family))
        with pytest.raises(Unmet):
            replace(UNEVEN, what=("heads",)).requires(other, context(other, zoo.batch(family)))
    with pytest.raises(Unmet, match="rounds to nothing"):
        replace(UNEVEN, floor=0.95).requires(view, context(view, batch))


def test_connectors_lose_channels_too(tmp_path: Path) -> None:
    """LLaVA's projector is as wide as the language model by its config; svlm alone says otherwise."""
    model, batch = zoo.build("llava")
    view = view_of(model)
    step = replace(UNEVEN, where="connector", importance="minitron")
    with pytest.raises(Unmet, match="no stock config"):
        replace(step, allocation="uniform").requires(view, context(view, batch))
    pruned(step, view, batch)
    assert mlp_of(view.parts["connector"][0]).width == 20
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    assert torch.equal(logits(again, batch), logits(view, batch))


def test_an_uneven_model_is_not_exported_nor_loaded_from_a_damaged_folder(tmp_path: Path) -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    pruned(replace(UNEVEN, importance="magnitude"), view, batch)
    storage.save(view, tmp_path / "saved")
    with pytest.raises(UsageError, match="no other loader"):
        export_model(tmp_path / "saved", "compressed-tensors", tmp_path / "out", find=passes.find)
    norm = view.model.model.language_model.norm
    norm.weight = nn.Parameter(norm.weight[:7])
    storage.save(view, tmp_path / "damaged")
    with pytest.raises(ModelError, match="lacks weights"):
        storage.load_model(tmp_path / "damaged", find=passes.find)


def test_a_second_pass_goes_on_from_different_widths_or_is_refused(tmp_path: Path) -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    pruned(UNEVEN, view, batch)
    for what in ("mlp", "hidden"):
        uniform = replace(UNEVEN, allocation="uniform", importance="magnitude", what=(what,))
        with pytest.raises(Unmet, match="differ in shape"):
            uniform.requires(view, context(view, batch))
    pruned(replace(UNEVEN, ratio=0.2), view, batch)
    assert sum(mlp_of(unit).width for unit in view.parts["language"]) == 72
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    assert torch.equal(logits(again, batch), logits(view, batch))
    assert ask_promises(again, passes.find) == (["prune.structured"] * 2, None)


def test_the_promise_holds_together_and_survives_a_block_that_goes() -> None:
    model, batch = zoo.build("llava")
    view = view_of(model)
    notes = pruned(replace(UNEVEN, importance="magnitude"), view, batch)
    step = replace(UNEVEN, importance="magnitude")
    layers = model.model.language_model.layers
    del layers[0]
    view.refresh()
    step.ensures(view)
    shapes = [p.shape for p in model.parameters()]
    step.rebuild(view, notes.record)
    assert [p.shape for p in model.parameters()] == shapes, "blocks that moved up keep what they hold"
    down = view.linear(mlp_of(view.parts["language"][0]).down).module
    down.weight = nn.Parameter(torch.zeros(32, 400))
    with pytest.raises(PromiseBroken, match="smaller"):
        step.ensures(view)


@pytest.mark.parametrize(
    "settings",
    [
        {"what": ("hidden",), "importance": "flap"},
        {"what": ("hidden",), "allocation": "global"},
        {"compensate": "always"},
        {"floor": 1.0},
    ],
)
def test_settings_that_contradict(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Structured(**settings)
