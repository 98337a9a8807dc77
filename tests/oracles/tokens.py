"""Naive selection and merging of visual tokens: one image, Python loops, straight from the descriptions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


def max_min(features: Tensor, k: int) -> list[int]:
    """DivPrune on [T, D]."""
    tokens = len(features)
    distance = [[1 - cosine(features[i], features[j]) for j in range(tokens)] for i in range(tokens)]
    loneliness = [min(distance[i][j] for j in range(tokens) if j != i) for i in range(tokens)]
    chosen = [loneliness.index(max(loneliness))]
    while len(chosen) < k:
        best, largest = -1, -math.inf
        for j in range(tokens):
            if j in chosen:
                continue
            value = min(distance[j][s] for s in chosen)
            if value > largest:
                best, largest = j, value
        chosen.append(best)
    return sorted(chosen)


def pooled(features: Tensor, shape: tuple[int, int], lines: list[int]) -> tuple[list[int], Tensor]:
    """Mean of each cell; `lines` says how many cells each band of rows has. Positions, values [k, D]."""
    height, width = shape
    positions, values = [], []
    for band, count in enumerate(lines):
        top, bottom = band * height // len(lines), (band + 1) * height // len(lines)
        for cell in range(count):
            left, right = cell * width // count, (cell + 1) * width // count
            inside = [features[y * width + x] for y in range(top, bottom) for x in range(left, right)]
            values.append(torch.stack(inside).mean(0))
            positions.append((top + bottom - 1) // 2 * width + (left + right - 1) // 2)
    return positions, torch.stack(values)


def visionzip(
    features: Tensor, attention: Tensor, keys: Tensor, leading: int, contextual: int, add: bool
) -> dict[int, Tensor]:
    """Place -> feature of what stays of one image [T, D]."""
    ranked = sorted(range(len(attention)), key=lambda i: (-float(attention[i]), i))
    kept = {i: features[i].double() for i in ranked[:leading]}
    rest = [i for i in range(len(attention)) if i not in kept]
    targets = [rest[n * len(rest) // contextual] for n in range(contextual)]
    return kept | joined(features, keys, targets, [i for i in rest if i not in targets], add)


def joined(features: Tensor, by: Tensor, targets: list[int], others: list[int], add: bool = False) -> dict[int, Tensor]:
    groups: dict[int, list[int]] = {t: [] for t in targets}
    for i in others:
        groups[max(sorted(targets), key=lambda t: cosine(by[i], by[t]))].append(i)
    merged = {}
    for target, members in groups.items():
        own = features[target].double()
        if add:
            merged[target] = own + (sum(features[i].double() for i in members) / len(members) if members else 0)
        else:
            merged[target] = (own + sum(features[i].double() for i in members)) / (1 + len(members))
    return merged


def apet(features: Tensor, k: int, basis: int) -> dict[int, Tensor]:
    """ApET on [T, D]: place -> feature of what stays."""
    x = features.double()
    tokens = len(x)
    center = x.mean(0)
    far = [float((row - center).norm()) for row in x]
    spread = [far.index(max(far))]
    while len(spread) < min(basis, tokens - k):
        gap = [min(float((x[i] - x[s]).norm()) for s in spread) for i in range(tokens)]
        spread.append(gap.index(max(gap)))
    matrix = x[spread].T  # [D, m]
    error = []
    for i in range(tokens):
        solution = torch.linalg.lstsq(matrix, x[i][:, None], driver="gelsd").solution
        error.append(0.0 if i in spread else float((matrix @ solution - x[i][:, None]).square().sum()))
    kept = sorted(range(tokens), key=lambda i: (-error[i], i))[:k]
    return joined(features, features, kept, [i for i in range(tokens) if i not in kept])


def received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean attention that each token of one image receives, over queries and heads. query, key [heads, N, d] -> [N]."""
    heads, tokens, _ = query.shape
    total = torch.zeros(tokens, dtype=torch.float64)
    for h in range(heads):
        for i in range(tokens):
            logits = torch.tensor([float(query[h, i].double() @ key[h, j].double()) * scale for j in range(tokens)])
            total += logits.double().softmax(0)
    return total / (heads * tokens)
