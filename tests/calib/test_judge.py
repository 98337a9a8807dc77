"""The judge on the demo model: figures against loops over single questions, and what is asked only once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from svlm.calib import asking
from svlm.calib import judge as judging
from svlm.calib.dataset import ImageSource, Sample
from svlm.calib.encode import Encoder
from svlm.calib.judge import Judge, Measurement
from svlm.calib.metrics.paired import evidence, sign_flip
from svlm.calib.metrics.pairs import detectable, mcnemar
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.errors import RecipeError, WorkFailed
from svlm.compress.evidence import interval
from svlm.compress.gate import Gate
from svlm.compress.report.rows import quality_row, tag_rows
from svlm.compress.storage import load_model
from tests import zoo
from tests.judged import BATCH, forwards
from tests.oracles import metrics as oracle

# ------------------------------------------------------------------------------------------------------------- figures


def test_an_identical_model_loses_nothing(judge: Judge, samples: list[Sample]) -> None:
    quality = judge.measure(load_model("demo")).quality
    match = quality["exact_match"]
    assert quality["kl"] == quality["kl_p99"] == 0.0 and quality["agreement"] == 1.0
    low, high = match["ci95"]
    assert match["delta"] == 0.0 and -0.2 < low < 0 < high < 0.2 and match["mcnemar_p"] == match["p_images"] == 1.0
    assert match["right_to_wrong"] == match["wrong_to_right"] == quality["flips"] == 0
    assert match["value"] == match["reference"] > 0.8, "the demo model can do something"
    assert quality["n"] == 40 and quality["n_images"] == len({s.image_id for s in samples})


def test_divergences_equal_loops_over_single_questions(
    measured: Measurement, original: ModelView, worse: ModelView, samples: list[Sample]
) -> None:
    encoder = Encoder(original.processor)
    kl, same, chosen = [], [], []
    for sample in samples:
        batch = encoder.encode([sample])
        pairs = zip(oracle.answer_rows(original.model, batch, True), oracle.answer_rows(worse.model, batch, True))
        for (teacher, label), (student, _) in pairs:
            kl.append(oracle.kl(teacher, student))
            same.append(oracle.best(teacher) == oracle.best(student))
            chosen.append(oracle.log_softmax(student)[label])
    quality = measured.quality
    assert quality["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3) and quality["kl"] > 0.01
    assert max(kl) >= quality["kl_p99"] * 0.999 > quality["kl"]
    assert quality["agreement"] == pytest.approx(sum(same) / len(same)) and quality["agreement"] < 1
    assert quality["perplexity"] == pytest.approx(2.718281828 ** (-sum(chosen) / len(chosen)), rel=1e-4)


def test_answers_are_those_of_generate_alone(
    measured: Measurement, original: ModelView, worse: ModelView, samples: list[Sample]
) -> None:
    encoder = Encoder(original.processor)
    for sample, item in list(zip(samples, measured.items))[::5]:
        inputs = encoder.prompts([sample])
        for view, key in ((worse, "answer"), (original, "reference_answer")):
            made = view.model.generate(**inputs, do_sample=False, max_new_tokens=12)
            assert item[key] == encoder.decode(made[:, inputs["input_ids"].shape[1] :])[0]
        assert item["id"] == sample.id and item["image_id"] == sample.image_id


def test_figures_follow_from_the_items(measured: Measurement, samples: list[Sample]) -> None:
    quality, items = measured.quality, measured.items
    match = quality["exact_match"]
    lost = sum(i["reference_correct"] and not i["correct"] for i in items)
    won = sum(i["correct"] and not i["reference_correct"] for i in items)
    assert (match["right_to_wrong"], match["wrong_to_right"]) == (lost, won) and lost > 0
    assert quality["flips"] == (lost + won) / 40
    assert match["value"] == sum(i["correct"] for i in items) / 40
    assert match["delta"] == pytest.approx((won - lost) / 40) == pytest.approx(match["value"] - match["reference"])
    pairs = ([i["reference_correct"] for i in items], [i["correct"] for i in items], [i["image_id"] for i in items])
    proof = quality["evidence"]["exact_match"]
    assert proof == evidence(*pairs) and (proof["lost"], proof["gained"]) == (lost / 40, won / 40)
    assert match["ci95"] == list(interval(proof)) and match["ci95"][0] <= match["delta"] <= match["ci95"][1]
    assert match["mcnemar_p"] == mcnemar(lost, won) and match["p_images"] == sign_flip(*pairs)
    assert quality["detectable"] == detectable(lost + won, 40, proof["design_effect"])
    agreement, divergence = quality["evidence"]["agreement"], quality["evidence"]["kl"]
    assert agreement["lost"] == pytest.approx(1 - quality["agreement"]) and agreement["gained"] == 0
    assert agreement["n"] > agreement["questions"] == 40 and agreement["images"] == quality["n_images"]
    assert divergence["value"] == pytest.approx(quality["kl"]) and divergence["error"] > 0 and divergence["skew"] > 0
    kinds = quality["by_tag"]["kind"]
    assert sum(k["n"] for k in kinds.values()) == 40
    assert sum(k["n"] * k["delta"] for k in kinds.values()) == pytest.approx(won - lost)
    for name, numbers in kinds.items():
        mine = [i["correct"] for i, s in zip(items, samples) if s.tags["kind"] == name]
        assert numbers["value"] == sum(mine) / len(mine) and numbers["n"] == len(mine)
        assert numbers["ci95"][0] <= numbers["delta"] <= numbers["ci95"][1] and numbers["p"] <= numbers["p_holm"] <= 1


def test_the_report_and_the_gate_can_read_it(measured: Measurement) -> None:
    quality = json.loads(json.dumps(measured.quality, allow_nan=False))
    assert quality == measured.quality and json.loads(json.dumps(measured.items)) == measured.items
    assert not Gate("kl", max=0.0).judge(quality)[0] and Gate("exact_match", max_drop=1.0).judge(quality)[0]
    assert [key for key, value in quality_row(quality).items() if value is None] == ["score"], "it is exact match"
    stage = {"index": 0, "pass": None, "verdict": "baseline", "quality": quality}
    assert {row["tag"] for row in tag_rows({"stages": [stage]})} == set(quality["by_tag"])


def test_measuring_twice_gives_the_same(judge: Judge, worse: ModelView, measured: Measurement) -> None:
    again = judge.measure(worse)
    assert again.quality == measured.quality and again.items == measured.items


def test_a_larger_model_is_scored_in_parts_with_a_shortened_reference(
    original: ModelView,
    worse: ModelView,
    samples: list[Sample],
    measured: Measurement,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(judging, "FULL_BYTES", 20_000)  # passed after the first few questions
    monkeypatch.setattr(judging, "TOP", 8)
    monkeypatch.setattr(asking, "LOGIT_BYTES", 300_000)  # a few questions a forward
    short = Judge(samples, Encoder(original.processor), original, tmp_path, batch_size=BATCH)
    rows: list[tuple[int, int]] = []

    def note_size(_: object, __: object, given: dict[str, torch.Tensor]) -> None:
        if "labels" in given:
            rows.append((len(given["input_ids"]), int((given["labels"] != -100).sum())))

    note = worse.model.register_forward_pre_hook(note_size, with_kwargs=True)
    quality, full = short.measure(worse).quality, measured.quality
    note.remove()
    sizes, tokens = zip(*rows)
    counts = short.reference().counts
    asked = [*short._order, *short.blank.places, *2 * short._order[-asking.TRIED :]]  # some packed and not, as a trial
    assert len(short._order) == 40 and len(short.blank.places) == 16 and max(sizes) < BATCH / 2
    assert sum(tokens) == int(counts[asked].sum())
    values = short.reference().values
    assert values.shape[1] == 8 and values.numel() * 4 < 20_000
    assert 0.5 * full["kl"] < quality["kl"] <= full["kl"] * 1.001
    assert quality["agreement"] == full["agreement"] and quality["exact_match"] == full["exact_match"]
    assert quality["perplexity"] == pytest.approx(full["perplexity"], rel=1e-4)
    second = Judge(samples, Encoder(original.processor), original, tmp_path, batch_size=BATCH)
    assert second.measure(worse).quality == quality


def test_an_alternative_answer_may_be_long(original: ModelView, samples: list[Sample]) -> None:
    long = " ".join(["bear"] * 20)
    some = [dataclasses.replace(samples[0], answers=("bear", long)), *samples[1:3]]
    assert Judge(some, Encoder(original.processor), original)._new_tokens >= 21
    assert Judge(samples, Encoder(original.processor), original)._new_tokens < 16


# ------------------------------------------------------------------------------------------- besides right and wrong


def test_a_confidence_is_the_probability_of_the_answer_given(
    measured: Measurement, original: ModelView, worse: ModelView, samples: list[Sample]
) -> None:
    """Against transformers' `compute_transition_scores`, and against a forward over the finished answer."""
    encoder = Encoder(original.processor)
    for sample, item in list(zip(samples, measured.items))[::7]:
        inputs = encoder.prompts([sample])
        for view, key in ((worse, "confidence"), (original, "reference_confidence")):
            options: dict[str, Any] = {"output_scores": True, "return_dict_in_generate": True}
            made = view.model.generate(**inputs, **options, do_sample=False, max_new_tokens=12)
            steps = view.model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
            assert item[key] == pytest.approx(float(steps.sum().exp()), rel=1e-3)
            said = dataclasses.replace(
                sample, answers=(encoder.decode(made.sequences[:, inputs["input_ids"].shape[1] :])[0],)
            )
            rows = oracle.answer_rows(view.model, encoder.encode([said]), True)
            forced = sum(oracle.log_softmax(logits)[token] for logits, token in rows)
            assert item[key] == pytest.approx(2.718281828**forced, rel=1e-3)
    assert 0 < min(i["confidence"] for i in measured.items) < 0.9 < max(i["confidence"] for i in measured.items) <= 1


