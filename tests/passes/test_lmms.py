"""Benchmarks through lmms-eval, as far as they need no lmms-eval: what a task file may say, how answers are paired."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from svlm.calib.metrics.pairs import mcnemar, paired_bootstrap
from svlm.compress.errors import UsageError
from svlm.passes.lmms import compare, paired, prepare
from svlm.passes.lmms_task import read_task

DATA = "dataset_path: json\ndataset_kwargs: {data_files: some.jsonl}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "task.yaml"
    path.write_text(text)
    return path


def test_a_task_of_plain_data_is_read(tmp_path: Path) -> None:
    text = f"task: mine\n{DATA}test_split: train\ndoc_to_visual: image\ndoc_to_text: '{{{{question}}}}'\n"
    config = read_task(written(tmp_path, text))
    assert config["task"] == "mine" and config["doc_to_text"] == "{{question}}"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"task: mine\n{DATA}doc_to_text: !function utils.text\n", "names Python code"),
        (f"task: mine\n{DATA}doc_to_text: !!python/object/apply:os.system ['touch ran']\n", "names Python code"),
        (f"task: mine\n{DATA}doc_to_text: !!python/name:os.system\n", "names Python code"),
        (f"task: mine\n{DATA}process_results: utils.score\n", "key 'process_results'"),
        (f"task: mine\n{DATA}include: other.yaml\n", "key 'include'"),
        (f"task: mine\n{DATA}class: some.Class\n", "key 'class'"),
        ("task: mine\ndataset_path: someone/set\ndataset_kwargs: {token: true}\n", "local files"),
        ("task: mine\ndataset_path: pandas\ndataset_kwargs: {data_files: some.pkl}\n", "local files"),
        ("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: a, From_YouTube: true}\n", "local files"),
        (f"task: ../mine\n{DATA}", "letters, digits"),
        ("task: [a, b]\n", "not a task"),
        ("task: 'mine\n", "no YAML"),
    ],
)
def test_what_could_run_code_is_refused(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef text(doc): return ''\n")
    with pytest.raises(UsageError, match=what):
        read_task(written(tmp_path, text))
    assert not (tmp_path / "ran").exists()


def test_without_lmms_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lmms_eval", "lmms_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"pip install \"svlm\[lmms-eval\]\""):
        prepare(["pope"])


def test_pairs_of_right_and_wrong() -> None:
    draw = random.Random(0)
    was = [float(draw.random() < 0.8) for _ in range(60)]
    now = [float(draw.random() < 0.7) for _ in range(60)]
    pictures = [f"p{i // 3}" for i in range(60)]
    made = paired(was, now, pictures)
    fell = sum(1 for a, b in zip(was, now) if (a, b) == (1, 0))
    rose = sum(1 for a, b in zip(was, now) if (a, b) == (0, 1))
    assert (made["fell"], made["rose"], made["mcnemar_p"]) == (fell, rose, mcnemar(fell, rose))
    assert made["delta"] == pytest.approx((rose - fell) / 60)
    assert made["ci95"] == list(paired_bootstrap([a == 1 for a in was], [b == 1 for b in now], pictures))


def test_graded_scores_have_no_mcnemar() -> None:
    made = paired([0.25, 1.0, 0.5], [0.5, 1.0, 0.25], ["a", "b", "c"])
    assert (made["fell"], made["rose"], made["delta"], made["mcnemar_p"]) == (1, 1, 0.0, None)


def side(scores: list[float], value: float, answers: str = "abcd") -> dict:
    items = [
        {"doc_id": i, "filter": "none", "picture": f"p{i // 2}", "answer": [answers[i]], "scores": {"acc,none": score}}
        for i, score in enumerate(scores)
    ]
    metrics = {"mine": {"acc,none": {"value": value, "higher_is_better": True}}}
    return {"metrics": metrics, "items": {"mine": items}, "notes": []}


def test_the_interval_is_the_metrics_where_that_is_the_mean_of_its_items() -> None:
    before, after = side([1, 1, 1, 0], 0.75), side([1, 0, 1, 0], 0.5, answers="abxd")
    row = compare(before, after)["mine"]
    assert (row["n"], row["n_images"], row["changed"]) == (4, 2, 1)
    metric = row["metrics"]["acc"]
    assert (metric["value"], metric["reference"], metric["delta"]) == (0.5, 0.75, -0.25)
    assert metric["ci95"] == metric["items"]["ci95"] and metric["ci95"][0] < 0 == metric["ci95"][1]
    # a metric of its own, as MME's, has none
    other = compare(side([1, 1, 1, 0], 140.0), side([1, 0, 1, 0], 90.0))["mine"]["metrics"]["acc"]
    assert other["delta"] == -50 and other["ci95"] is None and other["items"]["delta"] == -0.25


def test_items_are_paired_by_their_id_not_by_their_place() -> None:
    before, after = side([1, 1, 0, 0], 0.5), side([1, 1, 0, 0], 0.5)
    after["items"]["mine"].reverse()
    items = compare(before, after)["mine"]["metrics"]["acc"]["items"]
    assert (items["fell"], items["rose"]) == (0, 0)
