"""What a change of a weight would do to the answers: the second-order term of the KL divergence, by sampling.

To second order, adding D to a weight W moves the distributions p of the answer tokens by

    KL = 1/2 sum over tokens of J^T (diag(p) - p p^T) J,    J = d logits / d W applied to D

(the Fisher information in the direction of D). For a probe u of independent normal numbers and
``g = sqrt(p) * u - p * sum(sqrt(p) * u)``, ``E[g g^T] = diag(p) - p p^T``, so one backward pass of ``sum(g * logits)``
gives the gradient G of W with ``E[<G, D>^2]`` = the sum above: one pass serves any number of changes of all weights.

Answers of which the model is sure have hardly any curvature, so that a few unsure tokens would decide everything. The
distributions are therefore softened by several temperatures as well, as distillation does (arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..compress.anatomy import ModelView
from ..compress.base import evaluating
from .balance import answer_logits, frozen
from .replay import pieces

TEMPERATURES = (1.0, 2.0, 4.0)
PROBES = 2  # of each temperature, for every few samples
PIECE = 4  # samples in one pass


def curvature(
    view: ModelView, batches: Sequence[Mapping[str, Any]], changes: Mapping[str, torch.Tensor], seed: int = 0
) -> dict[str, torch.Tensor]:
    """The KL of an answer token that each change alone would make, to second order.

    Args:
        batches: model-ready batches with `labels`.
        changes: path of a module -> [choices, *shape of its weight], what is added to the weight.
        seed: of the probes.

    Returns:
        Path -> [temperatures, choices] float64, in nats a token, one row for each of `TEMPERATURES`.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {path: view.weight(path) for path in changes}
    flat = {path: change.flatten(1) for path, change in changes.items()}
    sums = {path: torch.zeros(len(TEMPERATURES), len(change), dtype=torch.float64) for path, change in changes.items()}
    tokens = 0
    with evaluating(view.model), frozen(view.model), torch.enable_grad():
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            for part in pieces(view, batch, PIECE):
                logits, labels = answer_logits(view, part)
                logits = logits[labels != -100]
                tokens += len(logits)
                if not logits.requires_grad:  # none of these weights lies on the way to the answers
                    continue
                for row, temperature in enumerate(TEMPERATURES):
                    p = (logits.detach() / temperature).softmax(-1)
                    for _ in range(PROBES):
                        u = torch.randn(p.shape, generator=generator).to(p) * p.sqrt()
                        g = u - p * u.sum(-1, keepdim=True)
                        found = torch.autograd.grad(
                            (g * logits).sum(), list(weights.values()), retain_graph=True, allow_unused=True
                        )
                        for path, gradient in zip(weights, found):
                            if gradient is not None:
                                along = flat[path] @ gradient.flatten().to(flat[path].dtype)
                                sums[path][row] += along.double().cpu().square() / (2 * PROBES)
                del logits
    return {path: total / max(tokens, 1) for path, total in sums.items()}
