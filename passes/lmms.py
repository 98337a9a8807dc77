"""Benchmarks by their names: lmms-eval's tasks put to a compressed model and its original, item by item the same.

lmms-eval brings questions, scoring and the tasks' own metrics; svlm brings the models (`passes/lmms_model.py`), the
pairing and the interval. Each model's answers to a finished task are kept in ``OUT/lmms-eval``: what was interrupted
goes on with the next task.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import json
import numbers
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calib.metrics.pairs import mcnemar, paired_bootstrap
from ..compress import __version__, disk
from ..compress.base import Json, Progress, Silent
from ..compress.errors import DataError, OutputError, SvlmError, UsageError
from ..compress.families import Family
from .lmms_task import load_task

FOLDER = "lmms-eval"  # in OUT
ASKABLE = ("generate_until", "loglikelihood", "multiple_choice")
INSTALL = 'pip install "svlm[lmms-eval]"; docs/lmms-eval.md has a smaller way'
SAME = 1e-9  # a metric that differs less from the mean of its items' scores is that mean


@dataclass
class Benchmark:
    """One name of ``--lmms-eval``, loaded, with its data.

    Attributes:
        given: what lmms-eval is asked to run: the name, or the task object of a file.
        tasks: its tasks (more than one where it is a group) by name. simple: asked by `SvlmSimple`.
        manager: lmms-eval's index of tasks.
    """

    name: str
    given: Any
    tasks: dict[str, Any]
    simple: bool
    manager: Any


def verify(
    out: str | Path,
    against: str | Path,
    data: str | Path | None,
    names: Sequence[str],
    *,
    trust_remote_code: bool = False,
    **more: Any,
) -> dict[str, Json]:
    """`passes.api.verify` where there is data, and the benchmarks `names` as its ``lmms_eval`` (see `run`)."""
    from .api import verify as compare_answers

    benchmarks = prepare(names, trust_remote_code=trust_remote_code) if names else []
    result: dict[str, Json] = {"model": str(out), "against": str(against), "gate": None, "passed": True}
    if data is not None:
        result = compare_answers(out, against, data, trust_remote_code=trust_remote_code, **more)
    if benchmarks:
        same = {key: more[key] for key in ("batch_size", "rows", "progress") if key in more}
        result["lmms_eval"] = run(benchmarks, out, against, trust_remote_code=trust_remote_code, **same)
    return result


def prepare(names: Sequence[str], *, trust_remote_code: bool = False) -> list[Benchmark]:
    """Find and load every benchmark with its data, before any model is asked.

    Args:
        names: lmms-eval's tasks, groups and tags, or paths of task files. trust_remote_code: task files may run code.

    Raises:
        UsageError: lmms-eval is not installed; a name that it does not know; a task that svlm cannot be asked.
        DataError: some lack their data or a package; all of them are named.
    """
    with _quiet():
        try:
            from lmms_eval.tasks import TaskManager
        except ImportError as error:
            raise UsageError("lmms-eval is not installed", found=str(error), change=INSTALL) from error
        files = [name for name in names if name.endswith((".yaml", ".yml"))]
        manager = TaskManager(include_defaults=len(files) < len(names), model_name="svlm")
        unknown = [name for name in names if name not in files and name not in manager.all_tasks]
        if unknown:
            close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=5)
            raise UsageError(
                f"lmms-eval has no task {', '.join(unknown)}",
                change=f"did you mean {' or '.join(close)}?" if close else "lmms-eval tasks list shows them all",
            )
        found: list[Benchmark] = []
        lacking: list[str] = []
        for name in names:
            try:
                made = _file(name, manager, trust_remote_code) if name in files else _named(name, manager)
            except SvlmError:
                raise
            except Exception as error:
                lacking.append(f"{name}: {_why(error)}")
            else:
                found.append(made)
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(names)} benchmarks cannot run here; none was started",
            where="--lmms-eval",
            found="\n         ".join(lacking),
            change="fetch the data once where there is a network (datasets.load_dataset of the repository named, same "
            "HF_HOME; with 'hf auth login' where it asks for a token), install the package, or leave the task out",
        )
    return found


def _file(name: str, manager: Any, trust: bool) -> Benchmark:
    task = load_task(Path(name), trust_remote_code=trust)
    return _checked(Benchmark(task.config.task, task, {task.config.task: task}, _is_simple([task]), manager))


def _named(name: str, manager: Any) -> Benchmark:
    from lmms_eval.evaluator_utils import get_task_list

    tasks = {t.task_name: t.task for t in get_task_list(manager.load_task_or_group([name], "chat")) if t.task}
    simple = _is_simple(tasks.values())
    if simple:
        again = get_task_list(manager.load_task_or_group([name], "simple"))
        tasks = {t.task_name: t.task for t in again if t.task}
    return _checked(Benchmark(name, name, tasks, simple, manager))


def _is_simple(tasks: Iterable[Any]) -> bool:
    return any(task.OUTPUT_TYPE != "generate_until" for task in tasks)


def _checked(made: Benchmark) -> Benchmark:
    for name, task in made.tasks.items():
        if task.OUTPUT_TYPE not in ASKABLE or "acc_mutual_info" in task.aggregation():
            what = task.OUTPUT_TYPE if task.OUTPUT_TYPE not in ASKABLE else "acc_mutual_info"
            raise UsageError(
                f"task {name} wants {what}, which svlm cannot be asked",
                change=f"leave it out; svlm answers {', '.join(ASKABLE)}",
            )
    return made


def _why(error: Exception) -> str:
    """One line; of lmms-eval's retries only what the last one met."""
    last = getattr(error, "last_attempt", None)  # only fetching data is tried again
    if last is not None:
        cause = last.exception()
        return f"its data is not here ({type(cause).__name__}: {_line(cause)})"
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or "no message")[:200]


