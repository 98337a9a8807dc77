"""The fingerprint of a model: of what it is, not of where it lies; and checkpoints that are finer than their config."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import svlm
from svlm.compress import storage


def test_where_a_model_lies_does_not_count(tmp_path: Path) -> None:
    shutil.copytree(storage.DEMO, tmp_path / "elsewhere")
    moved = svlm.load_view(tmp_path / "elsewhere")
    assert storage.fingerprint(moved) == storage.fingerprint(svlm.load_view("demo"))
    with torch.no_grad():
        moved.linears("language")[0].module.weight[0, 0] += 1
    assert storage.fingerprint(moved) != storage.fingerprint(svlm.load_view("demo"))


def test_what_lives_in_code_counts() -> None:
    plain, half, eighth = (svlm.load_view("demo") for _ in range(3))
    for view, keep in ((half, 0.5), (eighth, 0.125)):
        view.ledger.add(svlm.find("tokens.grid")(keep=keep), {})
    assert len({storage.fingerprint(view) for view in (plain, half, eighth)}) == 3


def test_a_checkpoint_finer_than_its_config_is_rounded_when_it_is_loaded(tmp_path: Path) -> None:
    shutil.copytree(storage.DEMO, tmp_path / "fine")
    tensors = load_file(tmp_path / "fine" / "model.safetensors")
    fine = {k: v.float() * (1 + 1e-3 * torch.randn(v.shape)) for k, v in tensors.items()}
    save_file(fine, tmp_path / "fine" / "model.safetensors", metadata={"format": "pt"})
    view = svlm.load_view(tmp_path / "fine")
    before = storage.fingerprint(view)
    assert view.storage_dtype == torch.bfloat16
    assert all(torch.equal(p, p.to(torch.bfloat16).float()) for p in view.model.parameters())
    storage.round_to_storage(view)
    assert storage.fingerprint(view) == before, "so that a resumed run compares with the same original"
