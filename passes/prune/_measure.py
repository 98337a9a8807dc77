"""Importance that needs no statistics of the walk: from the weights, or from the loss's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._groups import Target, attention_of, mlp_of
from ._importance import magnitude, taylor

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView
    from ...compress.base import Context


def weight_scores(model: nn.Module, target: Target) -> Tensor:
    """Magnitude of every channel, or of every query head (with its share of the key-value head that it reads)."""

    def weight(path: str | None) -> list[Tensor]:
        return [] if path is None else [model.get_submodule(path).get_parameter("weight")]

    if target.kind == "mlp":
        mlp = mlp_of(target.unit)
        width = mlp.width
        if mlp.fused:
            rows = list(weight(mlp.up)[0].split(width))
        else:
            rows = [*weight(mlp.gate), *weight(mlp.up)]
        return magnitude([*((w, 0) for w in rows), *((w, 1) for w in weight(mlp.down))], width)
    a = attention_of(target.unit)
    if a.qkv is not None:
        q, k, v = weight(a.qkv)[0].split([n * a.head_dim for n in (a.n_heads, a.n_kv_heads, a.n_kv_heads)])
    else:
        q, k, v = *weight(a.q), *weight(a.k), *weight(a.v)
    own = magnitude([(q, 0), *((w, 1) for w in weight(a.o))], a.n_heads)
    shared = magnitude([(k, 0), (v, 0)], a.n_kv_heads)
    share = a.n_heads // a.n_kv_heads
    return (own.square() + shared.square().repeat_interleave(share) / share).sqrt()


def gradient_scores(model: ModelView, ctx: Context, targets: Sequence[Target]) -> list[Tensor]:
    """Taylor importance of every channel or query head over the fit split."""
    readers = [model.linear(target.reader).module.weight for target in targets]
    flags = {parameter: parameter.requires_grad for parameter in model.model.parameters()}
    units = [mlp_of(t.unit).width if t.kind == "mlp" else attention_of(t.unit).n_heads for t in targets]
    scores = [torch.zeros(n, dtype=torch.float64) for n in units]
    ctx.progress.start("importance", len(ctx.fit))
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for weight in readers:
            weight.requires_grad_(True)
        for batch in ctx.fit:
            with torch.enable_grad():
                loss = model.model(**batch, use_cache=False).loss
                gradients = torch.autograd.grad(loss, readers)
            for score, weight, gradient in zip(scores, readers, gradients):
                score += taylor(weight, [gradient], len(score)) / len(ctx.fit)
            ctx.progress.step()
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        ctx.progress.done()
    return scores
