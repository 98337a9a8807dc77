"""tokens.resolution: every family by its own stock processor; what later passes, judge and teacher are shown."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

import svlm
from svlm import passes
from svlm.calib.ask import ask
from svlm.calib.encode import Encoder
from svlm.calib.sample import ImageSource, Sample
from svlm.calib.shown import Shown, as_original
from svlm.compress import storage
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Context
from svlm.compress.errors import PromiseBroken, Unmet
from svlm.compress.pipeline import apply_pass, ask_promises
from svlm.passes.api import Options, compress_model
from svlm.passes.distill._feed import split
from svlm.passes.tokens import _pictures
from svlm.passes.tokens._positions import resized
from svlm.passes.tokens.dpp import DPP
from svlm.passes.tokens.resolution import Resolution
from tests import shows, speakers, zoo
from tests.oracles import positions

from .helpers import ELSEWHERE, IN_SEQUENCE, logits

VIDEOS = ("llava-onevision", "smolvlm", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl")  # processors need torchvision
SAMPLES = ((24, 24, "what is this ?"), (24, 40, "where is the red bear ?"), (40, 20, "two cat"))


def sample(number: int, height: int, width: int, question: str, images: int = 1) -> Sample:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = ImageSource(picture=Image.fromarray(pixels))
    return Sample(str(number), str(number), (picture,) * images, question, ("left",))


def samples() -> list[Sample]:
    return [sample(i, *row) for i, row in enumerate(SAMPLES)]


def _torchvision() -> bool:
    try:
        import torchvision  # noqa: F401
    except Exception:  # it fails in several ways where it does not fit torch
        return False
    return True


def shown(family: str) -> tuple[ModelView, dict[str, torch.Tensor]]:
    """The family's tiny model with its own processor, and what that makes of `samples`."""
    if family in VIDEOS and not _torchvision():
        pytest.skip("its processor needs torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        view = view_of(zoo.model(family), shows.processor(family))
    view.storage_dtype = torch.bfloat16
    storage.round_to_storage(view)
    return view, Encoder(view.processor).encode(samples())


def context(*batches: Any) -> Context:
    def none(*_: Any, **__: Any) -> None:
        raise AssertionError("no walk and no teacher needed")

    return Context(batches, none, none)


def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    settings = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [0, zoo.IMAGE, zoo.VIDEO]}
    return model.generate(**inputs, max_new_tokens=4, **settings, **options)[:, -4:]


# ---------------------------------------------------------------------------------------------------------- the maths


@pytest.mark.parametrize(("before", "after", "extra"), [(4, 2, 1), (5, 3, 0), (6, 5, 1), (3, 1, 0)])
def test_positions_are_interpolated_as_the_oracle_does(before: int, after: int, extra: int) -> None:
    table = torch.randn(extra + before**2, 7, generator=torch.Generator().manual_seed(before))
    made = resized(table, before, after)
    assert torch.equal(made[:extra], table[:extra]) and made.shape == (extra + after**2, 7)
    wanted = positions.bicubic(table[extra:].reshape(before, before, 7), after)
    torch.testing.assert_close(made[extra:].reshape(after, after, 7), wanted, rtol=1e-5, atol=1e-5)
    stacked = resized(table[None], before, after, axis=1)
    assert torch.equal(stacked[0], made)


def test_half_precision_is_interpolated_in_float32() -> None:
    table = torch.randn(17, 3).bfloat16()
    assert torch.equal(resized(table, 4, 2), resized(table.float(), 4, 2).bfloat16())


