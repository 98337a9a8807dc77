"""Preflight: what can be known to fail is found before hours are spent.

Disk and memory are compared with what the run will need, and the whole recipe is rehearsed on two samples with a copy
of the model that has two blocks a stack: every pass's `requires` and `apply`, save, reload, compare.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from .anatomy import ModelView, view_of
from .errors import RecipeError, SvlmError, WorkFailed
from .pipeline import apply_pass
from .recipe import Recipe
from .storage import Finder, load_model, round_to_storage, save

if TYPE_CHECKING:
    from .pipeline import Bench

REHEARSAL_BLOCKS = 2
DEPTH_KEYS = ("num_hidden_layers", "depth", "encoder_layers", "decoder_layers", "num_layers")


def preflight(
    recipe: Recipe, original: ModelView, bench: Bench, out: Path, find: Finder, options: Mapping[str, Any]
) -> None:
    """Raise what would go wrong later.

    Raises:
        Unmet, SelectorError: a pass cannot do its work on this model.
        RecipeError: a gate that asks for more evidence than the check split can hold.
        WorkFailed: too little disk or memory.
    """
    check_evidence(recipe, bench.info["check"])
    check_room(recipe, original, out)
    rehearse(recipe, original, bench, find, options)


def check_evidence(recipe: Recipe, check: int) -> None:
    """A gate of which `check` questions prove nothing stops a run before it begins, unless it is to be ignored."""
    for index, step in enumerate(recipe.steps, start=1):
        if step.gate and step.gate.on_fail != "keep" and step.gate.hopeless(check):
            raise RecipeError(
                "the check split is too small for the confidence that a gate asks for",
                where=f"step {index} ({step.step.name})",
                found=step.gate.foresees(check) or "",
                change="more check questions, a wider gate, or no confidence",
            )


def foreseen(recipe: Recipe, check: int) -> list[str]:
    """What `check` questions will not suffice for, gate by gate, in words; the same of several steps once."""
    told: dict[str, list[str]] = {}
    for index, step in enumerate(recipe.steps, start=1):
        if step.gate and (says := step.gate.foresees(check)):
            told.setdefault(says, []).append(f"{index} ({step.step.name})")
    return [f"careful: gate of step {', '.join(steps)}: {says}" for says, steps in told.items()]


def check_room(recipe: Recipe, original: ModelView, out: Path) -> None:
    """Disk for every stage and memory for three copies of the model (original, student, one in transit)."""
    weights = sum(p.numel() for p in original.model.parameters())
    stored = weights * original.storage_dtype.itemsize
    need = stored * (len(recipe.steps) + 3)
    free = shutil.disk_usage(out).free
    if free < need:
        raise WorkFailed(
            "the disk is too full for this run",
            where=str(out),
            found=f"{free / 1e6:.0f} MB free, about {need / 1e6:.0f} MB needed for {len(recipe.steps) + 1} stages",
            change="free some space or choose another --output",
        )
    memory, want = psutil.virtual_memory().available, 2 * weights * 4
    if memory < want:
        raise WorkFailed(
            "too little memory for this run",
            found=f"{memory / 1e9:.1f} GB free, about {want / 1e9:.1f} GB needed",
            change="close other programs",
        )


def rehearse(recipe: Recipe, original: ModelView, bench: Bench, find: Finder, options: Mapping[str, Any]) -> None:
    """Run every pass with the least work on two samples of a shrunken copy, save it, load it back, compare.

    Raises:
        UsageError: a pass's `requires` does not hold, or its selector matches nothing.
        WorkFailed: a pass, the saving or the loading fails.
    """
    view = _copy(original) if needs_all_blocks(recipe) else shrunken(original, bench)
    teacher = _copy(view)
    for index, step in enumerate(recipe.steps, start=1):
        where = f"step {index} ({step.step.name}), rehearsed on two samples"
        try:
            apply_pass(step.step.brief(), view, bench.rehearsal(view, teacher), where=where)
        except SvlmError:
            raise
        except Exception as error:
            raise WorkFailed(
                f"{step.step.name} fails", where=where, found=f"{type(error).__name__}: {error}"
            ) from error
    before = bench.probe(view)["logits"]
    with tempfile.TemporaryDirectory(prefix="svlm-rehearsal-") as folder:
        save(view, Path(folder) / "model")
        after = bench.probe(load_model(Path(folder) / "model", find=find, **options))["logits"]
    if before.shape != after.shape or not torch.allclose(before, after, rtol=1e-3, atol=1e-3):
        raise WorkFailed("the rehearsed model does not load back equal", where="rehearsal on a shrunken copy")


def needs_all_blocks(recipe: Recipe) -> bool:
    """Whether two blocks a stack would not do: a pass takes blocks out, or a selector names some by number or path."""
    text = str(recipe.to_json())
    return (
        "blocks[" in text
        or "*" in text
        or any(step.step.removes_blocks or step.step.names_blocks for step in recipe.steps)
    )


def shrunken(original: ModelView, bench: Bench) -> ModelView:
    """The original's architecture with at most two blocks a stack and random weights.

    Where the config does not allow that (its lists name blocks by number, say), a copy of the original itself.
    """
    config = copy.deepcopy(original.model.config)
    for part in [config, *(getattr(config, key, None) for key in config.sub_configs)]:
        _shrink(part)
    try:
        torch.manual_seed(0)
        model = type(original.model)(config).float().eval()
        view = view_of(model, original.processor, source=original.source, rows=[original.family])
        view.storage_dtype, view.vocabulary, view.sight = original.storage_dtype, original.vocabulary, original.sight
        round_to_storage(view)
        bench.probe(view)
    except Exception:  # any config may refuse in its own way; the copy is slower, not wrong
        return _copy(original)
    return view


def _shrink(config: Any) -> None:
    if config is None:
        return
    values = config.to_dict()
    for key in DEPTH_KEYS:
        depth = values.get(key)
        if type(depth) is not int or depth <= REHEARSAL_BLOCKS:
            continue
        for other, value in values.items():
            if isinstance(value, list) and len(value) == depth:
                setattr(config, other, value[:REHEARSAL_BLOCKS])
        setattr(config, key, REHEARSAL_BLOCKS)


def _copy(original: ModelView) -> ModelView:
    view = view_of(copy.deepcopy(original.model), original.processor, source=original.source, rows=[original.family])
    view.storage_dtype, view.vocabulary, view.sight = original.storage_dtype, original.vocabulary, original.sight
    return view
