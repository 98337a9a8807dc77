"""Models with pre-fusion in them: what the tests of fuse.prefuse share."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch

from svlm.calib.walk import Walk
from svlm.compress.anatomy import view_of
from svlm.compress.base import Context, evaluating
from svlm.compress.runtime.prefusion import SLOT
from svlm.passes.fuse.prefuse import Prefuse

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def context(view=None, teacher=None, batches=()):
    @contextmanager
    def lend():
        with evaluating(teacher.model):
            yield teacher

    return Context(list(batches), lambda where=None, **o: Walk(view, batches, where, **o), lend)


def fused(model, step=None, lively=True):
    """A copy of `model` with pre-fusion whose weights are not those of the start."""
    view = view_of(copy.deepcopy(model))
    step = step or Prefuse(tokens=2, blocks=2, gate=0.7)
    step.requires(view, context())
    view.ledger.add(step, step.apply(view, context()).record)
    if lively:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in view.model.get_submodule(SLOT).parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return view
