"""svlm's integers as bytes of OpenVINO constants; needs no openvino."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import svlm
from svlm.compress.anatomy import view_of
from svlm.compress.errors import Unmet, UsageError
from svlm.compress.runtime.grid import dequantize, quantize
from svlm.compress.runtime.openvino.constants import nibbles, pack_constants, unpack_constants
from svlm.compress.runtime.openvino.convert import observe
from svlm.passes.quantize._rtn import absmax_grid
from tests import zoo

KINDS = [(4, 16, True, "i4"), (4, 16, False, "u4"), (3, 16, False, "u4"), (2, -1, True, "i4"), (8, -1, True, "i8")]


def test_nibbles_come_low_half_first() -> None:
    assert nibbles(np.array([1, 2, -1, 7, 5])).tolist() == [0x21, 0x7F, 0x05]


@pytest.mark.parametrize(("bits", "group", "symmetric", "kind"), KINDS)
def test_constants_stand_for_the_weights(bits: int, group: int, symmetric: bool, kind: str) -> None:
    w = torch.randn(33, 48, generator=torch.Generator().manual_seed(0))
    grid = absmax_grid(w, bits, group, symmetric, torch.bfloat16)
    value = dequantize(quantize(w, grid), grid)
    packed = pack_constants(value, grid)
    assert packed.kind == kind and packed.data.nbytes == 33 * 48 // (1 if bits == 8 else 2)
    assert packed.scale.dtype == np.float16, "bfloat16 scales of this size are exact in float16"
    back = torch.from_numpy(unpack_constants(packed))
    assert torch.equal(back.bfloat16().float(), value), "equal once rounded to the dtype that they are stored in"


def test_scales_that_float16_cannot_hold_stay_wide() -> None:
    w = torch.randn(4, 16) * 1e-7
    grid = absmax_grid(w, 4, -1, True, torch.bfloat16)
    packed = pack_constants(dequantize(quantize(w, grid), grid), grid)
    assert packed.scale.dtype == np.float32 and np.array_equal(packed.scale.reshape(-1), grid.scale.float().flatten())


REFUSED = {
    "qwen2-vl": "takes pictures of any size in one row",
    "qwen2.5-vl": "takes pictures of any size in one row",
    "qwen3-vl": "takes pictures of any size in one row",
    "blip-2": "stack of blocks",
    "blip-2-t5": "encoder-decoder",
    "florence-2": "encoder-decoder",
    "trocr": "encoder-decoder",
    "donut": "encoder-decoder",
}


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_family_runs_or_is_refused_by_name(family: str) -> None:
    model, batch = zoo.build(family)
    view = view_of(model)
    if family in REFUSED:
        with pytest.raises(Unmet, match=REFUSED[family]) as caught:
            observe(view, batch)
        assert view.family.name in caught.value.what
        return
    seen = observe(view, batch)
    assert view.tower_path in seen.calls
    assert all(call.used for call in seen.calls.values())
    assert seen.decoder["inputs_embeds"].shape[:2] == batch["input_ids"].shape


def test_no_such_runtime_and_no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="did you mean 'openvino'"):
        svlm.load("demo", runtime="openvin")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"svlm\[openvino\]"):
        svlm.load("demo", runtime="openvino")
