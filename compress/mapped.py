"""Weights in a file that the system reads in piece by piece: a model needs the memory of a few blocks.

The tensors are ordinary ones, float32 like any other, only that their memory is a mapping of a temporary file. Every
piece of code works on them as ever and computes the same bits; what is changed is changed in the file. Each module
lets go of its pages after its forward, and so does whoever goes through all weights (`release`); what is needed again
comes from the system's file cache, or from the disk where memory is short. The file is in the temporary folder
(TMPDIR), has no name, and is gone with the model or the process. A folder in memory (tmpfs) would save nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .disk import disk_errors
from .errors import OutputError, WorkFailed

PAGE = mmap.ALLOCATIONGRANULARITY
SLAB = 16 << 20  # bytes
SHARE = 0.25  # of the free memory: a model that takes more in float32 is mapped
LARGE = 4 << 20  # bytes: data that takes less stays where it is
SHARE_OF_FILES = 8  # data is put away in at most one in so many of the files that a process may have open

_AWAY: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_PLACES: dict[int, tuple[weakref.ref[mmap.mmap], int, int]] = {}  # address -> mapping, its offset there, bytes


def worth_mapping(parameters: int) -> bool:
    """Whether so many parameters in float32 are more than a quarter of the memory that is free."""
    import psutil

    return 4 * parameters > SHARE * psutil.virtual_memory().available


def map_weights(model: nn.Module) -> None:
    """Move all parameters of `model` into a file of its own; their values stay."""
    parameters = list(model.parameters())
    for parameter, home in zip(parameters, _homes(parameters, parameters), strict=True):
        parameter.data = home
    _let_go_after_use(model)


def read_mapped(model: nn.Module, files: list[Path], dtype: torch.dtype) -> bool:
    """Fill a model that is on ``meta`` from safetensors files, tensor by tensor; False where the names differ.

    Args:
        model: built with its parameters on ``meta``. dtype: of the parameters in memory.
    """
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for path in files:
        with safe_open(str(path), "pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    model.tie_weights()  # type: ignore[operator]
    wanted = dict(model.named_parameters())  # of tied ones the first
    names = set(dict(model.named_parameters(remove_duplicate=False)))
    if set(model.state_dict()) != names or not set(wanted) <= set(where) <= names:
        return False
    for path in set(where.values()):
        with safe_open(str(path), "pt") as file:
            for name in (n for n in wanted if where[n] == path):
                if tuple(file.get_slice(name).get_shape()) != tuple(wanted[name].shape):
                    return False

    def saved(name: str) -> torch.Tensor:
        with safe_open(str(where[name]), "pt") as file:  # opened anew: its pages are let go of
            return file.get_tensor(name)

    shapes = [torch.empty(p.shape, dtype=dtype, device="meta") for p in wanted.values()]
    for name, home in zip(wanted, _homes(shapes, map(saved, wanted)), strict=True):
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        vars(module)["_parameters"][key] = nn.Parameter(home, requires_grad=wanted[name].requires_grad)
    model.tie_weights()  # type: ignore[operator]
    _let_go_after_use(model)
    return not any(p.is_meta for p in model.parameters())


def put_away(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a file; the tensor itself where it is small, on a device, or there is no room for a file.

    The file is shared with processes that are forked from this one.
    """
    return all_away([tensor])[0]


