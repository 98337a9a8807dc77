"""Naive token merging (ToMe, arXiv 2210.09461, section 3.2), one image and one token at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def match(keys: Tensor, r: int, real: Tensor | None = None) -> list[list[int]]:
    """The groups [of token numbers] after one bipartite soft matching of keys [n, d], by their first that stays."""
    n = len(keys)
    edges = []
    for a in range(0, n, 2):
        best, partner = float("-inf"), -1
        for b in range(1, n, 2):
            value = float(keys[a].double() @ keys[b].double() / (keys[a].double().norm() * keys[b].double().norm()))
            if real is not None and bool(real[a]) != bool(real[b]):
                value = -2.0
            elif real is not None and not real[a]:
                value = 2.0
            if value > best:
                best, partner = value, b
        edges.append((best, a, partner))
    edges.sort(key=lambda edge: -edge[0])
    groups = {token: [token] for token in range(n)}
    for _, a, b in edges[:r]:
        groups[b].append(groups.pop(a)[0])
    return [groups[token] for token in sorted(groups)]


def average(states: Tensor, sizes: list[float], groups: list[list[int]]) -> tuple[Tensor, list[float]]:
    """Size-weighted averages of states [n, D], and the sizes of the groups."""
    rows, totals = [], []
    for group in groups:
        total = sum(sizes[token] for token in group)
        weights = [sizes[token] / total if total else 1 / len(group) for token in group]
        rows.append(sum(w * states[token].double() for w, token in zip(weights, group)))
        totals.append(total)
    return torch.stack(rows), totals


def attention(q: Tensor, k: Tensor, v: Tensor, sizes: list[float]) -> Tensor:
    """Proportional attention of one head: ``softmax(q k^T / sqrt(d) + log s) v``, [n, d] each."""
    out = []
    for query in q.double():
        logits = [float(query @ key) / len(query) ** 0.5 for key in k.double()]
        top = max(logits)
        weights = [size * math.exp(value - top) for size, value in zip(sizes, logits)]
        out.append(sum(w / sum(weights) * value for w, value in zip(weights, v.double())))
    return torch.stack(out)


def clip_layer(layer, x: Tensor, seen: list[float], left: int, prefix: int, sizes: list[float]):
    """One CLIP layer on x [n, D] of one image, from its weights alone: (states, groups).

    Between attention, which takes the sizes `seen`, and MLP tokens are merged until `left` are there, with the weights
    `sizes`; the first `prefix` never are.
    """
    attn, heads = layer.self_attn, layer.self_attn.num_heads
    normed = layer.layer_norm1(x)
    q, k, v = (linear(normed).view(len(x), heads, -1) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
    mixed = torch.stack([attention(q[:, h], k[:, h], v[:, h], seen) for h in range(heads)], dim=1)
    x = x + attn.out_proj(mixed.flatten(1).to(x.dtype))
    metric = torch.stack([k[:, h] for h in range(heads)]).mean(0)
    found = match(metric[prefix:], len(x) - left)
    groups = [[i] for i in range(prefix)] + [[token + prefix for token in group] for group in found]
    x = average(x, sizes, groups)[0].to(x.dtype)
    return x + layer.mlp(layer.layer_norm2(x)), groups