def test_confidence_costs_no_forward(judge: Judge, worse: ModelView, samples: list[Sample]) -> None:
    encoder = judge.encoder
    with forwards(worse) as with_confidence:
        asking.answers(worse, encoder, samples[:8], 12, 8)
    with forwards(worse) as alone:
        worse.model.generate(**encoder.prompts(samples[:8]), do_sample=False, max_new_tokens=12)
    assert len(with_confidence) == len(alone) > 1


def test_blank_pictures_equal_loops_over_grey_ones(
    judge: Judge, measured: Measurement, original: ModelView, worse: ModelView, samples: list[Sample]
) -> None:
    blank, encoder = measured.quality["blank"], judge.encoder
    assert blank["n"] == 16 == len(set(judge.blank.places)) and max(judge.blank.places) > 30, "from the whole split"
    logs: dict[str, list[float]] = {key: [] for key in blank if key != "n"}
    for i in judge.blank.places:
        size = samples[i].images[0].open().size
        grey = ImageSource(picture=Image.new("RGB", size, (128, 128, 128)))
        shown = {"": dataclasses.replace(samples[i], images=(grey,)), "seeing_": samples[i]}
        for who, view in (("", worse), ("reference_", original)):
            for what, sample in shown.items():
                rows = oracle.answer_rows(view.model, encoder.encode([sample]), True)
                logs[f"{who}{what}perplexity"] += [oracle.log_softmax(logits)[token] for logits, token in rows]
    for key, found in logs.items():
        assert blank[key] == pytest.approx(2.718281828 ** (-sum(found) / len(found)), rel=1e-3), key
    assert blank["reference_perplexity"] > 2 * blank["reference_seeing_perplexity"], "the demo model looks"


