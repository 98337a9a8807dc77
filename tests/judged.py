"""The demo model made worse, and how often a model is asked: what the tests of the judge share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from svlm.compress.anatomy import ModelView
from svlm.compress.storage import load_model

BATCH = 16


def noisy(amount: float = 0.7) -> ModelView:
    view = load_model("demo")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ref in view.linears("language.mlp"):
            weight = ref.module.weight
            weight += torch.randn(weight.shape, generator=generator) * weight.std() * amount
    return view


@contextmanager
def forwards(view: ModelView) -> Iterator[list[int]]:
    """One entry for every forward of the decoder inside the `with`."""
    seen: list[int] = []
    handle = view.decoder.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()
