"""Products of one input as one: the values of each, whatever the kind of grid; skipped without openvino."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from svlm.compress.runtime.grid import Grid, dequantize
from svlm.compress.runtime.openvino.build import _settings
from svlm.compress.runtime.openvino.constants import compress_constants, pack_constants, unpack_constants
from svlm.compress.runtime.openvino.joined import join_packed, join_products

ov = pytest.importorskip("openvino")


class Three(nn.Module):
    """Two products of one input, and one of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(64, 48, bias=False), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = self.a(x), self.b(x)
        return a, b, self.c(a)


def lying(linear: nn.Linear, bits: int, zeros: bool, group: int = 32) -> Grid:
    """A grid that the linear's weight is put on."""
    out, columns = linear.weight.shape
    scale = torch.rand(out, columns // group if group > 0 else 1) * 0.02 + 0.01
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    zero = torch.randint(low, high, scale.shape).to(torch.int8) if zeros else None
    grid = Grid(bits, group, not zeros, scale.bfloat16(), zero)
    linear.weight.data.copy_(dequantize(torch.randint(low, high, (out, columns)).to(torch.int8), grid))
    return grid


@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, False)])
def test_joined_products_have_the_values_of_each(bits: int, zeros: bool) -> None:
    model = Three().eval()
    packed = {
        f"{name}.weight": pack_constants(linear.weight.detach(), lying(linear, bits, zeros))
        for name, linear in model.named_children()
    }
    for name, linear in model.named_children():  # not rounded to a storage dtype, as a graph's are not
        linear.weight.data.copy_(torch.from_numpy(unpack_constants(packed[f"{name}.weight"])))
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        graph, wanted = ov.convert_model(model, example_input=(x,)), model(x)
    joined = join_products(graph, packed)
    assert set(joined) == {"a.weight+b.weight", "c.weight"}
    counts = compress_constants(graph, joined, torch.bfloat16)
    assert sum(counts.integers.values()) == 3 and not counts.missed
    kinds = [node.get_type_name() for node in graph.get_ops()]
    assert kinds.count("MatMul") == 2 and kinds.count("VariadicSplit") == 1
    found = ov.Core().compile_model(graph, "CPU", _settings("", counts, 1, False, None))(x.numpy())
    for number, tensor in enumerate(wanted):
        assert np.allclose(found[number], tensor.numpy(), atol=1e-3)
    whole = np.concatenate([unpack_constants(packed[f"{name}.weight"]) for name in "ab"])
    assert np.array_equal(unpack_constants(join_packed([packed["a.weight"], packed["b.weight"]])), whole)


def test_products_on_grids_that_differ_stay_apart() -> None:
    model = Three().eval()
    packed = {
        "a.weight": pack_constants(model.a.weight.detach(), lying(model.a, 4, False, 32)),
        "b.weight": pack_constants(model.b.weight.detach(), lying(model.b, 4, False, 64)),
    }
    with torch.no_grad():
        graph = ov.convert_model(model, example_input=(torch.randn(1, 5, 64),))
    assert set(join_products(graph, packed)) == set(packed)