def all_away(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`put_away` of several, in one file."""
    size = sum(tensor.nbytes for tensor in tensors)
    if size < LARGE or any(t.device.type != "cpu" for t in tensors) or len(_AWAY) >= _most_files():
        return list(tensors)
    try:
        homes = _homes(tensors, tensors)
    except (OSError, WorkFailed, OutputError):
        return list(tensors)
    mapping = next(_PLACES[home.data_ptr()][0]() for home in homes if home.numel())
    assert mapping is not None
    _AWAY.add(mapping)
    hand_back()  # what the originals took
    return homes


def _most_files() -> int:
    try:
        from resource import RLIMIT_NOFILE, getrlimit
    except ImportError:  # Windows: the C library's limit
        return 512 // SHARE_OF_FILES
    return getrlimit(RLIMIT_NOFILE)[0] // SHARE_OF_FILES


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is a file's."""
    return tensor.device.type == "cpu" and tensor.data_ptr() in _PLACES


def release(tensor: torch.Tensor) -> None:
    """Let go of the memory of a mapped tensor until it is read again; nothing for any other."""
    mapped = tensor.device.type == "cpu" and sys.platform == "linux"  # elsewhere the system alone decides
    place = _PLACES.get(tensor.data_ptr()) if mapped else None
    if place is not None and (file := place[0]()) is not None:
        file.madvise(mmap.MADV_DONTNEED, place[1], place[2])


def hand_back(least: int = 0) -> None:
    """Give the system what is free: glibc keeps it, in pieces between what is in use, and the process only grows.

    Args:
        least: nothing is done where fewer bytes are free: what is handed back is soon asked for again, page by page.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library does as it likes
        libc = ctypes.CDLL(None)
        if least:
            libc.mallinfo2.restype = _MallInfo
        if not least or libc.mallinfo2().fordblks >= least:
            libc.malloc_trim(0)


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def slabs(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values of a tensor, some megabytes at a time; a mapped one needs no more memory than that.

    Flat parts of it, not copies; the whole tensor where it is not contiguous.
    """
    if not tensor.is_contiguous():
        yield tensor
        return
    flat, step = tensor.detach().view(-1), SLAB // tensor.element_size()
    place = _PLACES.get(tensor.data_ptr()) if sys.platform == "linux" else None
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        yield part
        if place is not None and (file := place[0]()) is not None:
            file.madvise(mmap.MADV_DONTNEED, place[1] + start * tensor.element_size(), part.nbytes)


@contextmanager
def on_meta() -> Iterator[None]:
    """Parameters that are made inside take no memory; buffers do."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def _homes(shapes: Sequence[torch.Tensor], values: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of the shapes and dtypes of `shapes` with these values, in one new file, each from the start of a page.

    The values are written, not copied into the mapping: that would cost a page fault for every 4 kB.
    """
    sizes = [math.ceil(max(t.numel() * t.element_size(), 1) / PAGE) * PAGE for t in shapes]
    offsets = [0, *itertools.accumulate(sizes)]
    room = f"set TMPDIR to a folder with {max(offsets[-1], PAGE) / 1e6:.1f} MB free"
    with disk_errors(Path(tempfile.gettempdir()), room), tempfile.TemporaryFile(buffering=0) as file:
        file.truncate(max(offsets[-1], PAGE))
        if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process
            os.posix_fallocate(file.fileno(), 0, max(offsets[-1], PAGE))
        for tensor, offset, value in zip(shapes, offsets, values, strict=False):
            file.seek(offset)
            for part in slabs(value):
                plain = part.detach().to("cpu", tensor.dtype).contiguous().view(-1).view(torch.uint8)
                left = plain.numpy().data
                while left:
                    left = left[file.write(left) :]
        mapping = mmap.mmap(file.fileno(), 0)
    homes = []
    for tensor, offset, size in zip(shapes, offsets, sizes, strict=False):
        home = torch.empty(0, dtype=tensor.dtype)
        if tensor.numel():
            home = torch.frombuffer(mapping, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
            _PLACES[home.data_ptr()] = (weakref.ref(mapping), offset, size)
        homes.append(home.reshape(tensor.shape))
    addresses = [home.data_ptr() for home in homes]
    weakref.finalize(mapping, _forget, addresses)
    return homes


def _forget(addresses: list[int]) -> None:
    for address in addresses:
        _PLACES.pop(address, None)


def _let_go_after_use(model: nn.Module) -> None:
    for module in model.modules():
        if module._parameters:
            module.register_forward_hook(_released)


def only_lets_go(module: nn.Module, before: int = 0) -> bool:
    """Whether no hook of the module does anything but let go of mapped weights, but for so many before its forward."""
    after = module._forward_hooks.values()
    return len(module._forward_pre_hooks) == before and all(hook is _released for hook in after)


def _released(module: nn.Module, *_: Any) -> None:
    for parameter in module._parameters.values():
        if parameter is not None:
            release(parameter)
