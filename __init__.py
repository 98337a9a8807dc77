"""svlm turns a full vision-language model into a small one, and verifies it after every step.

The story in one example::

    import svlm

    svlm.compress_model("demo", "default", "demo", "runs/small")   # model, recipe, data, where to
    model = svlm.load("runs/small")                                # rebuilt, ready to generate

By hand::

    view = svlm.load_view("demo")                                  # a model and its anatomy
    data = svlm.CalibrationSet.load("demo", fit=256, check=512)    # disjoint: passes look at fit, check judges
    bench = svlm.Workbench(view, data)                             # measures against this original
    small = svlm.load_view("demo")
    svlm.apply_pass(svlm.find("quantize.gptq")(bits=4, group=64), small, bench.context(small))
    quality, answers = bench.measure(small)
    svlm.save(small, "runs/by-hand")

Rooms, each importing only from those to its right: ``cli -> passes -> calib -> compress``. Names are imported when they
are first used, so that ``import svlm`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .compress import __version__

_NAMES = {
    "CalibrationSet": "calib.dataset",
    "Context": "compress.base",
    "Family": "compress.families",
    "Gate": "compress.gate",
    "ModelView": "compress.anatomy",
    "Notes": "compress.base",
    "Options": "passes.api",
    "Pass": "compress.base",
    "Pipeline": "compress.pipeline",
    "Recipe": "compress.recipe",
    "Sample": "calib.dataset",
    "SvlmError": "compress.errors",
    "Workbench": "calib.workbench",
    "apply_pass": "compress.pipeline",
    "compress_model": "passes.api",
    "export_model": "passes.api",
    "find": "passes",
    "load": "passes.api",
    "load_view": "passes.api",
    "read_recipe": "passes.api",
    "save": "compress.storage",
    "verify": "passes.api",
    "view_of": "compress.anatomy",
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'svlm' has no attribute '{name}'")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
