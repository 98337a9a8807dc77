"""distill.logits: heals, repeats itself bit for bit, keeps the best, leaves nothing behind, refuses gridded weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Context, Notes, evaluating
from svlm.compress.errors import PromiseBroken, Unmet, WorkFailed
from svlm.compress.ledger import Record
from svlm.compress.pipeline import apply_pass, ask_promises
from svlm.compress.runtime.grid import Grid
from svlm.passes import find
from svlm.passes.distill import _losses
from svlm.passes.distill._losses import answer_positions
from svlm.passes.distill._observe import Teacher, answer_logits
from svlm.passes.distill.logits import Logits
from svlm.passes.quantize.rtn import RTN
from svlm.passes.tokens.dpp import DPP
from tests import zoo

QUICK = Logits(steps=12, lr=3e-3, batch_size=2)


def pair(family: str = "llava") -> tuple[ModelView, ModelView]:
    """(student with noise on its language MLPs, teacher)."""
    model = zoo.model(family)
    teacher, student = view_of(copy.deepcopy(model)), view_of(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for ref in student.linears("language"):
            ref.module.weight += 0.2 * torch.randn(ref.module.weight.shape, generator=generator)
    return student, teacher


def context(teacher: ModelView, fit: list[Mapping[str, Tensor]], recovery: Any = None, seed: int = 0) -> Context:
    @contextmanager
    def lend() -> Iterator[ModelView]:
        with evaluating(teacher.model):
            yield teacher

    return Context(fit, lambda *a, **o: None, lend, seed=seed, recovery=recovery)


def distilled(step: Logits, student: ModelView, ctx: Context) -> Notes:
    step.requires(student, ctx)
    notes = step.apply(student, ctx)
    student.ledger.add(step, notes.record)
    step.ensures(student)
    return notes


def divergence(student: ModelView, teacher: ModelView, batch: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        return float(_losses.divergence(answer_logits(student, batch), answer_logits(teacher, batch)))


@pytest.mark.parametrize(
    "family, train", [(f, "full") for f in zoo.FAMILIES] + [(f, "lora") for f in ("llava", "qwen3-vl", "blip-2-t5")]
)
def test_the_answers_come_nearer_to_the_originals(family: str, train: Any) -> None:
    student, teacher = pair(family)
    batch = zoo.batch(family)
    before = divergence(student, teacher, batch)
    flags = {name: p.requires_grad for name, p in student.model.named_parameters()}
    frozen = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    held = {ref.path: ref.module.weight.clone() for unit in student.parts.get("head", ()) for ref in unit.linears}
    step = replace(QUICK, train=train, lora_rank=4, lr=3e-3 if train == "full" else 1e-2)
    notes = distilled(step, student, context(teacher, [batch]))
    after = divergence(student, teacher, batch)
    assert after < 0.6 * before, f"{before} -> {after}"
    assert notes.numbers["kl_best"] == pytest.approx(after, rel=1e-3) and notes.record == {}
    assert notes.numbers["kl_first"] == pytest.approx(before, rel=1e-3)
    assert {name: p.requires_grad for name, p in student.model.named_parameters()} == flags
    assert all(p.grad is None for p in student.model.parameters())
    assert not any("forward" in vars(m) for m in student.model.modules())
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.model.state_dict().items()), "the teacher moved"
    assert all(torch.equal(student.linear(path).module.weight, w) for path, w in held.items()), "the head moved"


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_same_seed_gives_the_same_bits(train: Any) -> None:
    fit = [zoo.batch("llava", 2, seed) for seed in range(4)]

    def run(step: Logits, seed: int = 0) -> dict[str, Tensor]:
        student, teacher = pair()
        torch.rand(3)  # the global generator plays no part
        distilled(step, student, context(teacher, fit, seed=seed))
        return student.model.state_dict()

    step = replace(QUICK, train=train)
    first, second, other = run(step), run(step), run(replace(step, seed=5))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert not all(torch.equal(v, other[k]) for k, v in first.items())


@pytest.mark.parametrize("loss", ["reverse", "skewed", "skewed_reverse"])
def test_every_loss_brings_the_answers_nearer(loss: Any) -> None:
    student, teacher = pair()
    batch = zoo.batch("llava")
    before = divergence(student, teacher, batch)
    numbers = distilled(replace(QUICK, loss=loss), student, context(teacher, [batch])).numbers
    after = divergence(student, teacher, batch)
    assert after < 0.7 * before and numbers["kl_best"] == pytest.approx(after, rel=1e-3), "judged by forward KL"
    wanted = _losses.divergence(answer_logits(pair()[0], batch), answer_logits(teacher, batch), loss)
    assert numbers["training_loss_first"] == pytest.approx(wanted.item(), rel=1e-4)


def test_where_says_what_trains() -> None:
    def moved(**settings: Any) -> set[str]:
        student, teacher = pair()
        before = {k: v.clone() for k, v in student.model.named_parameters()}
        notes = distilled(replace(QUICK, **settings), student, context(teacher, [zoo.batch("llava")]))
        assert notes.numbers["best_step"] > 0
        return {k for k, v in student.model.named_parameters() if not torch.equal(v, before[k])}

    everything = moved()
    assert any("norm" in name for name in everything) and any("vision_tower" in name for name in everything)
    assert any("multi_modal_projector" in name for name in everything)
    assert not any("embed" in name or "lm_head" in name for name in everything)
    assert all(".mlp." in name and "layers.1." in name for name in moved(where="language.blocks[1].mlp"))
    lora = moved(train="lora", where=("language",), lr=1e-2)
    assert lora and all("language_model" in name and name.endswith("proj.weight") for name in lora)


def changed(student: ModelView, before: dict[str, Tensor]) -> set[str]:
    return {k for k, v in student.model.named_parameters() if not torch.equal(v, before[k])}


WITHOUT_CONNECTOR = ("florence-2", "trocr", "donut")


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_connector_trains_alone(family: str) -> None:
    student, teacher = pair(family)
    batch, step = zoo.batch(family), Logits(steps=3, lr=1e-2, batch_size=2, train="connector")
    if "connector" not in student.parts:
        assert family in WITHOUT_CONNECTOR
        with pytest.raises(Unmet, match="no connector"):
            step.requires(student, context(teacher, [batch]))
        return
    before = {k: v.clone() for k, v in student.model.named_parameters()}
    notes = distilled(step, student, context(teacher, [batch]))
    inside = [f"{unit.path}." for unit in student.parts["connector"]]
    moved = changed(student, before)
    assert moved and all(any(name.startswith(path) for path in inside) for name in moved)
    assert notes.numbers["trained_parameters"] == sum(
        v.numel() for k, v in before.items() if any(k.startswith(path) for path in inside)
    )


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_norms_train_alone(family: str) -> None:
    student, teacher = pair(family)
    before = {k: v.clone() for k, v in student.model.named_parameters()}
    step = replace(QUICK, steps=4, train="norms", where="language", lr=1e-2)
    notes = distilled(step, student, context(teacher, [zoo.batch(family)]))
    moved = changed(student, before)
    inside = [f"{unit.path}." for unit in student.parts["language"]]
    assert notes.numbers["best_step"] > 0 and any("norm" in name for name in moved)
    assert all(before[name].ndim == 1 and any(name.startswith(path) for path in inside) for name in moved)
    norms = {ref.norm for unit in student.parts["language"] for ref in unit.linears} - {None}
    assert {f"{norm}.weight" for norm in norms} <= moved, "every norm that the anatomy knows"


def test_promised_zeros_stay() -> None:
    student, teacher = pair()
    paths = [ref.path for ref in student.linears("language.mlp")]
    for path in paths:
        weight = student.linear(path).module.weight
        weight.data.masked_fill_(weight.abs() < weight.abs().median(), 0)
    gone = {path: student.linear(path).module.weight == 0 for path in paths}
    student.ledger._records.append(Record("prune.wanda", {}, {"promised_zeros": dict.fromkeys(paths, 0.5)}))
    ctx = context(teacher, [zoo.batch("llava")])
    with pytest.raises(Unmet, match="lora would fill the zeros"):
        replace(QUICK, train="lora", where="language").requires(student, ctx)
    with pytest.raises(Unmet, match="muon would fill the zeros"):
        replace(QUICK, optimizer="muon").requires(student, ctx)
    replace(QUICK, train="norms", optimizer="muon").requires(student, ctx)
    assert distilled(replace(QUICK, weight_decay=0.1), student, ctx).numbers["best_step"] > 0
    assert all(torch.equal(student.linear(path).module.weight == 0, zeros) for path, zeros in gone.items())
    assert not any(p._backward_hooks for p in student.model.parameters())


def test_norms_of_quantized_blocks_may_train() -> None:
    student, teacher = pair()
    ctx = context(teacher, [zoo.batch("llava")])
    apply_pass(RTN(bits=4, group=-1, where=("language",), search="none"), student, ctx)
    with pytest.raises(Unmet, match="off their grid"):
        replace(QUICK, train="lora").requires(student, ctx)
    apply_pass(replace(QUICK, train="norms", lr=1e-2), student, ctx)
    assert ask_promises(student, find) == (["quantize.rtn", "distill.logits"], None)


def test_answer_logits_are_those_of_the_whole_forward() -> None:
    for family in ("llava", "qwen3-vl", "florence-2", "trocr"):
        view, batch = view_of(zoo.model(family)), zoo.batch(family, 3)
        with torch.no_grad():
            whole = view.model(**batch).logits
            where = answer_positions(batch["labels"], shifted=not view.family.seq2seq)
            torch.testing.assert_close(answer_logits(view, batch), whole[where], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("relevance", ["none", "prompt"])
def test_a_student_with_fewer_visual_tokens_learns_too(relevance: Any) -> None:
    student, teacher = pair()
    DPP(keep=0.5, relevance=relevance).rebuild(student, {})
    batch = zoo.batch("llava", 3)
    with torch.no_grad():
        where = answer_positions(batch["labels"], shifted=True)
        torch.testing.assert_close(answer_logits(student, batch), student.model(**batch).logits[where])
    before = divergence(student, teacher, batch)
    distilled(QUICK, student, context(teacher, [batch]))
    assert divergence(student, teacher, batch) < 0.6 * before


def test_a_diverging_run_stops_and_keeps_the_best() -> None:
    student, teacher = pair()
    batch = zoo.batch("llava")
    before = divergence(student, teacher, batch)
    notes = distilled(replace(QUICK, steps=60, lr=1e30), student, context(teacher, [batch]))
    assert notes.numbers["diverged_at"] is not None and notes.numbers["steps"] < 60
    assert divergence(student, teacher, batch) <= before
    assert notes.numbers["kl_best"] <= notes.numbers["kl_first"]


def test_useless_training_changes_nothing() -> None:
    """The original as its own student: no step can be better than none."""
    teacher = view_of(zoo.model("llava"))
    student = view_of(copy.deepcopy(teacher.model))
    notes = distilled(replace(QUICK, train="lora"), student, context(teacher, [zoo.batch("llava")]))
    assert notes.numbers["best_step"] == 0
    pairs = zip(student.model.parameters(), teacher.model.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_recovery_data_are_used_and_validated_on_the_fit_split() -> None:
    student, teacher = pair()
    asked: list[int] = []

    def recovery(size: int, start: int) -> Iterator[Mapping[str, Tensor]]:
        for seed in range(start, 3):  # ends; the pass asks again
            asked.append(size)
            yield zoo.batch("llava", size, seed)

    fit = [zoo.batch("llava", 2, seed=9)]
    before = divergence(student, teacher, fit[0])
    notes = distilled(replace(QUICK, data="recovery"), student, context(teacher, fit, recovery))
    assert asked == [2] * 13 and notes.numbers["kl_first"] == pytest.approx(before, rel=1e-4)
    assert notes.numbers["data"] == "recovery"
    assert distilled(replace(QUICK, data="auto"), student, context(teacher, fit)).numbers["data"] == "fit"
    with pytest.raises(Unmet, match="no recovery data"):
        replace(QUICK, data="recovery").requires(student, context(teacher, fit))
    with pytest.raises(WorkFailed, match="no samples"):
        replace(QUICK, data="recovery").apply(student, context(teacher, fit, lambda size, start: iter(())))


def test_other_data_are_named_in_data() -> None:
    student, teacher = pair()
    fit, asked = [zoo.batch("llava", 2, seed=9)], []

    def source(spec: str) -> Any:
        asked.append(spec)
        return lambda size, start: (zoo.batch("llava", size, seed) for seed in range(start, 3))

    step = replace(QUICK, data="more.jsonl")
    ctx = replace(context(teacher, fit, lambda size, start: iter(())), source=source)
    numbers = distilled(step, student, ctx).numbers
    assert numbers["data"] == "more.jsonl" and set(asked) == {"more.jsonl"} and numbers["best_step"] > 0
    with pytest.raises(Unmet, match="cannot read other data"):
        step.requires(student, context(teacher, fit))


def test_gridded_weights_and_tied_heads_are_refused() -> None:
    student, teacher = pair()
    ctx = context(teacher, [zoo.batch("llava")])
    path = student.linears("vision.mlp")[0].path
    student.grids[path] = Grid(4, -1, True, torch.ones(40, 1), None)
    with pytest.raises(Unmet, match="off their grid") as caught:
        QUICK.requires(student, ctx)
    assert caught.value.where == path
    replace(QUICK, where="language").requires(student, ctx)
    gemma = view_of(zoo.model("gemma3"))
    assert gemma.tied_embeddings
    with pytest.raises(Unmet, match="shares its weight"):
        replace(QUICK, train="lora", where="head").requires(gemma, ctx)
    with pytest.raises(Unmet, match="fit samples"):
        replace(QUICK, where="language").requires(student, context(teacher, []))


def test_batches_without_an_answer_are_left_out() -> None:
    student, teacher = pair()
    silent = zoo.batch("llava", 2, seed=1)
    silent["labels"] = torch.full_like(silent["labels"], -100)
    notes = distilled(QUICK, student, context(teacher, [silent, zoo.batch("llava")]))
    assert notes.numbers["answer_tokens_seen"] == 12 * 6
    with pytest.raises(Unmet, match="no answer token"):
        QUICK.apply(student, context(teacher, [silent]))


def test_the_teacher_answers_a_batch_that_comes_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, view = pair()
    batch, fresh = zoo.batch("llava"), zoo.batch("llava", 2, 1)
    calls: list[int] = []
    handle = view.model.register_forward_pre_hook(lambda *_: calls.append(1))
    teacher = Teacher(view, [batch])
    assert teacher(batch) is teacher(batch) and len(calls) == 1
    assert torch.equal(teacher(fresh).logits, teacher(fresh).logits) and len(calls) == 3
    handle.remove()


def test_weights_that_are_not_finite_break_the_promise() -> None:
    student, teacher = pair()
    with torch.no_grad():
        student.linears("language")[0].module.weight[0, 0] = float("nan")
    with pytest.raises(PromiseBroken, match="finite"):
        QUICK.ensures(student)
    with pytest.raises(WorkFailed, match="not finite"):
        QUICK.apply(student, context(teacher, [zoo.batch("llava")]))


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"lr": 0.0}, {"temperature": -1.0}, {"warmup": 2.0}, {"lora_rank": 0}, {"skew": 0.0}]
)
def test_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Logits(**settings)


def test_a_connector_needs_no_where_and_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="leave 'where' out"):
        Logits(train="connector", where="language")
    student, teacher = pair()
    student.model.lm_head.out_features = 90
    with pytest.raises(Unmet, match="different vocabularies"):
        QUICK.requires(student, context(teacher, [zoo.batch("llava")]))


def test_the_rehearsal_is_brief() -> None:
    assert Logits(steps=500).brief() == Logits(steps=2) and Logits(steps=1).brief() == Logits(steps=1)
