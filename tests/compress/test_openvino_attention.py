"""A tower's graph for whole pictures: the same values, and only where nothing is hidden; skipped without openvino."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from svlm.compress.runtime.openvino.attention import of_whole_pictures
from svlm.compress.runtime.openvino.model import Pictures

ov = pytest.importorskip("openvino")
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


class Attention(nn.Module):
    """Self-attention over [1, tokens, channels] with two heads.

    Its mask is made of which tokens are there (`there`), of these and the values (`mixed`), of nothing (`none`), or it
    lets all see everything (`open`). With `step` what comes out is rounded.
    """

    def __init__(self, kind: str, step: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.kind, self.step, self.causal = kind, step, causal
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        q, k, v = (part(x).view(1, -1, 2, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
        pairs = there[:, None, None, :] & torch.ones_like(there)[:, None, :, None]
        masks: dict[str, Tensor | None] = {
            "there": pairs,
            "none": None,
            "open": torch.zeros(1, 1, x.shape[1], x.shape[1]),
        }
        masks["mixed"] = pairs & (x[:, :, 0] < 99)[:, None, None, :]
        masks["added"] = torch.where(pairs, 0.0, -1e9)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=masks[self.kind], is_causal=self.causal)
        out = out.transpose(1, 2).reshape(1, -1, 16)
        if self.step:
            out = torch.fake_quantize_per_tensor_affine(out, self.step, 0, -128, 127)
        return out + 0.0 * there[:, :, None]


def made(module: nn.Module, tokens: int = 6) -> tuple[Any, Tensor]:
    x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(0))
    graph = ov.convert_model(module, example_input=(x, torch.ones(1, tokens, dtype=torch.bool)))
    graph.reshape({port: ov.PartialShape(shape) for port, shape in zip(graph.inputs, ([1, tokens, 16], [1, tokens]))})
    return graph, x


def attentions(graph: Any) -> int:
    return sum(node.get_type_name() == "ScaledDotProductAttention" for node in graph.get_ops())


@pytest.mark.parametrize("kind", ["there", "added", "none", "open"])
@pytest.mark.parametrize("step", [0.0, 0.01])
def test_whole_pictures_are_answered_without_a_mask_and_others_with_theirs(kind: str, step: float) -> None:
    torch.manual_seed(0)
    module = Attention(kind, step)
    graph, x = made(module)
    whole = of_whole_pictures(graph)
    assert whole is not None and attentions(whole) == 0 and attentions(graph) == 1, "the graph itself stays"
    assert sum(node.get_type_name() == "FakeQuantize" for node in whole.get_ops()) == int(step > 0)
    pictures = Pictures(ov.Core(), graph, FLOAT32)
    for hidden in (0, 2, 0):
        there = torch.ones(1, x.shape[1], dtype=torch.bool)
        there[:, x.shape[1] - hidden :] = False
        with torch.no_grad():
            wanted = module(x, there)
        (found,) = pictures.run(x.numpy(), there.numpy())
        off = (torch.from_numpy(found) - wanted).abs()
        assert off.max() <= (step + 1e-6 if step else 1e-5) and (not step or off.mean() < step / 100)
    assert len(pictures._graphs) == 2


@pytest.mark.parametrize("module", [Attention("mixed"), Attention("none", causal=True), nn.Linear(16, 16)])
def test_what_may_hide_something_stays_as_it_is(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        graph = ov.convert_model(module, example_input=(torch.randn(1, 6, 16),))
        graph.reshape([1, 6, 16])
    else:
        graph, _ = made(module)
    assert of_whole_pictures(graph) is None


def test_a_graph_that_stays_as_it_is_is_compiled_once() -> None:
    module = Attention("mixed")
    graph, x = made(module)
    pictures = Pictures(ov.Core(), graph, FLOAT32)
    assert pictures._graphs[True] is pictures._graphs[False]
    there = np.ones((1, 6), dtype=bool)
    there[0, 4:] = False
    with torch.no_grad():
        wanted = module(x, torch.from_numpy(there))
    torch.testing.assert_close(torch.from_numpy(pictures.run(x.numpy(), there)[0]), wanted, rtol=1e-4, atol=1e-5)


def test_the_second_graph_is_that_of_the_first_whatever_lies_there_later(tmp_path: Path) -> None:
    torch.manual_seed(0)
    modules = [Attention("there"), Attention("there")]
    path = tmp_path / "0.xml"
    graph, x = made(modules[0])
    ov.save_model(graph, str(path), compress_to_fp16=False)
    pictures = Pictures(ov.Core(), str(path), FLOAT32)
    for file in list(tmp_path.iterdir()):
        file.unlink()
    ov.save_model(made(modules[1])[0], str(path), compress_to_fp16=False)
    there = torch.tensor([[True] * 4 + [False] * 2])
    with torch.no_grad():
        wanted = modules[0](x, there)
    torch.testing.assert_close(
        torch.from_numpy(pictures.run(x.numpy(), there.numpy())[0]), wanted, rtol=1e-4, atol=1e-5
    )