def test_the_tower_sees_what_stock_interpolation_on_the_fly_gives() -> None:
    view, _ = shown("llava")
    small = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = view.tower(small, interpolate_pos_encoding=True).last_hidden_state
        _pictures.shrink(view, _pictures.find_change(view, _pictures.find_sides(view, 0.25)))
        found = view.tower(small).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", IN_SEQUENCE)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Fewer tokens; a batch is its rows; cache or not; saved, and loaded by svlm and by stock transformers alike."""
    view, batch = shown(family)
    before = view.visual_tokens(batch)
    notes = apply_pass(Resolution(keep=0.25), view, context(batch)).numbers
    encoder = Encoder(view.processor)
    small = encoder.encode(samples())
    assert all(now <= 0.45 * was for now, was in zip(view.visual_tokens(small), before, strict=True))
    assert notes["tokens"] / notes["tokens_before"] == notes["share_of_tokens"] < 0.3
    wanted = logits(view.model, small)
    asked = encoder.prompts(samples())
    answers = generated(view.model, asked)
    assert torch.equal(answers, generated(view.model, asked, use_cache=False))
    for i, one in enumerate(samples()):
        assert torch.equal(generated(view.model, encoder.prompts([one])), answers[i : i + 1])
    twice = encoder.prompts([sample(0, 24, 24, "what is this ?", 2)])
    (both,), (one_picture,) = view.visual_tokens(twice), view.visual_tokens(encoder.prompts(samples()[:1]))
    assert both == (2 * 5 if family == "llava-onevision" else 2 * one_picture)  # OneVision tiles a single picture only
    assert torch.isfinite(logits(view.model, twice)).all()

    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    assert again.sight == view.sight and len(again.sight) == 1
    torch.testing.assert_close(logits(again.model, Encoder(again.processor).encode(samples())), wanted)
    assert ask_promises(again, passes.find) == (["tokens.resolution"], None)
    stock = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    theirs = Encoder(tf.AutoProcessor.from_pretrained(tmp_path / "saved"))
    torch.testing.assert_close(logits(stock, theirs.encode(samples())), wanted)
    assert torch.equal(generated(stock, theirs.prompts(samples())), answers)


@pytest.mark.parametrize("family", IN_SEQUENCE)
def test_all_of_the_tokens_is_the_original_bit_for_bit(family: str) -> None:
    view, batch = shown(family)
    wanted, weights = logits(view.model, batch), {k: v.clone() for k, v in view.model.state_dict().items()}
    notes = apply_pass(Resolution(keep=1.0), view, context(batch))
    assert notes.numbers == {"share_of_tokens": 1.0, "remarks": []} and view.sight == ()
    assert all(torch.equal(v, weights[k]) for k, v in view.model.state_dict().items())
    assert torch.equal(logits(view.model, Encoder(view.processor).encode(samples())), wanted)


def test_a_choice_among_the_tokens_that_are_left() -> None:
    view, batch = shown("llava")
    apply_pass(Resolution(keep=0.5), view, context(batch))
    small = Encoder(view.processor).encode(samples())
    assert view.visual_tokens(small) == [9, 9, 9]  # 3 x 3 is nearer to 8 than 2 x 2
    apply_pass(DPP(keep=0.5), view, context(small))
    assert view.visual_tokens(small) == [5, 5, 5]
    asked = Encoder(view.processor).prompts(samples())
    assert torch.equal(generated(view.model, asked), generated(view.model, asked, use_cache=False))


def test_the_nearest_size_that_there_is() -> None:
    view, batch = shown("internvl" if _torchvision() else "gemma3")
    for keep, tokens in ((0.1, 1), (0.25, 1), (0.6, 1), (0.7, 4), (0.9, 4)):
        assert _pictures.find_sides(view, keep).tokens == (4, tokens)
    step = Resolution(keep=0.75)
    notes = apply_pass(step, view, context(batch))
    assert view.sight == () and "nothing was changed" in notes.numbers["remarks"][0]
    step.ensures(view)


@pytest.mark.parametrize("family", ELSEWHERE)
def test_refused_by_name(family: str) -> None:
    view = view_of(zoo.model(family), shows.processor("llava"))
    with pytest.raises(Unmet, match=view.family.name):
        Resolution().requires(view, context(zoo.batch(family)))


