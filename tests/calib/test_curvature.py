"""The sampled second-order effect of a change against the KL that the change makes, and against its exact formula."""

from __future__ import annotations

import pytest
import torch

from svlm.calib import curvature as module
from svlm.calib.curvature import TEMPERATURES, curvature
from svlm.calib.metrics.divergence import kl, log_probabilities
from svlm.compress.anatomy import ModelView, view_of
from tests import zoo

PATHS = {
    "llava": ("model.language_model.layers.0.mlp.up_proj",),
    "paligemma": ("model.language_model.embed_tokens",),  # tied: the head as well
    "florence-2": ("model.language_model.decoder.layers.0.fc1",),
}


def prepared(family: str) -> tuple[ModelView, list[dict[str, torch.Tensor]]]:
    view = view_of(zoo.model(family))
    with torch.no_grad():
        for parameter in view.model.parameters():
            parameter.mul_(2.0)  # random models are otherwise sure of nothing
    return view, [zoo.batch(family, samples=3, seed=seed) for seed in range(2)]


def picked(view: ModelView, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Logits [answer tokens, vocabulary]."""
    rows = []
    for batch in batches:
        logits, labels = view.model(**batch).logits, batch["labels"]
        if not view.family.seq2seq:
            logits, labels = logits[:, :-1], labels[:, 1:]
        rows.append(logits[labels != -100])
    return torch.cat(rows)


@pytest.mark.parametrize("family", PATHS)
def test_against_the_kl_of_a_small_change(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBES", 60)
    monkeypatch.setattr(module, "TEMPERATURES", (1.0,))
    view, batches = prepared(family)
    torch.manual_seed(0)
    changes = {path: 2e-3 * torch.randn(2, *view.weight(path).shape) for path in PATHS[family]}
    for change in changes.values():
        change[1] *= 2
    before = {name: t.clone() for name, t in view.model.state_dict().items()}
    found = curvature(view, batches, changes)
    assert all(torch.equal(before[name], t) for name, t in view.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in view.model.parameters())
    with torch.no_grad():
        plain = picked(view, batches)
        for path, change in changes.items():
            assert found[path].shape == (1, 2)
            for choice in range(2):
                view.weight(path).add_(change[choice])
                kls = float(kl(log_probabilities(plain), log_probabilities(picked(view, batches))).mean())
                view.weight(path).copy_(before[f"{path}.weight"])
                assert float(found[path][0, choice]) == pytest.approx(kls, rel=0.35)


def test_against_the_formula_at_every_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBES", 50)
    view, batches = prepared("llava")
    (path, *_) = PATHS["llava"]
    torch.manual_seed(0)
    change = 1e-2 * torch.randn(1, *view.weight(path).shape)
    found = curvature(view, batches, {path: change})[path][:, 0]
    with torch.no_grad():
        plain, step = picked(view, batches).double(), 1e-2
        kept = view.weight(path).clone()
        view.weight(path).add_(step * change[0])
        slope = (picked(view, batches).double() - plain) / step
        view.weight(path).copy_(kept)
    for row, temperature in enumerate(TEMPERATURES):
        p = (plain / temperature).softmax(-1)
        spread = (p * slope.square()).sum(-1) - (p * slope).sum(-1).square()
        assert float(found[row]) == pytest.approx(float(spread.mean()) / 2, rel=0.3)


def test_a_weight_that_the_answers_do_not_depend_on_has_none() -> None:
    view, batches = prepared("llava")
    path = "model.vision_tower.encoder.layers.2.mlp.fc2"  # LLaVA reads the second last layer
    change = torch.ones(1, *view.weight(path).shape)
    assert float(curvature(view, batches, {path: change})[path].abs().max()) == 0.0
    same = {PATHS["llava"][0]: torch.randn(1, 48, 32)}
    first, second = (curvature(view, batches, same)[PATHS["llava"][0]] for _ in range(2))
    assert torch.equal(first, second)
