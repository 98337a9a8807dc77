"""Benchmarks through lmms-eval 0.7 on a task file of the demo's questions. Skipped where it is not installed.

lmms-eval's scoring is the public implementation that svlm's exact match is compared with here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lmms_eval")

import svlm
from svlm.calib.dataset import CalibrationSet
from svlm.calib.encode import Encoder
from svlm.cli import main
from svlm.compress import storage
from svlm.compress.errors import DataError, UsageError
from svlm.passes import lmms, lmms_task

pytestmark = pytest.mark.peers
QUESTIONS = 96
TASK = {
    "task": "demo_check",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "doc_to_visual": "image",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "generation_kwargs": {"max_new_tokens": 16},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}],
}


@pytest.fixture(scope="module")
def data() -> CalibrationSet:
    return CalibrationSet.load("demo", fit=4, check=QUESTIONS)


@pytest.fixture(scope="module")
def folder(data: CalibrationSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The check questions as a JSONL file with pictures beside it."""
    folder = tmp_path_factory.mktemp("task")
    lines = []
    for sample in data.check:
        (folder / "pictures").mkdir(exist_ok=True)
        name = f"pictures/{sample.images[0].content[:16]}.png"
        sample.images[0].open().save(folder / name)
        lines.append(json.dumps({"image": name, "question": sample.question, "answer": sample.answers[0]}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def small(data: CalibrationSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, svlm.Workbench, Any]:
    """OUT with the demo in 2 bits, which loses answers; svlm's own measurement of it."""
    view = svlm.load_view("demo")
    bench = svlm.Workbench(svlm.load_view("demo"), data, latency=False)
    svlm.apply_pass(svlm.find("quantize.rtn")(bits=2, group=32), view, bench.context(view))
    out = tmp_path_factory.mktemp("run") / "out"
    svlm.save(view, out)
    return out, bench, bench.measure(svlm.load_view(out))


def written(folder: Path, **changes: Any) -> str:
    made = {**TASK, **changes}
    path = folder / f"{made['task']}.yaml"
    path.write_text(json.dumps(made))  # JSON is YAML
    return str(path)


def kept(path: Path) -> list[Mapping[str, Any]]:
    return json.loads(path.read_text())["items"]["demo_check"]


def test_the_same_answers_and_the_same_exact_match(
    folder: Path, small: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line; asked again, what is kept serves."""
    out, _, (quality, items) = small
    command = ["verify", str(out), "--against", "demo", "--lmms-eval", written(folder), "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)["lmms_eval"]  # nothing else is on standard output
    row, match = told["tasks"]["demo_check"], quality["exact_match"]
    metric = row["metrics"]["exact_match"]
    assert (row["n"], row["n_images"]) == (quality["n"], quality["n_images"]) == (QUESTIONS, row["n_images"])
    for side, name in (("reference_answer", "demo_check.original.json"), ("answer", "demo_check.json")):
        assert [i["answer"] for i in kept(out / "lmms-eval" / name)] == [[i[side]] for i in items]
    assert metric["value"] == metric["items"]["value"] == match["value"]
    assert metric["reference"] == metric["items"]["reference"] == match["reference"]
    assert match["value"] < match["reference"]
    assert (metric["items"]["fell"], metric["items"]["rose"]) == (match["right_to_wrong"], match["wrong_to_right"])
    assert metric["items"]["mcnemar_p"] == match["mcnemar_p"] and metric["ci95"] == pytest.approx(match["ci95"])

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("lmms_eval.evaluator.simple_evaluate", never)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["lmms_eval"] == told
    assert main(command[:-1]) == 0  # as a table
    assert "demo_check" in capsys.readouterr().out
    with (folder / "questions.jsonl").open("a") as lines:  # other data are asked anew
        lines.write(json.dumps({"image": kept_picture(folder), "question": "how many?", "answer": "1"}) + "\n")
    try:
        assert main(command) == 3
    finally:
        text = (folder / "questions.jsonl").read_text().splitlines(keepends=True)
        (folder / "questions.jsonl").write_text("".join(text[:QUESTIONS]))


def kept_picture(folder: Path) -> str:
    return f"pictures/{next((folder / 'pictures').iterdir()).name}"


def test_a_finished_task_is_kept_when_the_next_one_dies(
    folder: Path, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval import evaluator

    out = small[0]
    names = [written(folder, task="first"), written(folder, task="second")]
    real = evaluator.simple_evaluate

    def dies(**options: Any) -> Any:
        if options["tasks"][0].config.task == "second":
            raise KeyboardInterrupt
        return real(**options)

    monkeypatch.setattr(evaluator, "simple_evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        lmms.run(lmms.prepare(names), out, "demo", limit=4)
    assert {p.name for p in (out / "lmms-eval").glob("[fs]*.json")} == {"first.json", "first.original.json"}
    monkeypatch.setattr(evaluator, "simple_evaluate", real)
    written_at = (out / "lmms-eval" / "first.json").stat().st_mtime_ns
    made = lmms.run(lmms.prepare(names), out, "demo", limit=4)
    assert list(made["tasks"]) == ["first", "second"] and made["tasks"]["second"]["n"] == 4
    assert (out / "lmms-eval" / "first.json").stat().st_mtime_ns == written_at


def test_choices_are_weighed_by_their_likelihood(folder: Path, small: Any, data: CalibrationSet) -> None:
    out = small[0]
    asked = [i for i, s in enumerate(data.check) if s.answers[0] in ("yes", "no")][:6]
    lines = (folder / "questions.jsonl").read_text().splitlines()
    (folder / "choices.jsonl").write_text("".join(lines[i] + "\n" for i in asked))
    name = written(
        folder,
        task="choices",
        dataset_kwargs={"data_files": {"test": "choices.jsonl"}},
        output_type="multiple_choice",
        doc_to_choice=["yes", "no"],
        generation_kwargs=None,
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    lmms.run(lmms.prepare([name]), out, "demo")
    items = json.loads((out / "lmms-eval" / "choices.original.json").read_text())["items"]["choices"]
    view = svlm.load_view("demo")
    encoder = Encoder(view.processor)
    for i, item in zip(asked, items):
        sample, losses = data.check[i], []
        for choice in ("yes", "no"):
            [ids] = encoder.tokenizer([choice], add_special_tokens=False)["input_ids"]
            ids = [*ids, encoder.tokenizer.eos_token_id]
            prompt = encoder.prompts([sample])
            whole = torch.cat([prompt["input_ids"], torch.tensor([ids])], 1)
            batch = {**prompt, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
            with torch.no_grad():
                rows = view.model(**batch).logits[0, -len(ids) - 1 : -1].double().log_softmax(-1)
            losses.append(-sum(float(row[token]) for row, token in zip(rows, ids)) / len(ids))
        assert [loss for loss, _ in item["answer"]] == pytest.approx(losses, abs=1e-4)
        assert item["scores"]["acc,none"] == float(sample.answers[0] == ("yes", "no")[losses.index(min(losses))])


def test_code_of_a_task_file_runs_only_when_trusted(folder: Path) -> None:
    (folder / "utils.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\ndef text(doc): return doc['question']\n")
    path = folder / "coded.yaml"
    path.write_text(Path(written(folder, task="coded")).read_text().replace('"{{question}}"', "!function utils.text"))
    with pytest.raises(UsageError, match="names Python code"):
        lmms.prepare([str(path)])
    assert not (folder / "ran").exists()
    (made,) = lmms.prepare([str(path)], trust_remote_code=True)
    assert (folder / "ran").exists()
    assert made.tasks["coded"].doc_to_text({"question": "why?"}) == "why?"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"doc_to_text": "{{ question.__class__.__mro__ }}"}, "SecurityError"),
        ({"doc_to_text": "{{ cycler.__init__.__globals__.os.getcwd() }}"}, "SecurityError"),
        ({"dataset_kwargs": {"data_files": "missing.jsonl"}}, "no such data file"),
        ({"doc_to_visual": "photo"}, "no column 'photo'"),
    ],
)
def test_what_cannot_run_is_said_before_a_model_is_loaded(changes: dict[str, Any], what: str, folder: Path) -> None:
    with pytest.raises(DataError, match=what):
        lmms.prepare([written(folder, task="wrong", **changes)])


def test_metrics_and_names_that_nobody_knows(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)no metric 'exact_mach'.*did you mean 'exact_match'"):
        lmms.prepare([written(folder, task="wrong", metric_list=[{"metric": "exact_mach"}])])
    with pytest.raises(UsageError, match="generate_until_multi_round"):
        lmms.prepare([written(folder, task="wrong", output_type="generate_until_multi_round")])


def test_benchmarks_without_their_data_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pope and mme, with a hub that cannot be reached; the index is of these two alone, which saves half a minute."""
    from lmms_eval import tasks
    from lmms_eval.api.task import ConfigurableTask

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    home = Path(tasks.__file__).parent
    index = tasks.TaskManager

    def two(**options: Any) -> Any:
        return index(include_path=[str(home / "pope"), str(home / "mme")], **{**options, "include_defaults": False})

    monkeypatch.setattr(tasks, "TaskManager", two)
    monkeypatch.setattr("datasets.load_dataset", offline)
    monkeypatch.setattr(ConfigurableTask.download.retry, "wait", 0)
    with pytest.raises(DataError) as caught:
        lmms.prepare(["pope", "mme"])
    assert all(f"{name}: its data is not here (ConnectionError" in str(caught.value) for name in ("pope", "mme"))
    with pytest.raises(UsageError, match=r"(?s)no task pop\n.*did you mean pope"):
        lmms.prepare(["pop"])


def test_the_model_class_is_registered() -> None:
    import tomllib

    from lmms_eval.models import get_model
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    root = Path(storage.__file__).resolve().parent.parent
    entry = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]["svlm"]
    module, name = entry.split(":")
    registry = ModelRegistryV2()
    registry.register_manifest(getattr(sys.modules[module], name)())
    made = registry.get_model_class("svlm").create_from_arg_string("pretrained=demo", {"batch_size": 4})
    assert made.batch_size == 4 and made.is_simple is False
    assert registry.get_model_class("svlm", force_simple=True).is_simple is True
    assert callable(get_model)


def test_pictures_may_lie_in_a_parquet_file(folder: Path, small: Any) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()[:4]]
    table = datasets.Dataset.from_list([{**row, "image": str(folder / row["image"])} for row in rows])
    table.cast_column("image", datasets.Image()).to_parquet(folder / "some.parquet")
    name = written(
        folder,
        task="packed",
        dataset_path="parquet",
        dataset_kwargs={"data_files": {"test": "some.parquet"}},
    )
    made = lmms.run(lmms.prepare([name]), small[0], "demo")
    answers = [i["answer"] for i in json.loads(Path(made["tasks"]["packed"]["file"]).read_text())["items"]["packed"]]
    assert answers == [[i["answer"]] for i in small[2][1][:4]]


def test_a_task_file_is_read_by_the_reader_that_runs_nothing() -> None:
    assert {"process_results", "process_docs", "class", "include", "doc_to_messages"}.isdisjoint(lmms_task.KEYS)