def test_refused_for_a_reason() -> None:
    view, batch = shown("llava")
    before = {k: v.clone() for k, v in view.model.state_dict().items()}
    with pytest.raises(Unmet, match="pictures become 20 pixels wide"):
        Resolution().requires(view, context({**batch, "pixel_values": torch.zeros(1, 3, 20, 20)}))
    with pytest.raises(Unmet, match="needs the processor"):
        Resolution().requires(view_of(view.model), context(batch))
    view.model.config.vision_config.patch_size = [4, 2]
    with pytest.raises(Unmet, match="no square picture"):
        Resolution().requires(view, context(batch))
    view.model.config.vision_config.patch_size = 4
    assert all(torch.equal(v, before[k]) for k, v in view.model.state_dict().items())


def test_promise() -> None:
    view, batch = shown("llava")
    step = Resolution(keep=0.25)
    apply_pass(step, view, context(batch))
    view.model.config.vision_config.image_size = 16
    with pytest.raises(PromiseBroken, match="side 16 > 8"):
        step.ensures(view)


# ---------------------------------------------------------------------------- what judge, teacher and trainer are shown

RECIPE = """
calibration: {fit: 6, check: 6}
gate: {metric: kl, max: 100, on_fail: keep}
passes:
  - tokens.resolution: {keep: 0.25}
  - distill.logits: {steps: 2, batch_size: 4, data: fit}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ (pictures of 16 x 16, four tokens), q.jsonl with 12 questions (two of them not answered), r.yaml."""
    place = tmp_path_factory.mktemp("pictures")
    speakers.save(place / "model", speakers.byte_level())
    rng = random.Random(0)
    rows = []
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
        row = {"image": f"{i}.png", "question": speakers.text(rng, "latin")}
        rows.append(row | ({"answer": rng.choice(speakers.ROOTS["latin"])} if i % 6 else {}))
    (place / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "r.yaml").write_text(RECIPE)
    return place


@pytest.fixture(scope="module")
def bench(folder: Path) -> svlm.Workbench:
    data = svlm.CalibrationSet.load(str(folder / "q.jsonl"), fit=6, check=6)
    return svlm.Workbench(svlm.load_view(folder / "model"), data, batch_size=4, latency=False)


@pytest.fixture
def small(folder: Path, bench: svlm.Workbench) -> ModelView:
    view = svlm.load_view(folder / "model")
    apply_pass(Resolution(keep=0.25), view, bench.context(view))
    return view


def test_batches_are_shown_to_both(bench: svlm.Workbench, small: ModelView) -> None:
    speech = bench.speaking(small)
    assert speech is bench.speaking(small) is not bench.speaking(bench.original)
    assert speech.teacher is bench.original
    for old, new in zip(bench.fit, speech.fit, strict=True):
        assert isinstance(new, Shown) and as_original(new).keys() == old.keys()
        assert all(torch.equal(as_original(new)[k], old[k]) for k in old)
        assert new["pixel_values"].shape[-1] == 8 and new["input_ids"].shape[1] == old["input_ids"].shape[1] - 3
        rows = [
            row[row != -100].tolist() == other[other != -100].tolist()
            for row, other in zip(new["labels"], old["labels"])
        ]
        assert all(rows), "both learn the same answers"
    pieces = split(speech.fit[0], 3)
    assert [len(p["labels"]) for p in pieces] == [3, 1] == [len(as_original(p)["labels"]) for p in pieces]
    recovery = bench.speaking(small).encoded(lambda: iter(bench.data.fit))(2, 1)
    assert torch.equal(
        as_original(next(recovery))["labels"], bench.speaking(bench.original).encode(bench.data.fit[2:4])["labels"]
    )