def test_yes_and_no_and_figures_by_answer(measured: Measurement, samples: list[Sample]) -> None:
    found, pairs = measured.quality["yes_no"], list(zip(samples, measured.items))
    asked = [(s.answers[0] == "yes", item["answer"]) for s, item in pairs if s.answers[0] in ("yes", "no")]
    assert found["n"] == len(asked) == found["reference"]["n"] > 5
    assert found["yes_rate"] == sum(said == "yes" for _, said in asked) / len(asked)
    assert found["accuracy"] == sum(due == (said == "yes") for due, said in asked) / len(asked)
    assert measured.quality["by_answer"] == {}, "no answer is right for 8 of the 40 questions"
    long = [dataclasses.replace(s, answers=("long" if len(s.question or "") > 25 else s.answers[0],)) for s in samples]
    places = judging.by_answer(long)
    assert list(places) == ["long"] and places["long"] == [i for i, s in enumerate(long) if s.answers == ("long",)]
    twice = judging.by_answer([*long, *samples, *samples, *samples])
    assert len(twice) > 2 and [len(p) for p in twice.values()] == sorted(map(len, twice.values()), reverse=True)
    calibration = measured.quality["calibration"]
    right = sum(row["n"] * row["accuracy"] for row in calibration["bins"])
    assert right == pytest.approx(sum(i["correct"] for i in measured.items)) and 0 < calibration["ece"] < 1


