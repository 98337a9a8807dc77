"""Dependency groups: the anatomy's MLP groups equal torch-pruning's; fused linears and head groups row by row."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from svlm.compress.anatomy import AttentionGeometry, MlpGeometry, view_of
from svlm.passes.prune._groups import Target, attention_of, cut, head_group, mlp_group, mlp_of, tensors_of, traced
from tests import zoo


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_mlp_groups_equal_those_of_torch_pruning(family: str) -> None:
    model, batch = zoo.build(family)
    view = view_of(model)
    model.requires_grad_(False)
    model(**batch)  # transformers puts hooks of its own on some models in their first forward
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    # patches of several images in one tensor cannot be cut to one sample
    parts = ("language",) if family.startswith("qwen") else ("vision", "language")
    for part in parts:
        unit = next(unit for unit in view.parts[part] if unit.mlp)
        mlp = mlp_of(unit)
        group = {(path, axis, int(i)) for (path, axis), index in mlp_group(mlp, [3]).items() for i in index}
        assert traced(view, batch, mlp.up, 3) == group
    assert not any(p.requires_grad for p in model.parameters())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_fused_linears_are_cut_in_every_part() -> None:
    """Phi-3's gate_up and qkv: the cut block computes what the whole one does with the rest silenced."""
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**zoo.VISION),
        text_config=tf.Phi3Config(**zoo.TEXT),
        image_token_index=zoo.IMAGE,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config).eval()
    batch, view = zoo.batch("llava"), view_of(model)
    first = view.parts["language"][0]
    mlp, attention = mlp_of(first), attention_of(first)
    assert mlp.fused and attention.qkv and (attention.n_heads, attention.n_kv_heads) == (4, 2)
    with torch.no_grad():
        down, out = view.linear(mlp.down).module.weight, view.linear(attention.o).module.weight
        down[:, ::2] = 0
        out[:, 2 * attention.head_dim :] = 0
        wanted = model(**batch).logits
        keep = mlp_group(mlp, range(1, mlp.width, 2)) | head_group(attention, [0, 1])
        cut(model, tensors_of(keep, model.state_dict()))
        module = model.get_submodule(attention.module)
        rows = model.get_submodule(attention.qkv).weight
        assert rows.shape == (4 * attention.head_dim, 32) and model.get_submodule(mlp.up).weight.shape == (48, 32)
        assert type(module.config) is tf.Phi3Config
    view.refresh()
    assert mlp_of(view.parts["language"][0]).width == 24
    found = head_group(attention, [0, 1])[attention.qkv, "out"].tolist()
    d = attention.head_dim
    assert found == [*range(2 * d), *range(4 * d, 5 * d), *range(6 * d, 7 * d)]
    assert torch.isfinite(wanted).all()


def test_head_group_takes_the_key_value_head_that_its_queries_read() -> None:
    geometry = AttentionGeometry(
        "a", "a.q", "a.k", "a.v", None, "a.o", n_heads=6, n_kv_heads=3, head_dim=2, rotary=True
    )
    group = head_group(geometry, [0, 1, 4, 5])
    assert group["a.q", "out"].tolist() == group["a.o", "in"].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert group["a.k", "out"].tolist() == group["a.v", "out"].tolist() == [0, 1, 4, 5]


def test_plain_and_gated_mlps() -> None:
    plain = mlp_group(MlpGeometry(None, "up", "down", 4), [1, 3])
    assert {k: v.tolist() for k, v in plain.items()} == {("down", "in"): [1, 3], ("up", "out"): [1, 3]}
    gated = mlp_group(MlpGeometry("gate", "up", "down", 4), [0])
    assert set(gated) == {("down", "in"), ("up", "out"), ("gate", "out")}


def test_a_target_knows_its_shapes_and_its_reader() -> None:
    view = view_of(zoo.model("llava"))
    unit = view.parts["language"][1]
    heads = Target(unit, "heads", 2, 1)
    assert heads.shapes() == {
        attention_of(unit).q: (16, 32),
        attention_of(unit).k: (8, 32),
        attention_of(unit).v: (8, 32),
        attention_of(unit).o: (32, 16),
    }
    assert heads.reader == attention_of(unit).o and Target(unit, "mlp", 8).reader == mlp_of(unit).down
