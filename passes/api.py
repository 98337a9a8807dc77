"""The verbs of svlm, with the menu bound: load, compress, verify. The front door and the command line call them."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..calib.dataset import CalibrationSet, fingerprint
from ..calib.workbench import Workbench
from ..compress import __version__, disk, storage
from ..compress.anatomy import ModelView
from ..compress.base import Json, Progress, Silent
from ..compress.errors import OutputError, SvlmError, UsageError, did_you_mean
from ..compress.export import run as _export
from ..compress.families import Family
from ..compress.gate import SCORES, Gate
from ..compress.pipeline import Outcome, Pipeline, logits_tolerance
from ..compress.preflight import preflight
from ..compress.publish import prove_reload, publish, stock_loads
from ..compress.recipe import Recipe
from ..compress.recipe import read_recipe as _read_recipe
from ..compress.report import gallery_rows, write_run
from ..compress.report import read as read_report
from ..compress.report.verified import write_verified
from ..compress.runtime.kernels.measure import cpu_name
from ..compress.stages import RunFolder
from ..recipes import SHIPPED
from . import analyses as more
from . import find

RUNTIMES = ("torch", "openvino")
STOCK_LOGITS = 2e-2  # relative: stock loaders unpack to 16 bits and round in other places


def load_view(
    spec: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    rows: Sequence[Family] = (),
    trust_remote_code: bool = False,
    lazy: bool | None = None,
) -> ModelView:
    """A model with its anatomy: `demo`, a folder (an original's or one that svlm saved), or a hub id.

    `lazy`: weights in a temporary file that is read in piece by piece; None decides by the memory that is free.
    """
    return storage.load_model(spec, find=find, dtype=dtype, rows=rows, trust_remote_code=trust_remote_code, lazy=lazy)


def load(
    spec: str | Path,
    *,
    runtime: str | None = None,
    memory: str = "fast",
    device: str = "cpu",
    threads: int | None = None,
    example: Mapping[str, torch.Tensor] | None = None,
    **options: Any,
) -> Any:
    """The model itself, rebuilt and ready to `generate`; its processor is `AutoProcessor.from_pretrained(spec)`.

    Without `runtime` it is the model that was measured and saved: ordinary modules with dequantized weights, in float32
    unless `dtype` says otherwise, to be trained, changed or saved again. With one it only runs:

    Args:
        runtime: ``torch``: each linear in the fastest form that this machine has for few and for many tokens, measured
            the first time. ``openvino``: all of it in OpenVINO on the CPU, greedy (extra ``[openvino]``). What they
            make is kept under ``spec/.svlm`` where `spec` is a folder that svlm saved, else nowhere.
        memory: of the torch runtime. ``fast``; ``small`` keeps weights in few bits even where that takes longer.
        device: of torch. threads: of openvino; torch's number where not given. example: for openvino, an encoded
            prompt with a picture, where the model has no processor to make one.
        options: of `load_view`.

    Raises:
        UsageError: no such runtime, openvino is not installed, or the model's family cannot run there.
    """
    if runtime is not None and runtime not in RUNTIMES:
        raise UsageError(f"no runtime '{runtime}'", change=did_you_mean(runtime, RUNTIMES))
    if runtime != "openvino":
        view = load_view(spec, **options)
        view.model.to(device)
        if runtime == "torch":
            kernels(view, spec, memory=memory, dtype=options.get("dtype"))
        return view.model
    from ..calib.ask import example_prompt
    from ..compress.runtime.openvino.build import load_openvino, require_openvino

    require_openvino()
    view = load_view(spec, **options)
    kept = _kept(spec)
    return load_openvino(view, example or example_prompt(view), kept and kept / "openvino", threads=threads)


def kernels(
    view: ModelView, spec: str | Path, *, memory: str = "fast", dtype: torch.dtype | None = None
) -> dict[str, Json]:
    """Let `view`, loaded from `spec`, run in the torch runtime; returns what was chosen (see `use_kernels`)."""
    from ..compress.runtime.kernels.use import use_kernels

    kept = _kept(spec)
    return use_kernels(view, kept and kept / "kernels.json", memory=memory, dtype=dtype)


def _kept(spec: str | Path) -> Path | None:
    """Where a runtime keeps what it made of a saved model."""
    return Path(spec) / ".svlm" if (Path(spec) / storage.LEDGER_FILE).is_file() else None


def read_recipe(source: str | Path) -> Recipe:
    """A recipe from a YAML file, or by the name of one that ships (`default`, `int4`, `tokens-half`, `tiny`)."""
    return _read_recipe(source, find, SHIPPED)


@dataclass
class Options:
    """How `compress_model` runs, apart from what it does."""

    resume: bool = False
    overwrite: bool = False
    batch_size: int = 32
    latency: bool = True
    rehearse: bool = True
    keep_stages: bool = False
    rows: tuple[Family, ...] = ()
    trust_remote_code: bool = False
    lazy: bool | None = None
    progress: Progress = field(default_factory=Silent)
    on_stage: Callable[[dict[str, Json]], None] = lambda stage: None


def compress_model(
    model: str | Path | ModelView,
    recipe: Recipe | str | Path,
    data: CalibrationSet | str | Path,
    out: str | Path,
    options: Options | None = None,
) -> dict[str, Json]:
    """Run `recipe` over `model`, judge every pass on `data`'s check split, leave the small model and report in `out`.

    Returns:
        The report (schema 1). Also in `out/report.json`.

    Raises:
        GateFailed, PromiseBroken: `out` holds the last good stage and the report.
        UsageError: nothing was touched.
        WorkFailed: what was finished is kept; run again with `resume`.
    """
    o = options or Options()
    plan = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    c = plan.calibration
    if isinstance(data, CalibrationSet):
        samples = replace(data, score=plan.score or data.score)
    else:
        samples = CalibrationSet.load(data, fit=c.fit, check=c.check, seed=c.seed, score=plan.score)
    original = (
        model
        if isinstance(model, ModelView)
        else load_view(model, rows=o.rows, trust_remote_code=o.trust_remote_code, lazy=o.lazy)
    )
    run = RunFolder(Path(out))
    run.claim(resume=o.resume, overwrite=o.overwrite)
    with run.locked():
        return _run(plan, original, samples, data, run, o)


def _run(
    plan: Recipe,
    original: ModelView,
    samples: CalibrationSet,
    data: CalibrationSet | str | Path,
    run: RunFolder,
    o: Options,
) -> dict[str, Json]:
    bench = Workbench(
        original, samples, cache_dir=run.reference, batch_size=o.batch_size, latency=o.latency, progress=o.progress
    )
    load_options = {"rows": o.rows, "trust_remote_code": o.trust_remote_code, "lazy": o.lazy}
    try:
        if o.rehearse and not o.resume:
            preflight(plan, original, bench, run.out, find, load_options)
    except BaseException:
        run.abandon()
        raise
    if o.overwrite and not o.resume:
        run.clear()
    pipeline = Pipeline(plan, find, o.progress, o.on_stage, load_options)
    outcome = pipeline.run(original, bench, run)
    report = _finish(outcome, original, bench, run, data, o)
    if outcome.error is not None:
        raise outcome.error
    return report


def _finish(
    outcome: Outcome, original: ModelView, bench: Workbench, run: RunFolder, data: Any, o: Options
) -> dict[str, Json]:
    publish(outcome.model, run)
    report = outcome.report
    report["model"] = {
        "source": str(original.source),
        "family": original.family.name,
        "parameters": report["stages"][0]["cost"]["parameters"],
        "bytes": report["stages"][0]["cost"]["bytes"],
        "fingerprint": storage.fingerprint(original),
    }
    report["data"] = report["data"] | {"source": str(data) if not isinstance(data, CalibrationSet) else data.name}
    report["data"]["answers_from_original"] = bench.judge.answers_from_original
    report["environment"] = environment()
    report["error"] = (
        None if outcome.error is None else {"kind": type(outcome.error).__name__, "message": str(outcome.error)}
    )
    start = time.perf_counter()
    report["reload"] = prove_reload(
        run.out, outcome.model.parent / "probe.safetensors", {"threads": torch.get_num_threads()}
    )
    report["analysis"] = {"alignment": _aligned(run.out, bench, o)}
    report["seconds_finishing"] = round(time.perf_counter() - start, 3)
    index, answers = _last_good(outcome)
    questions = fingerprint((), bench.data.check)
    gallery = gallery_rows(bench.data.check, outcome.items[0], answers)
    kept = {"questions": questions, "stage": index, "items": answers}
    write_run(run.out, report, gallery, kept, storage.folder_of(str(original.source)))
    if not o.keep_stages:
        run.tidy()
    return report


def _aligned(out: Path, bench: Workbench, o: Options) -> dict[str, Json]:
    """Alignment of the result; where it cannot be measured, `says` why. A finished run does not fail for it."""
    try:
        view = load_view(out, rows=o.rows, trust_remote_code=o.trust_remote_code, lazy=o.lazy)
        return bench.alignment(view, o.progress)
    except SvlmError as error:
        return {"blocks": [], "says": [str(error)]}


def _last_good(outcome: Outcome) -> tuple[int, list[dict[str, Json]]]:
    """The number of the stage that OUT holds, and its answers."""
    good = [
        (stage["index"], items)
        for stage, items in zip(outcome.report["stages"], outcome.items)
        if stage["verdict"] not in ("failed", "skipped")
    ]
    return good[-1]


def verify(
    out: str | Path,
    against: str | Path,
    data: str | Path,
    *,
    gate: Gate | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
    fit: int | None = None,
    check: int | None = None,
    seed: int | None = None,
    score: str | None = None,
    rows: Sequence[Family] = (),
    analyses: Sequence[str] = (),
    folder: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Json]:
    """The paired comparison of a saved model with its original, from disk, on the check split that the run used.

    Counts, seed and score default to those of the run that made `out`, so that the figures are the report's; a gate on
    a score asks for that one.

    Args:
        analyses: names in `passes.analyses`; what they find is under ``analysis``, by name.
        folder: where verify.json and verify.html go, if anywhere.
    """
    more.check(analyses)
    made = read_report(out) if (Path(out) / "report.json").is_file() else {}
    c = made.get("recipe", {}).get("calibration", {})
    pick: dict[str, Any] = {
        "fit": fit or c.get("fit", 256),
        "check": check or c.get("check", 512),
        "seed": c.get("seed", 0) if seed is None else seed,
        "score": score or (gate.metric if gate and gate.metric in SCORES else made.get("data", {}).get("score")),
    }
    if not Path(storage.resolve(out)).is_dir():
        raise OutputError("no such folder", where=str(out), change="give the OUT of an earlier 'svlm compress'")
    if folder is not None:
        disk.make_folder(folder)  # before the work
    samples = CalibrationSet.load(data, **pick)
    original, small = (load_view(spec, rows=rows, trust_remote_code=trust_remote_code) for spec in (against, out))
    bench = Workbench(original, samples, batch_size=batch_size, latency=False, progress=progress)
    quality, items = bench.measure(small)
    passed, says = gate.judge(quality) if gate else (True, "no gate")
    result = {
        "model": str(out),
        "against": str(against),
        "data": bench.info | {"answers_from_original": bench.judge.answers_from_original},
        "quality": quality,
        "gate": gate.to_json() if gate else None,
        "passed": passed,
        "says": says,
        "analysis": more.analyse(analyses, bench, small, data, progress),
    }
    if folder is not None:
        write_verified(folder, result | {"environment": environment()}, gallery_rows(samples.check, None, items))
    return result


def export_model(spec: str | Path, name: str, folder: str | Path, **options: Any) -> dict[str, Json]:
    """Write the model `spec` to `folder` in another project's format; see `compress/export/run.py`."""
    return _export.export_model(spec, name, folder, find=find, **options)


def environment() -> dict[str, Json]:
    """report.json's `environment`."""
    import transformers

    return {
        "svlm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def answer_probe(out: str, probe: str, answer: str) -> None:
    """The fresh process of `prove_reload`: load `out`, repeat the probe, write how far the logits are off."""
    from safetensors.torch import load_file

    view = load_view(out)
    batch = load_file(probe)
    expected = batch.pop("logits")
    with torch.no_grad():
        logits = view.model(**batch).logits.float()
    same = logits.shape == expected.shape
    difference = float((logits - expected).abs().max()) if same else float("inf")
    tolerance = logits_tolerance(view) * max(1.0, float(expected.abs().max()))
    same = same and difference <= tolerance
    parameters, alike = sum(p.numel() for p in view.model.parameters()), STOCK_LOGITS * float(expected.abs().max())
    del view
    stock = stock_loads(out, batch, expected, max(tolerance, alike), parameters)
    disk.write_json(Path(answer), {"same": same, "max_abs_diff": difference, "stock": stock})


__all__ = [
    "Options",
    "SvlmError",
    "answer_probe",
    "compress_model",
    "environment",
    "export_model",
    "kernels",
    "load",
    "load_view",
    "read_recipe",
    "verify",
]
