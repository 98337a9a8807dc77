"""A distillation killed at any instant goes on with what it kept, to the very same bits; OUT never holds its state."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svlm.calib.dataset import CalibrationSet
from svlm.calib.sample import Sample
from svlm.calib.workbench import Workbench
from svlm.compress import disk, storage
from svlm.compress.anatomy import ModelView
from svlm.compress.base import Context, Json, Silent
from svlm.compress.errors import WorkFailed
from svlm.compress.recipe import Recipe
from svlm.passes import api, find
from svlm.passes.distill import _checkpoint
from svlm.passes.distill._feed import Feed, epochs
from svlm.passes.distill.features import Features
from svlm.passes.distill.logits import Logits
from tests import zoo
from tests.passes.distill.test_logits import context, pair

STEPS = 10
FIT = [zoo.batch("llava", 2, seed) for seed in range(4)]


class Killed(Exception):
    pass


class Killer(Silent):
    """Progress that ends the process, as it were, after so many of its steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def step(self, n: int = 1, note: str = "") -> None:
        self.left -= n if note else 0
        if note and self.left <= 0:
            raise Killed


def recovery(size: int, start: int) -> Iterator[Mapping[str, Tensor]]:
    for seed in range(start, 5):  # shorter than the training: it begins again
        batch = zoo.batch("llava", size, seed)
        if seed == 2:
            batch["labels"] = torch.full_like(batch["labels"], -100)  # passed over, and counted all the same
        yield batch


def student(step: Logits) -> tuple[ModelView, Context]:
    view, teacher = pair()
    return view, context(teacher, FIT, recovery if step.data == "recovery" else None)