def test_data_with_a_score_of_their_own(
    original: ModelView, worse: ModelView, judge: Judge, measured: Measurement, samples: list[Sample]
) -> None:
    some = [dataclasses.replace(s, answers=s.answers * 4 + ("something else",) * 6) for s in samples[:24]]
    made = Judge(some, judge.encoder, original, batch_size=BATCH, score="vqa").measure(worse)
    score = made.quality["score"]
    assert score["name"] == "vqa" and score["value"] == pytest.approx(sum(i["score"] for i in made.items) / 24)
    assert score["reference"] == pytest.approx(sum(i["reference_correct"] for i in made.items) / 24)
    assert score["delta"] == pytest.approx(score["value"] - score["reference"])
    assert score["ci95"][0] <= score["delta"] <= score["ci95"][1]
    assert Gate("vqa", max_drop=1.0).judge(made.quality)[0] and "score" not in measured.quality
    with pytest.raises(RecipeError, match=r"the gate asks for anls[\s\S]*the data's score is vqa"):
        Gate("anls", max_drop=0.1).judge(made.quality)
    with pytest.raises(RecipeError, match="the data's score is exact_match"):
        Gate("anls", max_drop=0.1).judge(measured.quality)


# ------------------------------------------------------------------------------------------------------------- refusal


def test_logits_that_are_not_finite_name_the_sample(judge: Judge, samples: list[Sample]) -> None:
    broken = load_model("demo")
    (word,) = broken.processor.tokenizer("colour", add_special_tokens=False)["input_ids"]
    head = broken.model.lm_head
    head.weight = torch.nn.Parameter(
        head.weight.detach().clone()
    )  # only whoever reads the word is hit, not who says it
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[word] = float("nan")
    asked = [s.id for s in samples if "colour" in (s.question or "")]
    with pytest.raises(WorkFailed, match="not finite") as caught:
        judge.measure(broken)
    assert 0 < len(asked) < 20 and any(f"sample {name}:" in str(caught.value) for name in asked)


# --------------------------------------------------------------------------------------------------------------- cache


def test_the_original_is_asked_once(
    original: ModelView, worse: ModelView, samples: list[Sample], measured: Measurement, tmp_path: Path
) -> None:
    some = samples[:12]

    def measure(samples: list[Sample], view: ModelView = original) -> tuple[int, dict[str, Any]]:
        with forwards(view) as seen:
            quality = Judge(samples, Encoder(original.processor), view, tmp_path).measure(worse).quality
        return len(seen), quality

    first, quality = measure(some)
    assert first > 0 and len(list(tmp_path.iterdir())) == 2
    assert measure(some) == (0, quality)
    other = load_model("demo")
    with torch.no_grad():
        other.linears("language")[0].module.weight[0, 0] += 1
    assert measure(some, other)[0] > 0, "another original"
    assert measure([dataclasses.replace(some[0], answers=("bear",)), *some[1:]])[0] > 0, "another answer"
    assert measure([dataclasses.replace(some[0], images=some[-1].images), *some[1:]])[0] > 0, "another picture"
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    assert measure(some) == (first, quality), "a file that was cut off is made anew"
    assert measure(some) == (0, quality)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_samples_without_answers_get_the_originals_own(
    original: ModelView, worse: ModelView, samples: list[Sample], tmp_path: Path
) -> None:
    bare = [dataclasses.replace(s, answers=()) for s in samples[:10]]
    encoder = Encoder(original.processor)
    judge = Judge([*bare, *samples[10:12]], encoder, original, tmp_path)
    assert judge.answers_from_original == 10
    filled = judge.answered([*bare, samples[20]])
    assert filled[-1] is samples[20] and all(len(s.answers) == 1 for s in filled)
    assert [dataclasses.replace(s, answers=()) for s in filled[:-1]] == bare
    with forwards(original) as seen:
        assert judge.answered(bare) == filled[:-1]
    assert not seen, "asked once"
    quality = judge.measure(load_model("demo")).quality
    assert quality["exact_match"]["delta"] == 0 and quality["kl"] == 0
    alone = Judge(bare, encoder, original)
    assert alone.measure(original).quality["exact_match"]["reference"] == 1.0
    again = Judge([*bare, *samples[10:12]], encoder, original, tmp_path)
    with forwards(original) as seen:
        assert again.answered(bare) == filled[:-1]
        again.measure(worse)
    assert not seen, "kept across runs"