def run(
    benchmarks: Sequence[Benchmark],
    out: str | Path,
    against: str | Path,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    rows: Sequence[Family] = (),
    progress: Progress | None = None,
) -> dict[str, Json]:
    """Put `benchmarks` to `out` and to the original, one after the other, and pair the answers by item.

    Args:
        limit: only the first so many items of each task.

    Returns:
        version; tasks: name -> n, n_images, changed (items answered differently), notes, file (where its answers are),
        metrics: name -> value, reference, delta, higher_is_better, ci95 (where the metric is the mean of its items'
        scores, else None), items: `paired` of the items' scores, None where they are no numbers. A group's own
        figures have no items.

    Raises:
        DataError: a task shows something else than pictures. OutputError: no such folder, or not writable.
    """
    from importlib.metadata import version

    from ..compress import storage
    from .api import load_view
    from .lmms_model import SvlmChat, SvlmSimple

    folder = Path(out)
    if not folder.is_dir():
        raise OutputError("no such folder", where=str(out), change="give the OUT of an earlier 'svlm compress'")
    made: dict[str, Json] = {"version": version("lmms-eval"), "limit": limit, "tasks": {}}
    options: dict[str, Any] = {"rows": rows, "trust_remote_code": trust_remote_code}
    views = [load_view(against, **options), load_view(out, **options)]
    prints = [storage.fingerprint(view) for view in views]
    with _quiet():
        for one in benchmarks:
            kind = SvlmSimple if one.simple else SvlmChat
            models = [kind(view=view, batch_size=batch_size, progress=progress or Silent()) for view in views]
            firsts = [_first_items(one, model) for model in models]  # both, before hours are spent on one
            pair, configs = [], _configs(one)  # lmms-eval changes the configuration when it runs
            for model, first, weights, ending in zip(models, firsts, prints, (".original.json", ".json")):
                model.asking = f"{one.name}, {'the original' if ending == '.original.json' else folder.name}"
                told = [weights, first, made["version"], __version__, limit, batch_size, configs]
                key = hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()
                pair.append(_asked(one, model, folder / FOLDER / (one.name + ending), key, limit))
            made["tasks"] |= compare(*pair, file=str(folder / FOLDER / f"{one.name}.json"))
    return made


def _first_items(one: Benchmark, model: Any) -> list[str]:
    """Of each task, a digest of its data and of what the model is given first; refuses what it cannot be asked."""
    digests = []
    for name, task in one.tasks.items():
        model.task_dict[name] = task.dataset
        task.build_all_requests(limit=1, rank=0, world_size=1)
        batch = model.encoder.prompts([model.sample(task.instances[0])])
        data = getattr(task.eval_docs, "_fingerprint", "")
        digest = hashlib.sha256(f"{len(task.eval_docs)} {data} {task.instances[0].args[0]}".encode())
        for key, tensor in sorted(batch.items()):
            digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
        digests.append(digest.hexdigest())
    return digests


