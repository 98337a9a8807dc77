"""prune.vocabulary on models with real tokenizers: by hand, through the pipeline, from disk, against the original."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image

import svlm
from svlm import passes
from svlm.calib.ask import ask
from svlm.compress.anatomy import ModelView
from svlm.compress.base import Pass
from svlm.compress.errors import DataError, PromiseBroken, Unmet
from svlm.compress.pipeline import Pipeline, apply_pass
from svlm.compress.preflight import shrunken
from svlm.compress.stages import RunFolder
from svlm.compress.storage import load_model, save
from svlm.passes import api
from svlm.passes.prune import _tokens
from tests import speakers, zoo

RECIPE = """
calibration: {fit: 6, check: 6}
gate: {metric: kl, max: 100, on_fail: keep}
passes:
  - prune.vocabulary: {}
  - distill.logits: {steps: 2, batch_size: 4, data: fit}
  - quantize.gptq: {bits: 4, group: 32}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, q.jsonl with 12 questions in German and English (two of them not answered), r.yaml."""
    place = tmp_path_factory.mktemp("speaker")
    speakers.save(place / "model", speakers.byte_level())
    rng = random.Random(0)
    rows = []
    for i in range(12):
        Image.new("RGB", (16, 16), (i * 15, 255 - i * 15, i * 3)).save(place / f"{i}.png")
        row = {"image": f"{i}.png", "question": speakers.text(rng, "latin")}
        rows.append(row | ({"answer": rng.choice(speakers.ROOTS["latin"])} if i % 6 else {}))
    (place / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "r.yaml").write_text(RECIPE)
    return place


@pytest.fixture(scope="module")
def bench(folder: Path) -> svlm.Workbench:
    data = svlm.CalibrationSet.load(str(folder / "q.jsonl"), fit=6, check=6)
    return svlm.Workbench(svlm.load_view(folder / "model"), data, batch_size=4, latency=False)


def make(**settings: Any) -> Pass:
    return passes.find("prune.vocabulary").from_settings(settings)


def run(folder: Path, bench: svlm.Workbench, **settings: Any) -> tuple[ModelView, dict[str, Any]]:
    view = svlm.load_view(folder / "model")
    return view, apply_pass(make(**settings), view, bench.context(view)).numbers


def test_everything_after_the_pass_speaks_the_new_ids(folder: Path, bench: svlm.Workbench) -> None:
    view, numbers = run(folder, bench)
    kept = list(view.vocabulary or ())
    assert numbers["tokens"] == len(kept) < numbers["tokens_before"] - 200 and numbers["tokens_before"] == 727
    original, speech = bench.original, bench.speaking(view)
    assert speech is bench.speaking(view) is not bench.speaking(original)
    for old, new in zip(bench.fit, speech.fit, strict=True):
        ids = torch.tensor(kept)[new["input_ids"]]
        assert torch.equal(ids, old["input_ids"]) and torch.equal(old["attention_mask"], new["attention_mask"])
        marked = old["labels"] != -100
        assert torch.equal(marked, new["labels"] != -100) and torch.equal(ids[marked], old["labels"][marked])
        with torch.no_grad():
            wanted = original.model(**old).logits[..., kept]
            torch.testing.assert_close(view.model(**new).logits, wanted, rtol=0, atol=1e-6)
            with bench.context(view).teacher() as teacher:
                torch.testing.assert_close(teacher.model(**new).logits, wanted, rtol=0, atol=1e-6)
        assert torch.equal(view.token_masks(new).vision, original.token_masks(old).vision)
    assert original.vocabulary is None and original.model.config.text_config.vocab_size == 727
    quality, items = bench.measure(view)
    assert quality["kl"] == pytest.approx(0, abs=1e-6) and quality["agreement"] == 1
    _, before = bench.measure(original)
    assert [i["reference_answer"] for i in items] == [i["answer"] for i in before], "of the whole original"


def test_lost_mass(folder: Path, bench: svlm.Workbench) -> None:
    view, numbers = run(folder, bench)
    gone = sorted(set(range(727)) - set(view.vocabulary or ()))
    mass = []
    for batch in bench.fit:
        with torch.no_grad():
            p = bench.original.model(**batch).logits.double().softmax(-1)
        for row, labels in zip(p, batch["labels"]):
            mass += [float(row[i - 1, gone].sum()) for i in range(1, len(labels)) if labels[i] != -100]
    assert numbers["lost_mass"] == pytest.approx(sum(mass) / len(mass), abs=1e-6)
    assert numbers["lost_mass_max"] == pytest.approx(max(mass), abs=1e-6)


@pytest.mark.slow
def test_pipeline_verify_ask_and_resume(folder: Path, bench: svlm.Workbench, tmp_path: Path) -> None:
    options = api.Options(latency=False, batch_size=4, keep_stages=True)
    arguments = (str(folder / "model"), folder / "r.yaml", str(folder / "q.jsonl"), tmp_path / "out")
    report = api.compress_model(*arguments, options)
    first = report["stages"][1]
    assert [stage["pass"] for stage in report["stages"]] == [
        None,
        "prune.vocabulary",
        "distill.logits",
        "quantize.gptq",
    ]
    assert first["quality"]["kl"] == pytest.approx(0, abs=1e-6) and report["reload"]["checked"]
    assert first["cost"]["bytes"] < report["stages"][0]["cost"]["bytes"]
    assert report["stages"][3]["promises"] == ["prune.vocabulary", "distill.logits", "quantize.gptq"]
    again = api.verify(tmp_path / "out", folder / "model", str(folder / "q.jsonl"), batch_size=4)
    last = report["stages"][-1]["quality"]
    assert again["quality"]["kl"] == pytest.approx(last["kl"], abs=1e-6)
    assert again["quality"]["exact_match"] == last["exact_match"]
    view = svlm.load_view(tmp_path / "out")
    assert len(view.vocabulary or ()) == first["notes"]["tokens"] == view.table.module.weight.shape[0]
    assert isinstance(ask(view, folder / "0.png", "wie groß ist das 房子 ?"), str)
    (stage,) = (tmp_path / "out/.svlm/stages").glob("01-*")
    (stage / "stage.json").unlink()
    shutil.rmtree(next((tmp_path / "out/.svlm/stages").glob("02-*")))
    pipeline = Pipeline(api.read_recipe(folder / "r.yaml"), passes.find)
    resumed = pipeline.run(bench.original, bench, RunFolder(tmp_path / "out"))
    for old, new in zip(report["stages"], resumed.report["stages"], strict=True):
        assert new["quality"] == old["quality"]


def test_stock_transformers_load_the_result(folder: Path, bench: svlm.Workbench, tmp_path: Path) -> None:
    view, _ = run(folder, bench)
    save(view, tmp_path / "small")
    stock = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "small", dtype=torch.float32)
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "small")
    batch = bench.speaking(view).some(2)
    told = processor(
        text=processor.apply_chat_template(bench.data.fit[0].conversation, add_generation_prompt=True),
        images=[Image.open(folder / "0.png")],
        return_tensors="pt",
        add_special_tokens=False,
    )
    assert stock.generation_config.suppress_tokens == [3] and int(told["input_ids"].max()) < len(view.vocabulary or ())
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, view.model(**batch).logits, rtol=0, atol=1e-6)
    again = load_model(tmp_path / "small", find=passes.find)
    assert again.vocabulary == view.vocabulary and again.ledger.to_json() == view.ledger.to_json()


def test_a_second_cut_and_a_cut_original(folder: Path, bench: svlm.Workbench, tmp_path: Path) -> None:
    view, first = run(folder, bench, scripts=["latin", "han"])
    save(view, tmp_path / "once")
    once, _ = run(folder, bench, scripts=["latin", "han"])
    second = apply_pass(make(), view, bench.context(view)).numbers
    assert second["tokens_before"] == first["tokens"] > second["tokens"]
    assert set(view.vocabulary or ()) < set(once.vocabulary or ())
    quality, _ = bench.measure(view)
    assert quality["kl"] == pytest.approx(0, abs=1e-6)
    save(view, tmp_path / "twice")
    assert load_model(tmp_path / "twice", find=passes.find).vocabulary == view.vocabulary
    from_once = svlm.Workbench(svlm.load_view(tmp_path / "once"), bench.data, batch_size=4, latency=False)
    assert from_once.measure(view)[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert shrunken(from_once.original, from_once).vocabulary == once.vocabulary
    with pytest.raises(svlm.SvlmError, match="its original lacks"):
        from_once.measure(bench.original)


def tokens(view: ModelView) -> set[str]:
    return set(view.processor.tokenizer.get_vocab())


def test_what_the_settings_keep(folder: Path, bench: svlm.Workbench, tmp_path: Path) -> None:
    core = _tokens.backend(bench.original.processor)
    fit, _ = run(folder, bench)

    def whole(word: str) -> set[str]:
        return {core.id_to_token(i) for lead in ("", " ") for i in core.encode(lead + word).ids}

    assert not whole("кошка") <= tokens(fit)
    scripts, numbers = run(folder, bench, scripts=["cyrillic"])
    assert whole("кошка") <= tokens(scripts) and not whole("水猫") <= tokens(scripts)
    assert numbers["asked_by"]["scripts"] > 5
    words, _ = run(folder, bench, keep=["кошка"])
    assert whole("кошка") <= tokens(words)
    (tmp_path / "words.txt").write_text("кошка\n水\n", encoding="utf-8")
    listed, _ = run(folder, bench, keep=str(tmp_path / "words.txt"))
    assert whole("кошка") | whole("水") <= tokens(listed)
    (tmp_path / "greek.txt").write_text("σπίτι νερό\n" * 3 + "γάτα\n", encoding="utf-8")
    corpus, numbers = run(folder, bench, corpus=[str(tmp_path / "greek.txt")])
    assert whole("σπίτι") | whole("γάτα") <= tokens(corpus) and not tokens(fit) <= tokens(corpus)
    assert whole("user") <= tokens(corpus), "what all questions have in common"
    seldom, numbers = run(folder, bench, corpus=[str(tmp_path / "greek.txt")], least=3)
    assert tokens(seldom) < tokens(corpus) and numbers["corpus_tokens"] > numbers["corpus_tokens_before"]
    row = {"image": str(folder / "0.png"), "question": "дом ?", "answer": ["свет", "水"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    rows, _ = run(folder, bench, corpus=["fit", str(tmp_path / "rows.jsonl")])
    assert whole("дом") | whole("свет") | whole("水") <= tokens(rows)


def test_refusals(folder: Path, bench: svlm.Workbench, tmp_path: Path) -> None:
    view = svlm.load_view(folder / "model")
    before = {k: v.clone() for k, v in view.model.state_dict().items()}
    ctx = bench.context(view)
    (tmp_path / "empty.txt").write_text("\n")
    every = {"scripts": ["latin", "cyrillic", "greek", "han", "common"]}
    for settings, kind, words in (
        ({"scripts": ["cyrilic"]}, Unmet, "cyrillic"),
        ({"corpus": [str(tmp_path / "empty.txt")]}, DataError, "empty"),
        ({"corpus": ["nowhere.txt"]}, DataError, "cannot read"),
    ):
        with pytest.raises(kind, match=words):
            make(**settings).requires(view, ctx)
    with pytest.raises(Unmet, match=r"tokenizer\.json"):
        make().requires(SimpleNamespace(processor=None), ctx)
    demo = svlm.load_view("demo")
    with pytest.raises(Unmet, match="WordLevel"):
        make().requires(demo, ctx)
    assert all(torch.equal(before[k], v) for k, v in view.model.state_dict().items()) and view.vocabulary is None
    once = svlm.load_view(folder / "model")
    apply_pass(make(**every), once, ctx)
    with pytest.raises(Unmet, match="nothing"):
        apply_pass(make(**every), once, bench.context(once))
    with pytest.raises(svlm.SvlmError, match="which tokens stay"):
        make(corpus=[])


def test_promise(folder: Path, bench: svlm.Workbench) -> None:
    view, _ = run(folder, bench)
    step = make()
    step.ensures(view)
    view.model.resize_token_embeddings(len(view.vocabulary or ()) + 1)
    with pytest.raises(PromiseBroken, match="promised at most"):
        step.ensures(view)


def test_the_ladder_asks_for_fewer_occurrences() -> None:
    assert [make(least=n).weaker() for n in (1, 2, 9)] == [None, make(least=1), make(least=4)]


NATIVE = {"qwen2-vl": "Qwen2Tokenizer", "gemma3": "GemmaTokenizer", "blip-2-t5": "T5Tokenizer"}


@pytest.mark.parametrize("family", NATIVE)
def test_tokenizers_of_their_own_classes(family: str, tmp_path: Path) -> None:
    """Classes that transformers builds anew from the vocabulary and merges of tokenizer.json."""
    maker = {"qwen2-vl": speakers.byte_level, "gemma3": speakers.byte_fallback, "blip-2-t5": speakers.unigram}[family]
    model = json.loads(maker().to_str())["model"]
    parts: dict[str, Any] = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    if "merges" in model:
        parts |= {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}
    else:
        parts |= {"vocab": [tuple(entry) for entry in model["vocab"]]}
    tokenizer = getattr(tf, NATIVE[family])(**parts, extra_special_tokens={"image_token": "<image>"})
    made = speakers.processor(speakers.byte_level())
    made.tokenizer = tokenizer
    owner = zoo.model(family)
    owner.config.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    processor = tf.AutoProcessor.from_pretrained(tmp_path)
    assert type(processor.tokenizer).__name__ == NATIVE[family]
    view: Any = SimpleNamespace(model=owner, processor=processor)
    wanted = _tokens.of_scripts(_tokens.backend(processor), ["latin", "common"])
    found = _tokens.trim(view, wanted, len(processor.tokenizer) + 20, speakers.lines()[:200])
    assert type(found.processor.tokenizer).__name__ == NATIVE[family]
    assert len(found.processor.tokenizer) == len(found.kept) < len(processor.tokenizer) - 50