def state(view: ModelView) -> dict[str, Tensor]:
    return dict(view.model.state_dict())


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint every third step."""
    asked: list[int] = []

    def due(self: Any) -> bool:
        asked.append(1)
        return len(asked) % 3 == 0

    monkeypatch.setattr(_checkpoint.Checkpoint, "due", due)


@pytest.mark.parametrize(
    "kind, train, data, optimizer",
    [
        (Logits, "lora", "fit", "adamw"),
        (Features, "full", "recovery", "adamw"),
        (Logits, "full", "fit", "muon"),
    ],
)
def test_killed_at_random_steps_and_resumed(kind: Any, train: Any, data: Any, optimizer: Any, tmp_path: Path) -> None:
    step = kind(steps=STEPS, lr=3e-3 if train == "full" else 1e-2, batch_size=2, train=train, data=data, lora_rank=4)
    step = replace(step, optimizer=optimizer, average=0.8 if optimizer == "muon" else 0.0)
    calm, ctx = student(step)
    wanted = step.apply(calm, ctx).numbers
    assert wanted["best_step"] > 0
    draw = random.Random(7)
    found: dict[str, Json] = {}
    resumed = 0
    for _ in range(40):
        view, ctx = student(step)
        resumed += (tmp_path / "training.safetensors").is_file()
        try:
            ctx = replace(ctx, scratch=tmp_path, progress=Killer(draw.randint(3, 6)))
            found = step.apply(view, ctx).numbers
            break
        except Killed:
            torch.manual_seed(draw.randint(0, 99))  # nothing hangs on the global generator
    assert resumed >= 2 and found == wanted
    ends = state(view)
    assert all(torch.equal(value, ends[name]) for name, value in state(calm).items())


def test_the_best_weights_survive_a_kill(tmp_path: Path) -> None:
    """A run that only gets worse after the kill ends with the best from before it."""
    step = Logits(steps=20, lr=2.0, warmup=1.0, batch_size=2)
    calm, ctx = student(step)
    wanted = step.apply(calm, ctx).numbers
    assert 0 < wanted["best_step"] < wanted["steps"] and wanted["kl_last"] > wanted["kl_best"]
    with pytest.raises(Killed):
        step.apply(student(step)[0], replace(ctx, scratch=tmp_path, progress=Killer(wanted["best_step"] + 4)))
    view, ctx = student(step)
    assert step.apply(view, replace(ctx, scratch=tmp_path)).numbers == wanted
    assert all(torch.equal(value, state(view)[name]) for name, value in state(calm).items())


def test_a_half_written_checkpoint_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Logits(steps=STEPS, lr=3e-3, batch_size=2)
    calm, ctx = student(step)
    step.apply(calm, ctx)
    whole = disk.os.replace
    written: list[Any] = []

    def dies(source: Any, target: Any) -> None:
        written.append(target)
        if len(written) == 3:
            raise Killed
        whole(source, target)

    with monkeypatch.context() as m:
        m.setattr(disk.os, "replace", dies)
        with pytest.raises(Killed):
            step.apply(student(step)[0], replace(ctx, scratch=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["training.safetensors"]
    view, ctx = student(step)
    step.apply(view, replace(ctx, scratch=tmp_path, progress=Killer(99)))
    assert all(torch.equal(value, state(view)[name]) for name, value in state(calm).items())


def test_what_another_training_kept_is_not_used(tmp_path: Path) -> None:
    step = Logits(steps=STEPS, lr=3e-3, batch_size=2)
    with pytest.raises(Killed):
        view, ctx = student(step)
        step.apply(view, replace(ctx, scratch=tmp_path, progress=Killer(6)))
    for other, fit in ((replace(step, lr=2e-3), FIT), (step, FIT[:3])):
        calm, ctx = student(other)
        other.apply(calm, replace(ctx, fit=fit))
        view, ctx = student(other)
        other.apply(view, replace(ctx, fit=fit, scratch=tmp_path))
        assert all(torch.equal(value, state(view)[name]) for name, value in state(calm).items())


def test_a_feed_goes_on_where_it_was() -> None:
    items = list(range(7))
    for begin in (lambda start: epochs(items, 3, start), lambda start: iter(items[start:])):
        one: Feed[int] = Feed(begin, lambda item: item != 4)
        seen = [(next(one), one.position) for _ in range(30)]
        assert {item for item, _ in seen} == {0, 1, 2, 3, 5, 6}
        for i, (_, position) in enumerate(seen):
            again: Feed[int] = Feed(begin, lambda item: item != 4)
            again.seek(position)
            assert [next(again) for _ in range(8)] == [item for item, _ in (seen + seen)[i + 1 : i + 9]] or i > 21
    with pytest.raises(WorkFailed, match="no samples"):
        next(Feed(lambda start: iter(items), lambda item: False))


def test_recovery_starts_at_any_batch(tmp_path: Path) -> None:
    data = CalibrationSet.load("demo", fit=4, check=4, seed=0)
    rows = []
    for i, sample in enumerate(islice(CalibrationSet.load("demo", fit=12, check=4, seed=5).fit, 12)):
        sample.images[0].open().save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "question": sample.question}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    view = storage.load_model("demo", find=find)
    bench = Workbench(view, data, latency=False)
    ctx = bench.context(view)
    assert ctx.recovery is not None and ctx.source is not None
    for batches in (ctx.recovery, ctx.source(str(tmp_path / "rows.jsonl"))):
        whole = list(islice(batches(3, 0), 4))
        assert len(whole) == 4 and all(bool((batch["labels"] != -100).any(1).all()) for batch in whole)
        for start in (1, 3):
            for late, batch in zip(batches(3, start), whole[start:]):
                assert all(torch.equal(late[key], value) for key, value in batch.items())
    own = bench.judge.answered([Sample("x", "x", data.fit[0].images, data.fit[0].question)])
    assert own[0].answers, "where the data has no answers, the original's own are learnt"


@pytest.mark.slow
def test_a_killed_run_resumes_and_out_holds_no_optimizer_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = CalibrationSet.load("demo", fit=8, check=8, seed=0)
    step = {"distill.logits": {"steps": 6, "batch_size": 4, "where": "language.blocks[-1].mlp", "data": "fit"}}
    plan = Recipe.from_json({"passes": [step], "calibration": {"fit": 8, "check": 8}, "gate": None}, find)

    def run(out: Path, resume: bool = False) -> None:
        options = api.Options(batch_size=8, latency=False, rehearse=False, resume=resume, keep_stages=True)
        api.compress_model("demo", plan, data, out, options)

    monkeypatch.setattr(api, "prove_reload", lambda *_: {})  # a process of its own, which has tests of its own
    run(tmp_path / "calm")
    out = tmp_path / "out"
    whole, steps = torch.optim.AdamW.step, []

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 5:
            raise Killed
        return whole(self, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(torch.optim.AdamW, "step", dies)
        with pytest.raises(Killed):
            run(out)
    assert len(list(out.rglob("training.safetensors"))) == 1
    run(out, resume=True)
    for folder in (out, tmp_path / "calm"):
        assert (folder / "model.safetensors").is_file()
        assert not list(folder.rglob("training*")) and not list((folder / ".svlm").glob("scratch/*"))
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "calm" / "model.safetensors").read_bytes()