def _configs(one: Benchmark) -> str:
    """The tasks as they are configured; addresses of functions differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr([task.dump_config() for task in one.tasks.values()]))


def _asked(one: Benchmark, model: Any, path: Path, key: str, limit: int | None) -> dict[str, Json]:
    """What lmms-eval says of `model`, read from `path` where the same was asked before."""
    if path.is_file():
        kept = disk.read_json(path)
        if kept.get("key") == key:
            return kept
    from lmms_eval.evaluator import simple_evaluate

    disk.make_folder(path.parent)
    # what its scoring asks of its own command line: where to write files for a server, and that it may see pictures
    arguments = argparse.Namespace(output_path=str(path.parent), process_with_media=True, reasoning_tags=None)
    told = simple_evaluate(
        model=model,
        tasks=[one.given],
        task_manager=one.manager,
        limit=limit,
        batch_size=model.batch_size,
        bootstrap_iters=0,
        log_samples=True,
        cli_args=arguments,
        verbosity="ERROR",
    )
    kept = {"key": key, **_facts(told, model.pictures), "notes": sorted(model.notes)}
    disk.write_whole(path, json.dumps(kept, indent=1, default=str) + "\n")
    return kept


def _facts(told: Mapping[str, Any], pictures: Mapping[tuple[str, int], str]) -> dict[str, Json]:
    """Of lmms-eval's report: metrics by task and items with answers and scores."""
    metrics: dict[str, Json] = {}
    for task, row in told["results"].items():
        higher = told["higher_is_better"].get(task) or {}
        named = {k: k.partition(",")[0] for k in row if "," in k}
        metrics[task] = {
            key: {"value": _number(row[key]), "higher_is_better": higher[name]}
            for key, name in named.items()
            if name in higher
        }
    items: dict[str, Json] = {}
    for task, samples in told["samples"].items():
        score_key = (told["configs"].get(task) or {}).get("score_key") or "score"
        filters = list(dict.fromkeys(key.partition(",")[2] for key in metrics.get(task, {})))
        each = len(samples) // max(1, len(filters))  # one filter's items after another's, in order
        for k, sample in enumerate(samples):
            chosen = filters[k // each] if filters else ""
            scores = {m: _score(sample.get(m.partition(",")[0]), score_key) for m in metrics.get(task, {})}
            items.setdefault(task, []).append(
                {
                    "doc_id": sample["doc_id"],
                    "filter": chosen,
                    "picture": pictures[task, sample["doc_id"]],
                    "target": sample["target"],
                    "answer": sample["filtered_resps"],
                    "scores": {m: s for m, s in scores.items() if s is not None and m.endswith(f",{chosen}")},
                }
            )
    return {"metrics": metrics, "items": items}


def _score(value: Any, key: str) -> float | None:
    """An item's score: a number, or the number that its dictionary calls so."""
    return _number(value.get(key) if isinstance(value, Mapping) else value)


def _number(value: Any) -> float | None:
    if isinstance(value, numbers.Real) or type(value).__name__ in ("bool_", "bool"):
        return float(value)
    return None


def compare(before: Mapping[str, Any], after: Mapping[str, Any], *, file: str = "") -> dict[str, Json]:
    """Two models' kept answers to one benchmark, paired by item: the rows of `run`."""
    tasks: dict[str, Json] = {}
    for task, metrics in after["metrics"].items():
        old, new = ({(i["doc_id"], i["filter"]): i for i in side["items"].get(task, [])} for side in (before, after))
        both = [key for key in new if key in old]
        pictures = {doc: new[doc, kind]["picture"] for doc, kind in both}
        row: dict[str, Json] = {
            "n": len(pictures),
            "n_images": len(set(pictures.values())),
            "changed": len({key[0] for key in both if new[key]["answer"] != old[key]["answer"]}),
            "metrics": {},
            "notes": sorted({*before["notes"], *after["notes"]}),
            "file": file,
        }
        for name, made in metrics.items():
            scored = [k for k in both if name in new[k]["scores"] and name in old[k]["scores"]]
            was, now = ([side[k]["scores"][name] for k in scored] for side in (old, new))
            items = paired(was, now, [new[k]["picture"] for k in scored]) if scored else None
            value, reference = made["value"], before["metrics"][task][name]["value"]
            known = value is not None and reference is not None
            mean = known and items and abs(items["value"] - value) < SAME and abs(items["reference"] - reference) < SAME
            row["metrics"][name.removesuffix(",none")] = {
                "value": value,
                "reference": reference,
                "delta": value - reference if known else None,
                "higher_is_better": made["higher_is_better"],
                "ci95": items["ci95"] if items and mean else None,
                "items": items,
            }
        tasks[task] = row
    return tasks


def paired(was: Sequence[float], now: Sequence[float], pictures: Sequence[str]) -> dict[str, Json]:
    """Two models' scores of the same items: means, difference with its interval over pictures, and flips.

    Returns:
        n, value, reference, delta, ci95; fell and rose: items whose score did; mcnemar_p: exact, None where scores are
        not all 0 or 1.
    """
    n = len(now)
    fell, rose = sum(b < a for a, b in zip(was, now)), sum(b > a for a, b in zip(was, now))
    binary = {*was, *now} <= {0.0, 1.0}
    return {
        "n": n,
        "value": sum(now) / n,
        "reference": sum(was) / n,
        "delta": (sum(now) - sum(was)) / n,
        "ci95": list(paired_bootstrap(was, now, pictures)),
        "fell": fell,
        "rose": rose,
        "mcnemar_p": mcnemar(fell, rose) if binary else None,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lmms-eval logs and prints to standard output, which is ours: to standard error with it."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
