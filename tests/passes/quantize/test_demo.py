"""On the embedded model: three bits by GPTQ cost at most half of what three bits by rounding to nearest cost."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from svlm.calib.dataset import CalibrationSet
from svlm.calib.encode import Encoder
from svlm.calib.metrics.divergence import kl, log_probabilities
from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.base import Context
from svlm.compress.pipeline import apply_pass
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.quantize.rtn import RTN


def answers(model: Any, batches: list[Any]) -> torch.Tensor:
    """Log-probabilities [answer tokens, vocabulary]."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            logits = model(**batch).logits
            rows.append(log_probabilities(logits[:, :-1][batch["labels"][:, 1:] != -100]))
    return torch.cat(rows)


@pytest.mark.slow
def test_three_bits() -> None:
    data = CalibrationSet.load("demo", fit=64, check=96)
    original = storage.load_model("demo")
    encoder = Encoder(original.processor)
    fit, check = (list(encoder.batches(samples, 32)) for samples in (data.fit, data.check))
    wanted = answers(original.model, check)
    lost: dict[str, float] = {}
    for step in (RTN(bits=3, group=64, search="none"), GPTQ(bits=3, group=64)):
        view = storage.load_model("demo")
        ctx = Context(fit, lambda where, view=view, **o: Walk(view, fit, where, **o), nullcontext)
        notes = apply_pass(step, view, ctx)
        assert notes.numbers["linears"] == len(view.linears(("vision", "connector", "language")))
        lost[step.name] = float(kl(wanted, answers(view.model, check)).mean())
    assert lost["quantize.rtn"] > 0.005, "the model feels three bits"
    assert lost["quantize.gptq"] <= 0.5 * lost["quantize.rtn"], lost
