"""distill.blocks: targets are the original's states, inputs come from the healed prefix; resumes, refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svlm.calib.walk import Walk
from svlm.compress.anatomy import ModelView
from svlm.compress.base import Context, evaluating
from svlm.compress.errors import Unmet
from svlm.compress.pipeline import apply_pass, ask_promises
from svlm.passes import find
from svlm.passes.distill.blocks import Blocks
from svlm.passes.quantize.rtn import RTN
from svlm.passes.tokens.dpp import DPP
from tests import zoo
from tests.oracles.distill import distance
from tests.passes.distill.test_features import hidden, without
from tests.passes.distill.test_logits import changed, distilled, divergence, pair

QUICK = Blocks(steps=10, lr=3e-3, batch_size=4, token_weights="uniform")


def walking(
    student: ModelView, teacher: ModelView, fit: list[Mapping[str, Tensor]], scratch: Path | None = None
) -> Context:
    @contextmanager
    def lend() -> Iterator[ModelView]:
        with evaluating(teacher.model):
            yield teacher

    def walk(where: Any = None, **options: Any) -> Walk:
        return Walk(student, fit, where, scratch=scratch, **options)

    return Context(fit, walk, lend, scratch=scratch)


def test_each_block_learns_what_the_original_returned() -> None:
    student, teacher = pair()
    batch = zoo.batch("llava", 3)
    start = distance(hidden(student, batch, 0), hidden(teacher, batch, 0), "mse")
    before, old = divergence(student, teacher, batch), {k: v.clone() for k, v in student.model.named_parameters()}
    numbers = distilled(QUICK, student, walking(student, teacher, [batch])).numbers
    assert numbers["loss"]["language.blocks[0]"][0] == pytest.approx(start, rel=1e-4)
    for block in (0, 1):  # the states that a whole forward of the healed model has
        apart = distance(hidden(student, batch, block), hidden(teacher, batch, block), "mse")
        assert numbers["loss"][f"language.blocks[{block}]"][1] == pytest.approx(apart, rel=1e-4)
    assert numbers["mean_loss_left"] < 0.5 and divergence(student, teacher, batch) < 0.8 * before
    assert numbers["blocks_trained"] == 3 and numbers["blocks_left_alone"] == {"it returns the same already": 4}
    assert all("language_model" in name for name in changed(student, old))


@pytest.mark.parametrize("family", ["qwen3-vl", "blip-2-t5", "florence-2"])
def test_other_families(family: str) -> None:
    student, teacher = pair(family)
    with torch.no_grad():
        for unit in student.parts["vision"][1:2]:
            for ref in unit.linears:
                ref.module.weight.mul_(1.2)
    batch = zoo.batch(family)
    before = divergence(student, teacher, batch)
    numbers = distilled(QUICK, student, walking(student, teacher, [batch])).numbers
    assert numbers["mean_loss_left"] < 0.8 and divergence(student, teacher, batch) < before
    assert "vision.blocks[1]" in numbers["loss"] and "vision.blocks[0]" not in numbers["loss"]


def test_blocks_learn_from_their_origins() -> None:
    student, teacher = pair()
    without(student, 1)
    batch = zoo.batch("llava")
    before = divergence(student, teacher, batch)
    numbers = distilled(QUICK, student, walking(student, teacher, [batch])).numbers
    assert numbers["mean_loss_left"] < 0.7 and divergence(student, teacher, batch) < before
    stranger, _ = pair()
    without(stranger, 1, record=False)
    with pytest.raises(Unmet, match="which block of the original"):
        QUICK.requires(stranger, walking(stranger, teacher, [batch]))


def test_after_a_token_pass_the_tokens_that_are_left_count() -> None:
    student, teacher = pair()
    DPP(keep=0.5).rebuild(student, {})
    batch = zoo.batch("llava", 3)
    before = divergence(student, teacher, batch)
    numbers = distilled(replace(QUICK, batch_size=2), student, walking(student, teacher, [batch])).numbers
    assert numbers["blocks_trained"] == 3 and divergence(student, teacher, batch) < before
    assert numbers["mean_loss_left"] < 0.9


@pytest.mark.parametrize("train", ["full", "lora"])
def test_killed_in_a_block_and_resumed(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = [zoo.batch("llava", 2, seed) for seed in range(3)]
    step = replace(QUICK, steps=6, train=train, lr=1e-2, lora_rank=4, where="language", batch_size=1)
    calm, teacher = pair()
    wanted = step.apply(calm, walking(calm, teacher, fit)).numbers
    whole, taken = torch.optim.AdamW.step, []

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        if len(taken) in (10, 15):
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", dies)
    for _ in range(2):
        view, teacher = pair()
        with pytest.raises(KeyboardInterrupt):
            step.apply(view, walking(view, teacher, fit, tmp_path))
        torch.rand(3)
    view, teacher = pair()
    found = step.apply(view, walking(view, teacher, fit, tmp_path)).numbers
    assert found == wanted and 0 < wanted["mean_loss_left"] < 1
    assert all(torch.equal(v, view.model.state_dict()[k]) for k, v in calm.model.state_dict().items())
    saved = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert saved == {"walk.json", *(f"{i:05d}.safetensors" for i in range(3))}


def test_scales_train_block_by_block_and_stay_on_their_grids() -> None:
    student, teacher = pair()
    with torch.no_grad():
        for ref in student.linears():
            ref.module.weight.copy_(teacher.linear(ref.path).module.weight)
    batch = zoo.batch("llava")
    ctx = walking(student, teacher, [batch])
    apply_pass(RTN(bits=2, group=8, where=("language.blocks[1:]",), search="none"), student, ctx)
    before = divergence(student, teacher, batch)
    notes = apply_pass(replace(QUICK, train="scales", lr=2e-2, where="language"), student, ctx)
    assert ask_promises(student, find) == (["quantize.rtn", "distill.blocks"], None)
    assert notes.numbers["blocks_left_alone"] == {"nothing of it is quantized": 1}
    assert notes.numbers["trained_parameters"] == sum(grid.scale.numel() for grid in student.grids.values())
    assert divergence(student, teacher, batch) < before


def test_the_connector_is_trained_or_refused() -> None:
    student, teacher = pair()
    with torch.no_grad():
        for ref in student.linears("connector"):
            ref.module.weight.mul_(1.3)
    old = {k: v.clone() for k, v in student.model.named_parameters()}
    step = replace(QUICK, train="connector", lr=1e-2)
    numbers = distilled(step, student, walking(student, teacher, [zoo.batch("llava")])).numbers
    assert numbers["blocks"] == 1 and numbers["mean_loss_left"] < 0.9
    assert all("projector" in name for name in changed(student, old))
    gemma, other = pair("gemma3")
    with pytest.raises(Unmet, match="no linear to walk to"):
        step.requires(gemma, walking(gemma, other, [zoo.batch("gemma3")]))
