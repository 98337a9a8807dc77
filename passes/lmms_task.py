"""A task file of lmms-eval, read without running what it names.

lmms-eval's own reader runs Python that a task file points to (``!function utils.f``), its templates may call anything,
and some data loaders unpickle or start programs. So a file is read as plain YAML here, only keys that are data are
taken, data must be local files in formats that hold no code, and templates run in jinja2's sandbox. With
`trust_remote_code` lmms-eval reads the file itself. Tasks that come with lmms-eval are its own code, installed by the
user, and are not concerned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ..compress.errors import DataError, UsageError, did_you_mean

BUILDERS = ("csv", "json", "parquet")
GENERATES = "generate_until"
KEYS = frozenset(
    ("task", "task_alias", "dataset_path", "dataset_kwargs", "training_split", "validation_split", "test_split",
     "fewshot_split", "num_fewshot", "doc_to_visual", "doc_to_text", "doc_to_target", "doc_to_choice", "description",
     "target_delimiter", "fewshot_delimiter", "output_type", "generation_kwargs", "metric_list", "filter_list",
     "cluster_key", "score_key", "reasoning_tags", "auto_strip_thinking", "metadata")
)  # fmt: skip
TRUST = "--trust-remote-code runs the file's code; do that only with a file that you have read"


def load_task(path: Path, *, trust_remote_code: bool = False) -> Any:
    """lmms-eval's task object of a task file; `doc_to_visual` is the column with pictures, or paths from its folder.

    Raises:
        UsageError: it is no task, names code, or has a key that is not data. DataError: a file of its data is missing.
    """
    from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask

    if trust_remote_code:
        from lmms_eval.utils import load_yaml_config

        config = load_yaml_config(str(path), mode="full")
    else:
        config = read_task(path)
        _check_metrics(config, path)
        _sandbox()
        config["dataset_kwargs"] = {"data_files": _local(config["dataset_kwargs"]["data_files"], path)}
    column = config.get("doc_to_visual")
    if isinstance(column, str):
        config["process_docs"] = _pictures(column, path)
        config["doc_to_visual"] = _shown(column)
    kind = ConfigurableMessagesTask if config.get("output_type", GENERATES) == GENERATES else ConfigurableTask
    # local files: nothing is gained by trying five times
    local = type(kind.__name__, (kind,), {"download": ConfigurableTask.download.__wrapped__})
    return local(config=config, model_name="svlm")


def read_task(path: Path) -> dict[str, Any]:
    """The file as plain data.

    Raises:
        UsageError: see `load_task`.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read the task file", where=str(path), found=str(error)) from error
    except ConstructorError as error:
        raise UsageError(
            "the task file names Python code, which svlm does not run",
            where=f"{path}, line {error.problem_mark.line + 1 if error.problem_mark else '?'}",
            found=(error.problem or "").removeprefix("could not determine a constructor for the "),
            change=f"column names and templates do without code (docs/lmms-eval.md); {TRUST}",
        ) from error
    except yaml.YAMLError as error:
        raise UsageError("the task file is no YAML", where=str(path), found=str(error)) from error
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise UsageError("not a task: it has no `task: NAME`", where=str(path), change="see docs/lmms-eval.md")
    for key in config:
        if key not in KEYS:
            raise UsageError(
                f"key '{key}' is not taken from a task file without trust",
                where=str(path),
                change=f"{did_you_mean(str(key), KEYS)}. {TRUST}",
            )
    if not re.fullmatch(r"[\w.-]+", config["task"]):
        raise UsageError("a task's name is letters, digits and ._-", where=str(path), found=config["task"])
    kwargs = config.get("dataset_kwargs")
    if config.get("dataset_path") not in BUILDERS or not isinstance(kwargs, dict) or set(kwargs) != {"data_files"}:
        raise UsageError(
            "a task file's data has to be local files",
            where=str(path),
            found=f"dataset_path: {config.get('dataset_path')}, dataset_kwargs: {kwargs}",
            change=f"dataset_path: one of {', '.join(BUILDERS)}; dataset_kwargs: {{data_files: FILE}}. {TRUST}",
        )
    return config


def _check_metrics(config: Mapping[str, Any], path: Path) -> None:
    """Metrics are those of lmms-eval by name: nothing is looked up elsewhere."""
    from lmms_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY

    for entry in config.get("metric_list") or []:
        for key, known in (("metric", METRIC_REGISTRY), ("aggregation", AGGREGATION_REGISTRY)):
            name = entry.get(key) if isinstance(entry, dict) else None
            if name not in known and not (key == "aggregation" and name is None):
                raise UsageError(f"no {key} '{name}'", where=str(path), change=did_you_mean(str(name), known))


def _sandbox() -> None:
    """Templates of this process can read what they are given and nothing else."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lmms_eval import utils

    if isinstance(utils.env, ImmutableSandboxedEnvironment):
        return
    safe = ImmutableSandboxedEnvironment(loader=utils.env.loader, undefined=utils.env.undefined)
    safe.filters["regex_replace"] = utils.regex_replace
    utils.env = safe


def _local(files: Any, path: Path) -> Any:
    """Data files as absolute paths."""
    if isinstance(files, dict):
        return {split: _local(some, path) for split, some in files.items()}
    if isinstance(files, list):
        return [_local(file, path) for file in files]
    found = path.resolve().parent / str(files)
    if not found.is_file():
        raise DataError("no such data file", where=str(path), found=str(files), change="paths start at its folder")
    return str(found)


def _pictures(column: str, path: Path) -> Callable[[Any], Any]:
    """Paths of pictures in `column` become pictures that are opened when they are shown."""
    folder = path.resolve().parent

    def prepared(docs: Any) -> Any:
        import datasets

        if column not in docs.features:
            raise DataError(
                f"no column '{column}' for doc_to_visual",
                where=str(path),
                found=", ".join(docs.features),
                change="name the column with the pictures",
            )
        if docs.features[column] != datasets.Value("string"):
            return docs
        files = [str(folder / name) for name in docs[column]]
        missing = next((name for name in files if not Path(name).is_file()), None)
        if missing is not None:
            raise DataError("no such picture", where=str(path), found=missing, change="paths start at its folder")
        return docs.remove_columns(column).add_column(column, files).cast_column(column, datasets.Image())

    return prepared


def _shown(column: str) -> Callable[[Mapping[str, Any]], list[Any]]:
    def pictures(doc: Mapping[str, Any]) -> list[Any]:
        value = doc[column]
        if value is None:
            return []
        return list(value) if isinstance(value, list | tuple) else [value]

    return pictures
