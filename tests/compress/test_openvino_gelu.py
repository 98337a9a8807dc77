"""GELU's tanh form as its exact form: only where rounding hides the difference; skipped without openvino."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from svlm.compress.runtime.openvino.gelu import APART, STEPS, exact_gelu

ov = pytest.importorskip("openvino")


class Act(nn.Module):
    """GELU, rounded to 256 steps of `step`, by one reader or with another that sees the values."""

    def __init__(self, step: float, form: str = "tanh", bare: bool = False) -> None:
        super().__init__()
        self.step, self.form, self.bare = step, form, bare

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = nn.functional.gelu(x, approximate=self.form)
        rounded = torch.fake_quantize_per_tensor_affine(y, self.step, -120, -128, 127)
        return (rounded, y + 1) if self.bare else (rounded,)


def forms(graph: object) -> list[str]:
    return [n.get_attributes()["approximation_mode"] for n in graph.get_ops() if n.get_type_name() == "Gelu"]


def test_the_two_forms_differ_by_no_more_than_is_said() -> None:
    x = torch.linspace(-10, 10, 2_000_001, dtype=torch.float64)
    apart = (nn.functional.gelu(x) - nn.functional.gelu(x, approximate="tanh")).abs().max()
    assert 0.99 * APART < float(apart) <= APART


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (Act(1.01 * STEPS * APART), "ERF"),
        (Act(0.5 * STEPS * APART), "TANH"),
        (Act(1.01 * STEPS * APART, bare=True), "TANH"),
        (Act(1.01 * STEPS * APART, form="none"), "ERF"),
    ],
)
def test_replaced_where_only_coarse_rounding_reads_it(module: Act, wanted: str) -> None:
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)) * 2
    graph = ov.convert_model(module, example_input=(x,))
    before = forms(graph)
    assert exact_gelu(graph) == int(before == ["TANH"] and wanted == "ERF") and forms(graph) == [wanted]
    found = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())
    off = torch.from_numpy(found[0]) - module(x)[0]
    steps = (off / module.step).round().abs()
    assert steps.max() <= 1 and steps.mean() < 1 / STEPS, "almost all integers are those of the form that was asked for"
