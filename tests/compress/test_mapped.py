"""Weights in a mapped file: the same bits everywhere, and the memory comes back."""

from __future__ import annotations

import copy
import errno
import gc
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import svlm
from svlm.calib.shown import Shown
from svlm.calib.speech import _put_away
from svlm.calib.walk import Walk
from svlm.compress import mapped, storage
from svlm.compress.anatomy import view_of
from svlm.compress.base import Context
from svlm.compress.errors import WorkFailed
from svlm.compress.runtime.kernels.use import use_kernels
from tests import zoo

FAMILIES = ["llava", "smolvlm", "qwen2.5-vl", "gemma3", "internvl", "florence-2", "donut"]


def resident(tensor: torch.Tensor) -> int:
    """Bytes of a mapped tensor that are in this process's memory."""
    start, rows = tensor.data_ptr(), Path("/proc/self/smaps").read_text().splitlines()
    for number, row in enumerate(rows):
        head = row.split()[0]
        if "-" in head and not row.startswith(("Vm", "Rss")):
            low, high = (int(part, 16) for part in head.split("-"))
            if low <= start < high:
                return next(int(r.split()[1]) * 1024 for r in rows[number:] if r.startswith("Rss:"))
    raise AssertionError("not mapped at all")


def saved(family: str, folder: Path) -> Path:
    zoo.model(family).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in zoo.FAMILIES])
def test_a_lazy_model_is_the_eager_one(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path)
    eager, lazy = (svlm.load_view(folder, lazy=flag) for flag in (False, True))
    mine, theirs = dict(lazy.model.named_parameters()), dict(eager.model.named_parameters())
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert all(p.data_ptr() in mapped._PLACES for p in mine.values() if p.numel())
    assert {n: b.dtype for n, b in lazy.model.named_buffers()} == {n: b.dtype for n, b in eager.model.named_buffers()}
    assert all(torch.equal(b, lazy.model.get_buffer(name)) for name, b in eager.model.named_buffers())
    assert storage.fingerprint(lazy) == storage.fingerprint(eager)
    batch = zoo.batch(family, samples=2)
    with torch.no_grad():
        assert torch.equal(lazy.model(**batch).logits, eager.model(**batch).logits)


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
@pytest.mark.parametrize("name", ["quantize.gptq", "quantize.rtn"])
def test_a_pass_on_a_lazy_model_leaves_the_same_bits(family: str, name: str, tmp_path: Path) -> None:
    folder, data = saved(family, tmp_path / "original"), [zoo.batch(family, samples=3)]
    files: list[dict[str, bytes]] = []
    for lazy in (False, True):
        view = svlm.load_view(folder, lazy=lazy)

        def walk(where: Any = None, view: Any = view, **options: Any) -> Walk:
            return Walk(view, data, where, **options)

        svlm.apply_pass(svlm.find(name)(bits=4, group=-1), view, Context(data, walk, nullcontext))
        svlm.save(view, out := tmp_path / f"lazy {lazy}")
        files.append({p.name: p.read_bytes() for p in sorted(out.glob("*.safetensors"))})
        again = svlm.load_view(out, lazy=lazy)
        assert storage.fingerprint(again) == storage.fingerprint(svlm.load_view(out))
    assert files[0] == files[1] and files[0]


def test_large_data_is_put_away_and_comes_back() -> None:
    big, small = torch.randn(3, 1 << 19), torch.randn(8)
    home = mapped.put_away(big)
    assert torch.equal(home, big) and home.data_ptr() != big.data_ptr() and mapped.put_away(small) is small
    assert resident(home) > 0
    mapped.release(home)
    assert resident(home) == 0 and torch.equal(home, big)
    batch = _put_away(Shown({"pixel_values": big, "input_ids": small}, {"pixel_values": big}))
    assert isinstance(batch, Shown) and batch["input_ids"] is small and torch.equal(batch["pixel_values"], big)
    assert batch.original["pixel_values"].data_ptr() in mapped._PLACES


def test_not_every_open_file_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    most = len(mapped._AWAY) + 2
    monkeypatch.setattr(mapped, "_most_files", lambda: most)
    data = [torch.zeros(1 << 20) for _ in range(4)]
    homes = [mapped.put_away(tensor) for tensor in data]
    assert [home is tensor for home, tensor in zip(homes, data)] == [False, False, True, True]
    del homes
    gc.collect()
    assert mapped.put_away(data[0]) is not data[0], "files that nobody needs any more are closed"


def test_a_walk_lets_go_of_pictures() -> None:
    view, batch = view_of(zoo.model("llava")), zoo.batch("llava", samples=2)
    size = batch["pixel_values"].numel()
    (whole,) = mapped._homes([batch["pixel_values"]], [batch["pixel_values"]])
    for _ in Walk(view, [batch | {"pixel_values": whole}], "language.blocks[0]"):
        assert size and resident(whole) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EMFILE])
def test_no_room_costs_data_nothing_and_a_model_says_so(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    data = torch.zeros(1 << 21)
    assert mapped.put_away(data) is data
    if number == errno.ENOSPC:
        with pytest.raises(WorkFailed, match="the disk is full") as told:
            mapped.map_weights(nn.Linear(64, 64))
        assert tempfile.gettempdir() in str(told.value) and "TMPDIR" in str(told.value)


def test_memory_comes_back_after_use_and_changes_stay() -> None:
    model = nn.Sequential(nn.Linear(1024, 2048), nn.Linear(2048, 1024))
    wanted = copy.deepcopy(model)
    mapped.map_weights(model)
    first = model[0].weight
    assert resident(first) == 0
    x = torch.randn(3, 1024)
    with torch.no_grad():
        assert torch.equal(model(x), wanted(x)) and resident(first) == 0
        first.mul_(2)
        wanted[0].weight.mul_(2)
        assert resident(first) >= first.numel() * 4
        mapped.release(first)
        assert resident(first) == 0
        assert torch.equal(model(x), wanted(x))
    address = first.data_ptr()
    twin = copy.deepcopy(model)
    assert twin[0].weight.data_ptr() not in mapped._PLACES and torch.equal(twin(x), model(x))
    del model, first
    gc.collect()
    assert address not in mapped._PLACES


def test_small_models_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not mapped.worth_mapping(4_000_000)
    view = svlm.load_view("demo")
    assert view.model.lm_head.weight.data_ptr() not in mapped._PLACES
    monkeypatch.setattr(mapped, "SHARE", 1e-9)
    view = svlm.load_view("demo")
    assert view.model.lm_head.weight.data_ptr() in mapped._PLACES


def test_the_torch_runtime_takes_linears_of_a_lazily_loaded_model() -> None:
    facts = [use_kernels(storage.load_model("demo", lazy=lazy)) for lazy in (False, True)]
    assert facts[1]["dense"] == facts[0]["dense"]


def test_slabs_are_all_of_a_tensor_in_place_and_the_memory_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "SLAB", mapped.PAGE)
    linear = nn.Linear(1000, 33)
    wanted = linear.weight.detach().clone()
    mapped.map_weights(linear)
    sizes = []
    for part in mapped.slabs(linear.weight):
        part.mul_(2)
        sizes.append(part.nbytes)
    assert len(sizes) == 33 and sum(sizes) == wanted.nbytes and max(sizes) == mapped.PAGE
    assert resident(linear.weight) < wanted.nbytes and torch.equal(linear.weight.data, 2 * wanted)
    turned = wanted.T
    assert [part.shape for part in mapped.slabs(turned)] == [turned.shape]
    assert list(mapped.slabs(torch.zeros(0, 3))) == []