# ------------------------------------------------------------------------------------------- decoders of their own kind


class Ready:
    """An encoder whose batches are there already: sample i is row i."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch
        self.tokenizer = lambda texts, add_special_tokens: {"input_ids": [t.split() for t in texts]}

    def encode(self, samples: list[Sample], answers: bool = True) -> dict[str, torch.Tensor]:
        rows = [int(s.id) for s in samples]
        return {k: v[rows] for k, v in self.batch.items()}

    def prompts(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        return {k: v for k, v in self.encode(samples).items() if k != "labels"}

    def decode(self, ids: torch.Tensor) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]


@pytest.mark.parametrize("family", ["trocr", "florence-2", "blip-2", "paligemma"])
def test_logits_and_labels_meet_as_the_family_has_them(family: str) -> None:
    batch = zoo.batch(family)
    if family == "paligemma":  # its mask is causal over the answer only where token types say so
        batch["token_type_ids"] = (batch["labels"] != -100).long()
    teacher, student = view_of(zoo.model(family)), view_of(zoo.model(family, seed=1))
    samples = [Sample(str(i), str(i), (), "?", ("7 8",), {}, None) for i in range(2)]
    encoder: Any = Ready(batch)
    judge = Judge(samples, encoder, teacher)
    measurement = judge.measure(student)
    shifted = not teacher.family.seq2seq
    rows = [oracle.answer_rows(v.model, batch, shifted) for v in (teacher, student)]
    expected = [oracle.kl(t, s) for (t, _), (s, _) in zip(*rows)]
    assert measurement.quality["kl"] == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert judge.measure(teacher).quality["kl"] == 0
    assert 0 < len(measurement.items[0]["answer"].split()) <= 8, "the answer alone, without the prompt"
    assert measurement.quality["blank"] is None, "these samples have no picture"
    options: dict[str, Any] = {"output_scores": True, "return_dict_in_generate": True, "num_beams": 1}
    with torch.no_grad():
        made = student.model.generate(
            **encoder.prompts(samples), **options, do_sample=False, max_new_tokens=judge._new_tokens
        )
    ends = asking._closing(student.model)
    for row, item in zip(made.sequences[:, -len(made.scores) :].tolist(), measurement.items):
        length = next((t + 1 for t, token in enumerate(row) if token in ends), len(row))
        steps = [made.scores[t][measurement.items.index(item)].log_softmax(-1)[row[t]] for t in range(length)]
        assert item["confidence"] == pytest.approx(float(sum(steps).exp()), rel=1e-3)


def test_progress_is_told(judge: Judge, worse: ModelView) -> None:
    judge.reference()  # asked once
    told = SimpleNamespace(total=0, steps=0, begun=0, ended=0)

    def start(what: str, total: int) -> None:
        told.begun, told.total = told.begun + 1, told.total + total

    progress: Any = SimpleNamespace(
        start=start,
        step=lambda n=1, note="": setattr(told, "steps", told.steps + n),
        done=lambda: setattr(told, "ended", told.ended + 1),
    )
    judge.measure(worse, progress)
    assert 3 + 1 < told.steps == told.total <= 2 * 3 + 1 and told.begun == told.ended == 3
