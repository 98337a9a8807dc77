"""Whole models in OpenVINO: the answers and logits of torch. Skipped where openvino is not installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import svlm
from svlm.calib.dataset import CalibrationSet
from svlm.calib.encode import Encoder
from svlm.compress.anatomy import view_of
from svlm.compress.base import Context
from svlm.compress.errors import UsageError
from svlm.compress.runtime.openvino.build import load_openvino
from tests import zoo

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo model in four bits, saved."""
    view = svlm.load_view("demo")
    svlm.apply_pass(svlm.find("quantize.rtn")(bits=4, group=64), view, Context([], lambda *a, **k: None, nullcontext))
    folder = tmp_path_factory.mktemp("openvino") / "out"
    svlm.save(view, folder)
    yield folder


def test_the_demo_model_answers_as_in_torch(four_bits: Path) -> None:
    reference = svlm.load_view(four_bits)
    data = CalibrationSet.load("demo", fit=16, check=16)
    encoder = Encoder(reference.processor)
    prompts, full = encoder.prompts(data.check), encoder.encode(data.check)
    full.pop("labels")
    model = svlm.load(four_bits, runtime="openvino", threads=1)
    assert model.notes["rebuilt"] and (four_bits / ".svlm" / "openvino" / "manifest.json").is_file()
    packed = sum(row["integers"].get("i4", 0) for row in model.notes["constants"].values())
    assert packed == len(reference.grids), "every quantized linear is a constant of four bits"
    assert not any(row["missed"] for row in model.notes["constants"].values())
    with torch.no_grad():
        wanted = reference.model.generate(**prompts, max_new_tokens=8, do_sample=False)
        logits, real = reference.model(**full).logits, full["attention_mask"].bool()
    assert torch.equal(model.generate(**prompts, max_new_tokens=8), wanted)
    found = model(**full).logits
    assert float((found - logits)[real].abs().mean()) < 0.01 * float(logits[real].abs().mean())

    again = svlm.load(four_bits, runtime="openvino", threads=1)
    assert not again.notes["rebuilt"]
    assert torch.equal(again.generate(**prompts, max_new_tokens=8), wanted)
    manifest = four_bits / ".svlm" / "openvino" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"key": "of other weights"}))
    assert svlm.load(four_bits, runtime="openvino", threads=1).notes["rebuilt"]
    with pytest.raises(UsageError, match="greedily"):
        again.generate(**prompts, do_sample=True)


@pytest.mark.parametrize("family", ["smolvlm", "gemma3"])
def test_families_answer_as_in_torch(family: str) -> None:
    """Padding on the left, two kinds of masks, a tower with masks of its own."""
    batch: dict[str, Any] = zoo.batch(family)
    batch.pop("labels")
    reference = zoo.model(family)
    model = load_openvino(view_of(zoo.model(family)), batch, None, threads=2)
    with torch.no_grad():
        logits, real = reference(**batch).logits, batch["attention_mask"].bool()
        wanted = reference.generate(**batch, max_new_tokens=12, do_sample=False)
    assert float((model(**batch).logits - logits)[real].abs().max()) < 0.05 * float(logits.abs().max())
    answers = model.generate(**batch, max_new_tokens=12)
    assert answers.shape == wanted.shape and torch.equal(answers, wanted)