def test_the_judge_compares_with_the_original_at_its_own_size(bench: svlm.Workbench, small: ModelView) -> None:
    judge = bench.speaking(small).judge
    assert judge.reference() is bench.judge.reference()
    quality, items = bench.measure(small)
    assert quality["kl"] > 0 and [row["reference_answer"] for row in items] == bench.judge.reference().answers
    answers = [ask(small, s.images[0].path, s.question, max_new_tokens=judge._new_tokens) for s in judge.samples]
    assert answers == [row["answer"] for row in items], "`svlm ask` shows it what the judge does"
    now, before = (bench.cost(view, None) for view in (small, bench.original))
    assert (now["visual_tokens"], before["visual_tokens"]) == (1, 4)
    assert now["flops"]["vision"] < 0.6 * before["flops"]["vision"] and now["kv_bytes"] < before["kv_bytes"]


@pytest.mark.parametrize("name", ["distill.logits", "distill.features"])
def test_the_student_learns_from_large_pictures(name: str, bench: svlm.Workbench, small: ModelView) -> None:
    settings: dict[str, Any] = {"steps": 10, "lr": 1e-3, "batch_size": 3, "data": "fit", "vision": "matched"}
    step = passes.find(name).from_settings(settings)
    ctx = bench.context(small)
    with torch.no_grad():
        theirs = bench.original.model(**as_original(ctx.fit[0])).logits.clone()
    notes = apply_pass(step, small, ctx)
    assert notes.numbers["training_loss_last"] < 0.6 * notes.numbers["training_loss_first"]
    with torch.no_grad():
        again = bench.original.model(**as_original(ctx.fit[0])).logits
    assert torch.equal(theirs, again) and bench.original.model.config.vision_config.image_size == 16


def test_what_compares_tokens_one_by_one_refuses(bench: svlm.Workbench, small: ModelView) -> None:
    for name, settings in (("distill.blocks", {}), ("distill.features", {"features": ["vision"]})):
        with pytest.raises(Unmet, match="the original is shown other pictures"):
            passes.find(name).from_settings(settings).requires(small, bench.context(small))


def test_smaller_pictures_and_ids_of_its_own(folder: Path, bench: svlm.Workbench, small: ModelView) -> None:
    """The teacher speaks the new ids and is shown the large pictures; its answers are the whole original's."""
    whole = bench.speaking(small).fit[0]
    apply_pass(passes.find("prune.vocabulary").from_settings({}), small, bench.context(small))
    speech = bench.speaking(small)
    batch, kept = speech.fit[0], torch.tensor(small.vocabulary)
    assert batch["pixel_values"].shape[-1] == 8 and as_original(batch)["pixel_values"].shape[-1] == 16
    assert torch.equal(kept[as_original(batch)["input_ids"]], as_original(whole)["input_ids"])
    assert torch.equal(kept[batch["input_ids"]], whole["input_ids"])
    with torch.no_grad():
        narrow = speech.teacher.model(**as_original(batch)).logits
        wide = bench.original.model(**as_original(whole)).logits
    torch.testing.assert_close(narrow, wide[..., kept])
    assert torch.isfinite(torch.tensor(bench.measure(small)[0]["kl"]))
    assert speech.judge.reference().answers == bench.judge.reference().answers


@pytest.mark.slow
def test_through_the_pipeline(folder: Path, tmp_path: Path) -> None:
    """With a rehearsal, to disk, and judged from there."""
    out = tmp_path / "out"
    options = Options(latency=False, batch_size=4)
    report = compress_model(folder / "model", folder / "r.yaml", folder / "q.jsonl", out, options)
    stages = report["stages"]
    assert [stage["verdict"] for stage in stages] == ["baseline", "passed", "passed"]
    assert [stage["cost"]["visual_tokens"] for stage in stages] == [4, 1, 1]
    assert stages[-1]["promises"] == [stage["pass"] for stage in stages[1:]] and report["reload"]["checked"]
    found = svlm.verify(out, folder / "model", str(folder / "q.jsonl"))
    assert found["quality"]["kl"] == pytest.approx(stages[-1]["quality"]["kl"], rel=1e-3)
