"""Models on disk: load an original, save a stage, load what was saved. safetensors and JSON only; nothing is unpickled.

A saved folder is a Hugging Face model directory (weights, config, processor) plus `svlm.json`, the ledger: every pass,
its settings, and which linears are packed on which grid. Folders appear whole or not at all (`disk.whole_folder`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .anatomy import ModelView, view_of
from .base import Json, Pass
from .disk import read_json, whole_folder
from .errors import ModelError
from .export import bnb
from .export.compressed_tensors import PLAIN_FILE, packed_state, plain_grids, quantization_config, unpack_state
from .families import Family
from .ledger import SCHEMA, Ledger, Record
from .mapped import hand_back, map_weights, on_meta, read_mapped, release, slabs, worth_mapping
from .runtime.codebook import codebooks, integer_grids
from .uneven import adopt, fill

DEMO = Path(__file__).resolve().parent.parent / "calib" / "demo" / "model"
LEDGER_FILE = "svlm.json"
SAVED_KEYS = {"schema", "source", "storage_dtype", "ledger", "grids"}
Finder = Callable[[str], type[Pass]]


# ------------------------------------------------------------------------------------------------------------- loading


def resolve(spec: str | Path) -> str:
    """`demo` as its folder; anything else as it is."""
    return str(DEMO) if str(spec) == "demo" else str(spec)


def folder_of(spec: str | Path) -> Path | None:
    """Where the files of a model lie on this disk: a folder's own, a hub id's in the cache; nothing is fetched."""
    path = Path(resolve(spec))
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(spec), "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def load_model(
    spec: str | Path,
    *,
    find: Finder | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    rows: Sequence[Family] = (),
    lazy: bool | None = None,
) -> ModelView:
    """Load an original model, or one that svlm saved, and find its anatomy.

    Args:
        spec: `demo`, a directory, or a hub id.
        find: the menu of passes, needed where `svlm.json` says that passes were applied.
        dtype: of the weights in memory; `ModelView.storage_dtype` keeps what they had on disk.
        rows: anatomy rows of the user, tried before those that ship.
        lazy: keep the weights in a file that is read in piece by piece (`mapped`); None: where they would take more
            than a quarter of the memory that is free.

    Raises:
        ModelError: no such model, a missing shard, missing or non-finite weights, an unknown family.
    """
    path = resolve(spec)
    _quiet()
    if (Path(path) / LEDGER_FILE).is_file():
        return _load_saved(Path(path), find, dtype, trust_remote_code, rows, lazy)
    model, storage = _from_pretrained(path, dtype, trust_remote_code, lazy)
    view = view_of(model, _processor(path, trust_remote_code), source=str(spec), rows=rows)
    view.storage_dtype = storage
    round_to_storage(view)  # a checkpoint may be finer than its config says
    check_finite(view, str(spec))
    hand_back()  # what lay in memory on its way into a mapped file
    return view


def _from_pretrained(
    path: str, dtype: torch.dtype, trust_remote_code: bool, lazy: bool | None
) -> tuple[Any, torch.dtype]:
    from transformers import AutoConfig, AutoModelForImageTextToText

    local = Path(path)
    if not local.is_dir() and (local.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ModelError(f"no model folder at '{path}'", change="give 'demo', a Hugging Face model folder, or a hub id")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(
                "the checkpoint is quantized already", where=path, change="give the original in 16 or 32 bits"
            )
        storage = _stored_dtype(path, config, dtype)
        lazy = worth_mapping(weight_bytes(local) // storage.itemsize) if lazy is None else lazy
        if lazy and (whole := _read_lazily(local, config, dtype, trust_remote_code)) is not None:
            return whole.eval(), storage
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds: OSError, ValueError, KeyError, SafetensorError
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        change = "the folder needs config.json and every *.safetensors shard that its index names"
        if "configuration class" in first:
            change = "give a vision-language model that AutoModelForImageTextToText of transformers loads"
        raise ModelError(
            f"cannot load the model '{path}'", found=f"{type(error).__name__}: {first}", change=change
        ) from error
    lost = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if lost:
        raise ModelError(
            "the checkpoint lacks weights",
            where=path,
            found=f"{len(lost)} missing, first: {lost[0]}",
            change="fetch the missing shard",
        )
    if lazy:
        map_weights(model)
    return model.eval(), storage


def _read_lazily(local: Path, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model filled from the folder's files one by one; None where their names are not the model's own."""
    from transformers import AutoModelForImageTextToText

    with on_meta():
        bare = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    files = sorted(local.glob("*.safetensors")) if local.is_dir() else []
    return bare if files and read_mapped(bare, files, dtype) else None


