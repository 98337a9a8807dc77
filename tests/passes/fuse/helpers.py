"""What the tests of visual tokens that are treated block by block share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from svlm.compress.anatomy import ModelView, view_of
from svlm.passes.fuse.bypass import Bypass
from svlm.passes.fuse.freeze_vision import FreezeVision
from svlm.passes.tokens._layered import decoder_blocks
from svlm.passes.tokens.fastv import FastV
from svlm.passes.tokens.pyramid import Pyramid
from tests import zoo
from tests.oracles import layered as oracle

CASES: dict[str, tuple[Any, dict[str, Any]]] = {  # the pass, and what it means for the oracle; three blocks
    "freeze": (FreezeVision(blocks=(1,)), {"frozen": (1,)}),
    "fastv": (FastV(keep=0.5, block=1), {"ranks": (0,), "keep": {1: 0.5}}),
    "pyramid": (Pyramid(blocks=(1, 2)), {"ranks": (1, 2), "keep": {1: 0.5, 2: 0.25}}),
    "bypass": (Bypass(blocks=(1,)), {"frozen": (0, 1, 2), "hidden": (0, 2)}),
}
NOTHING = {
    "freeze": FreezeVision(count=0),
    "fastv": FastV(keep=1.0, block=1),
    "pyramid": Pyramid(ratio=1.0, blocks=(1, 2)),
}


def put(view: ModelView, step: Any) -> None:
    """`step` on the model, without data."""
    paths = [unit.path for unit in decoder_blocks(view)]
    record: dict[str, Any]
    if isinstance(step, FreezeVision):
        record = {"frozen": [paths[i] for i in step.blocks]}
    elif isinstance(step, Bypass):
        record = {"crossing": [paths[i] for i in step.blocks]}
    else:
        ranks, keep = step.stages(len(paths))
        record = {"ranks": [paths[i] for i in ranks], "keep": {paths[i]: share for i, share in keep.items()}}
    step.rebuild(view, record)
    view.ledger.add(step, record)


def treated(model: Any, *steps: Any) -> ModelView:
    """A copy of `model` with passes on it."""
    view = view_of(copy.deepcopy(model))
    for step in steps:
        put(view, step)
    return view


def ends(batch: dict[str, Tensor]) -> list[int]:
    """Place of the last token of each row's prompt, in a batch without answers."""
    return [batch["input_ids"].shape[1] - 1] * len(batch["input_ids"])


def wanted(model: Any, batch: dict[str, Tensor], rules: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return oracle.logits(model, batch, view_of(model).decoder_path, zoo.IMAGE, ends(batch), **rules)


def text(batch: dict[str, Tensor]) -> Tensor:
    """Real tokens that are not visual, bool [batch, tokens]."""
    return (batch["input_ids"] != zoo.IMAGE) & batch["attention_mask"].bool()


def cache_of(view: ModelView, batch: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return view.model(**batch, use_cache=True).past_key_values


def cache_lengths(cache: Any) -> list[int]:
    """Tokens that each layer of a cache holds."""
    return [layer.keys.shape[2] for layer in cache.layers]
