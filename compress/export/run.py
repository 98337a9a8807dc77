"""`svlm export`: a saved model in another project's format, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__, disk, storage
from ..anatomy import ModelView
from ..base import Json
from ..errors import OutputError, UsageError
from ..families import Family
from ..runtime import layered
from ..runtime.codebook import codebooks
from ..runtime.kv_cache import installed as kv_form
from ..runtime.merge import installed as merging
from ..runtime.reduce import installed
from . import awq, bnb, gptq
from .compressed_tensors import stock_obstacle
from .table import find_format

NOTE_FILE = "svlm-export.json"
PACKERS: dict[str, Callable[..., Any]] = {"gptq": gptq.pack_model, "awq": awq.pack_model, "bnb": bnb.pack_model}


def export_model(
    spec: str | Path,
    name: str,
    folder: str | Path,
    *,
    find: storage.Finder,
    dense: bool = False,
    rows: Sequence[Family] = (),
    trust_remote_code: bool = False,
) -> dict[str, Json]:
    """Write the model `spec` to `folder` in format `name`.

    Args:
        find: the menu of passes, which loading needs.
        dense: write linears that the format cannot hold unpacked, with the same values, instead of refusing.

    Returns:
        `format`, `loader`, `bytes` of the weight files, `packed` (linears), `dense` (path -> reason), `notes`
        (sentences). Also in `folder/svlm-export.json`.

    Raises:
        UsageError: no such format, or it cannot express the model. OutputError: `folder` holds something.
    """
    row, target = find_format(name), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError("the folder for the export holds something", where=str(target), change="give a new folder")
    view = storage.load_model(spec, find=find, rows=rows, trust_remote_code=trust_remote_code)
    if view.ledger.uneven:
        raise UsageError(
            "no other loader can build this model: its blocks differ in shape, which no config says",
            where=str(spec),
            change="prune with allocation: uniform, or load it with svlm.load",
        )
    added = [unit.name for unit in view.units if unit.added]
    if added:
        raise UsageError(
            "no other loader can build this model: a pass gave it parts that no config says",
            where=str(spec),
            found=", ".join(added),
            change="load it with svlm.load",
        )
    facts: dict[str, Json] = {"svlm": __version__, "format": name, "source": str(spec), "loader": row.loader}
    with disk.whole_folder(target) as temporary:
        facts |= _write(view, Path(storage.resolve(spec)), row.module, name, temporary, dense)
        reduction = installed(view.model)
        if reduction is not None:
            facts["notes"].append(
                f"{reduction.label['pass']} is carried out by svlm.load alone: other loaders see all visual tokens"
            )
        if merging(view.model):
            facts["notes"].append("tokens.merge is carried out by svlm.load alone: other loaders merge no tokens")
        if layered.installed(view.model) is not None:
            names = ", ".join(entry.name for entry in view.ledger if "visual_tokens" in entry.record)
            facts["notes"].append(f"{names}: carried out by svlm.load alone; other loaders treat visual tokens as text")
        if kv_form(view.model) is not None:
            facts["notes"].append(
                "quantize.kv_cache is carried out by svlm.load alone: other loaders keep an exact cache"
            )
        facts["bytes"] = storage.weight_bytes(temporary)
        (temporary / NOTE_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _write(view: ModelView, source: Path, module: str, name: str, folder: Path, dense: bool) -> dict[str, Json]:
    """Write weights, config and processor; returns `packed`, `dense` and `notes`."""
    if module == "compressed_tensors":
        return _copy(view, source, folder)
    state, config, left, notes = PACKERS[module](view, storage.cast_state(view), name, dense=dense)
    storage.write_checkpoint(view, folder, state, config)
    return {"packed": len(view.grids) - len(left), "dense": left, "notes": notes}


def _copy(view: ModelView, source: Path, folder: Path) -> dict[str, Json]:
    """What svlm saves is compressed-tensors already: the model's files, without those of the run."""
    if not view.grids:
        raise UsageError(
            "compressed-tensors holds quantized linears, and this model has none",
            where=str(source),
            change="run a recipe with a quantize pass first (svlm compress MODEL -r int4)",
        )
    if books := codebooks(view.grids):
        path, book = next(iter(books.items()))
        raise UsageError(
            "compressed-tensors holds integers with scales",
            where=path,
            found=f"the codebook {book.levels} ({len(books)} of {len(view.grids)} quantized weights)",
            change="--format bnb",
        )
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in ("report.json", "report.html", NOTE_FILE):
            shutil.copy(file, folder)
    notes = ["a copy: svlm saves in this format"]
    if obstacle := stock_obstacle(view):
        notes.append(f"svlm.load reads it, stock transformers does not: {obstacle}")
    return {"packed": len(view.grids), "dense": {}, "notes": notes}