def _stored_dtype(path: str, config: Any, fallback: torch.dtype) -> torch.dtype:
    value = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(value, str):
        value = getattr(torch, value, None)
    return value if isinstance(value, torch.dtype) and value.is_floating_point else fallback


def _processor(path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError):
        return None  # a folder with weights alone can be inspected; whoever needs the processor says so


def _load_saved(
    path: Path,
    find: Finder | None,
    dtype: torch.dtype,
    trust_remote_code: bool,
    rows: Sequence[Family],
    lazy: bool | None,
) -> ModelView:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    saved = read_json(path / LEDGER_FILE)
    lacking = SAVED_KEYS - set(saved if isinstance(saved, dict) else ())
    if lacking or not isinstance(getattr(torch, str(saved["storage_dtype"]), None), torch.dtype):
        found = f"without {', '.join(sorted(lacking))}" if lacking else f"storage_dtype {saved['storage_dtype']!r}"
        raise ModelError("svlm.json is damaged", where=str(path), found=found, change="run svlm compress again")
    if saved["schema"] != SCHEMA:
        raise ModelError(f"svlm.json has schema {saved.get('schema')}, this svlm reads {SCHEMA}", where=str(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ModelError("no weights in the folder", where=str(path), found="no *.safetensors")
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            tensors |= load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError("cannot read the saved model", where=str(path), found=str(error)) from error
    packing = getattr(config, "quantization_config", None)
    if packing is not None:
        del config.quantization_config
    storage = getattr(torch, saved["storage_dtype"])
    names = {row["saved"]: module for module, row in saved["grids"].items()}
    coded, plain = ({r["saved"]: r for r in saved["grids"].values() if ("levels" in r) is c} for c in (True, False))
    state, grids = unpack_state(tensors, plain)
    state, books = bnb.unpack_codebooks(state, coded)
    ledger = Ledger.from_json(saved["ledger"])
    blank = AutoModelForImageTextToText.from_config(config)
    model, info = type(blank).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=ledger.uneven,
    )
    wrong = adopt(model, state, info) if ledger.uneven else sorted(str(k) for k in info["mismatched_keys"])
    lost = sorted(info["missing_keys"]) + wrong
    if lost:
        raise ModelError(
            "the saved model lacks weights", where=str(path), found=f"{len(lost)} missing, first: {lost[0]}"
        )
    bare = dict(model.named_modules())
    added = [name for name in info["unexpected_keys"] if name.rpartition(".")[0] not in bare]
    own = [Family.from_json(saved["family"])] if saved.get("family") else []
    view = view_of(model.eval(), _processor(str(path), trust_remote_code), source=saved["source"], rows=[*rows, *own])
    view.storage_dtype = storage
    view.ledger = ledger
    view.grids |= {names[saved_name]: grid for saved_name, grid in grids.items()}
    view.grids |= {names[saved_name]: book for saved_name, book in books.items()}
    rebuild(view, view.ledger, find)
    if added:
        fill(model, state, added)
        view.refresh()
    if worth_mapping(sum(p.numel() for p in model.parameters())) if lazy is None else lazy:
        map_weights(view.model)
    check_finite(view, str(path))
    return view


def rebuild(view: ModelView, records: Iterable[Record], find: Finder | None) -> None:
    """Replay every pass's `rebuild` on a model that was built from the saved config."""
    for entry in records:
        if find is None:
            raise ModelError("this model was changed by passes; load it with svlm.load", where=str(view.source))
        find(entry.name).from_settings(entry.settings).rebuild(view, entry.record)


def check_finite(view: ModelView, where: str) -> None:
    """Raise ModelError naming the first weight that holds NaN or infinity."""
    for name, tensor in view.model.state_dict().items():
        if tensor.is_floating_point() and not _finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                "a weight is not finite",
                where=f"{where}: {name}",
                found=f"{bad} of {tensor.numel()} values are NaN or infinite",
                change="fetch the checkpoint again, or repair this tensor",
            )


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are; NaN and infinities show in the extremes, which take no memory beside the tensor."""
    return all(bool(extreme.isfinite()) for part in slabs(tensor) for extreme in torch.aminmax(part))


# -------------------------------------------------------------------------------------------------------------- saving


def round_to_storage(view: ModelView) -> None:
    """Round all floating weights to the dtype that they are saved in, so that what is measured is what is saved."""
    with torch.no_grad():
        for tensor in view.model.state_dict().values():
            if tensor.is_floating_point() and tensor.dtype != view.storage_dtype:
                for part in slabs(tensor):
                    rounded = part.to(view.storage_dtype).to(part.dtype)
                    if not torch.equal(rounded, part):  # what is not written stays as it is in a mapped file
                        part.copy_(rounded)


def save(view: ModelView, folder: str | Path) -> int:
    """Save `view` as a Hugging Face folder plus ledger, whole or not at all. Returns the bytes of its weight files.

    What lies on a grid is stored packed (compressed-tensors; on a codebook: bitsandbytes), all other floating tensors
    in `storage_dtype`.
    """
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    _quiet()
    with whole_folder(Path(folder)) as temporary:
        state = cast_state(view)
        saved_names = {path: _saved_name(revert_weight_conversion, view.model, path) for path in view.grids}
        integer, books = integer_grids(view.grids), codebooks(view.grids)
        packing = quantization_config(view, saved_names) if integer else bnb.config_of(view, books) if books else None
        write_checkpoint(view, temporary, bnb.packed_codebooks(view, packed_state(view, state)), packing)
        grids: dict[str, dict[str, Json]] = {
            path: {"saved": saved_names[path], "bits": g.bits, "group": g.group, "symmetric": g.symmetric}
            for path, g in integer.items()
        }
        grids |= {path: {"saved": saved_names[path], "bits": b.bits, "levels": b.levels} for path, b in books.items()}
        for path in view.activations.keys() & grids.keys():
            grids[path]["int"] = True
        if plain := plain_grids(view, saved_names):
            save_file(plain, temporary / PLAIN_FILE)
            for path in integer:
                row = grids[path]
                row["plain"] = f"{row['saved']}.weight_scale" in plain
        ledger = {
            "schema": SCHEMA,
            "svlm": __version__,
            "source": str(view.source),
            "storage_dtype": str(view.storage_dtype).removeprefix("torch."),
            "family": view.family.to_json() if view.family.own else None,
            "ledger": view.ledger.to_json(),
            "grids": grids,
        }
        (temporary / LEDGER_FILE).write_text(json.dumps(ledger, indent=1) + "\n", encoding="utf-8")
        return weight_bytes(temporary)


def write_checkpoint(
    view: ModelView, folder: Path, state: dict[str, torch.Tensor], packing: dict[str, Json] | None
) -> None:
    """Write `state`, the config with `packing` as its `quantization_config`, and the processor into `folder`."""
    config = view.model.config
    dtypes = _set_dtype(config, view.storage_dtype)
    try:
        if packing is not None:
            config.quantization_config = packing
        view.model.save_pretrained(folder, state_dict=state)
    finally:
        if packing is not None:
            del config.quantization_config
        for part, value in dtypes:
            part.dtype = value
    if view.processor is not None:
        view.processor.save_pretrained(folder)


def cast_state(view: ModelView) -> dict[str, torch.Tensor]:
    """The state dict in the dtype that is saved; tensors that share memory go on sharing it, so that ties are found."""
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state = {}
    for name, tensor in view.model.state_dict().items():
        dtype = view.storage_dtype if tensor.is_floating_point() else tensor.dtype
        key = (tensor.data_ptr(), tensor.shape)
        if key not in cast or tensor.numel() == 0:
            cast[key] = tensor.detach().to(dtype)
            release(tensor)
        state[name] = cast[key]
    return state


def _saved_name(revert: Callable[..., dict[str, Any]], model: Any, path: str) -> str:
    """The name that transformers gives the module in a checkpoint (the LLaVA family keeps its old key names)."""
    (name,) = revert(model, {f"{path}.weight": torch.zeros(1)})
    return name.removesuffix(".weight")


def _set_dtype(config: Any, dtype: torch.dtype) -> list[tuple[Any, Any]]:
    parts = [config, *(getattr(config, key) for key in config.sub_configs if getattr(config, key, None) is not None)]
    before = [(part, part.dtype) for part in parts]
    for part in parts:
        part.dtype = dtype
    return before


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a saved model."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


# --------------------------------------------------------------------------------------------------------- small tools


def fingerprint(view: ModelView) -> str:
    """sha256 over config, ledger, and names, dtypes, shapes and bytes of all weights: changes with any of them.

    Where the model was loaded from, and by which version of transformers, does not count.
    """
    told = [_without(view.model.config.to_dict(), {"_name_or_path", "transformers_version"}), view.ledger.to_json()]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in sorted(view.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        release(tensor)
    return digest.hexdigest()


def _without(value: Any, keys: set[str]) -> Any:
    """`value` without these keys, at any depth."""
    if isinstance(value, dict):
        return {str(k): _without(v, keys) for k, v in value.items() if k not in keys}
    return value


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
