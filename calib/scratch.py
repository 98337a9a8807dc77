"""Finished units of a walk on disk, so that a killed walk goes on where it was.

One safetensors file a unit, there whole or not at all (temporary name, fsync, rename): all tensors of the unit, the
grids of its linears, and as JSON in the header its notes and how its linears round their inputs. A `walk.json` says
which units and which data the files belong to; files of another walk are removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compress.anatomy import ModelView, Unit
from ..compress.base import Json
from ..compress.errors import WorkFailed
from ..compress.runtime.activations import Activation, install, installed, remove


class Scratch:
    """The folder of one walk."""

    def __init__(self, folder: Path, view: ModelView, batches: Sequence[Mapping[str, Any]], units: list[Unit]) -> None:
        from ..compress.disk import write_json

        self.folder, self.view = folder, view
        self.numbers = {unit: i for i, unit in enumerate(units)}
        claim = {"units": [unit.name for unit in units], "batches": fingerprint(batches)}
        head = folder / "walk.json"
        if not head.is_file() or json.loads(head.read_text(encoding="utf-8")) != claim:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(head, claim)

    def _path(self, unit: Unit) -> Path:
        return self.folder / f"{self.numbers[unit]:05d}.safetensors"

    def save(self, unit: Unit, notes: Mapping[str, Json]) -> None:
        """Write what the unit now is."""
        from safetensors.torch import save

        from ..compress.disk import write_whole

        tensors = {f"tensor:{name}": t.detach().cpu().contiguous() for name, t in _tensors(unit.module).items()}
        grids: dict[str, dict[str, Json]] = {}
        for ref in unit.linears:
            grid = self.view.grids.get(ref.path)
            if grid is None:
                continue
            values = {f.name: getattr(grid, f.name) for f in dataclasses.fields(grid)}
            grids[ref.path] = {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}
            tensors |= {
                f"grid:{ref.path}:{k}": v.cpu().contiguous() for k, v in values.items() if isinstance(v, torch.Tensor)
            }
        found = {ref.path: installed(ref.module) for ref in unit.linears}
        rounding = {path: dataclasses.asdict(activation) for path, activation in found.items() if activation}
        try:
            head = json.dumps({"unit": unit.name, "notes": dict(notes), "grids": grids, "activations": rounding})
        except TypeError as error:
            raise WorkFailed("a unit's notes are not JSON", where=unit.name, found=str(error)) from error
        write_whole(self._path(unit), save(tensors, metadata={"svlm": head}))

    def restore(self, unit: Unit) -> dict[str, Json] | None:
        """Make the unit what it was when it was saved; its notes, or None where it was not."""
        from safetensors import safe_open

        from ..compress.runtime.codebook import Codebook
        from ..compress.runtime.grid import Grid

        if not self._path(unit).is_file():
            return None
        with safe_open(str(self._path(unit)), "pt") as file:
            head = json.loads(file.metadata()["svlm"])
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if head["unit"] != unit.name:
            raise WorkFailed("the scratch folder holds another walk", where=str(self._path(unit)), found=head["unit"])
        with torch.no_grad():
            for name, tensor in _tensors(unit.module).items():
                _assign(unit.module, name, tensor, saved[f"tensor:{name}"])
        for ref in unit.linears:
            self.view.grids.pop(ref.path, None)
        for path, values in head["grids"].items():
            parts = {k.rsplit(":", 1)[1]: t for k, t in saved.items() if k.startswith(f"grid:{path}:")}
            self.view.grids[path] = (Codebook if "levels" in values else Grid)(**values, **parts)
        for ref in unit.linears:
            remove(ref.module)
            if ref.path in head["activations"]:
                install(ref.module, Activation(**head["activations"][ref.path]))
        return head["notes"]


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, those that `state_dict` leaves out included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _assign(root: nn.Module, name: str, tensor: torch.Tensor, saved: torch.Tensor) -> None:
    if tensor.shape == saved.shape:
        tensor.copy_(saved)
        return
    tensor.data = saved.to(tensor.device, tensor.dtype)
    owner = root.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.Linear) and name.endswith("weight"):
        owner.out_features, owner.in_features = saved.shape


def fingerprint(batches: Sequence[Mapping[str, Any]]) -> str:
    """Changes with any value of any tensor in the batches."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in batches:
        for key, value in sorted(batch.items()):
            if isinstance(value, torch.Tensor):
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"{key} {value!r}".encode())
    return digest.hexdigest()
