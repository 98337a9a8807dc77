"""What the vision tower knows of its visual tokens: recomputed attention, patches to tokens, and calibration."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from svlm.calib.walk import Walk
from svlm.compress.anatomy import view_of
from svlm.compress.base import Context
from svlm.compress.errors import ModelError, PromiseBroken, Unmet
from svlm.compress.runtime import tower
from svlm.compress.runtime.reduce import installed
from svlm.compress.runtime.tower import Reader
from svlm.passes.tokens.visionzip import VisionZip
from tests import zoo
from tests.oracles.tokens import received as naive_received

from .helpers import IN_SEQUENCE, generate, kept_of, logits, prompts, reduced, shapes, two_images, typed

REFUSED = ("llava-next", "llava-onevision")
READABLE = [family for family in IN_SEQUENCE if family not in REFUSED]


def batches(*given):
    return Context(given, lambda *_, **__: None, lambda: None)


def reader_of(view):
    return Reader.of(view.tower_path, [u for u in view.parts["vision"] if u.stack is not None], view.cells())


def attention_by_eager(view, batch, block):
    """Attention weights [heads, N, N] that the block's own eager attention computes, one entry a picture."""
    view.model.set_attn_implementation("eager")
    caught, softmax = [], nn.functional.softmax

    def noting(*args, **kwargs):
        caught.append(softmax(*args, **kwargs))
        return caught[-1]

    def start(*_):
        nn.functional.softmax = noting

    def stop(*_):
        nn.functional.softmax = softmax

    handles = [block.register_forward_pre_hook(start), block.register_forward_hook(stop)]
    logits(view.model, batch)
    for handle in handles:
        handle.remove()
    return [weights for found in caught for weights in found]


@pytest.mark.parametrize("family", READABLE)
def test_attention_is_that_of_the_block_itself(family):
    """By the block's own eager attention, averaged over the patches of each visual token with plain indexing."""
    view, batch = view_of(zoo.model(family)), shapes(family)
    watch = reader_of(view)
    blocks = [u for u in view.parts["vision"] if u.stack is not None]
    assert watch.path == blocks[1].path, "the last but one"
    seen = []
    block = view.model.get_submodule(watch.path)
    handle = block.register_forward_pre_hook(
        lambda m, a, k: seen.append(watch.look(m, a, k, batch.get("image_grid_thw"))), with_kwargs=True
    )
    logits(view.model, batch)
    handle.remove()
    weights = attention_by_eager(view, batch, block)
    side = {"idefics3": 2, "smolvlm": 2, "gemma3": 2, "internvl": 2}.get(family, 1)
    wanted = []
    for picture, w in enumerate(weights):
        if family in ("llava", "internvl"):
            score = w[:, 0, 1:].sum(0)
        else:
            score = w.mean((0, 1))
        if family.startswith("qwen"):
            rows, columns = batch["image_grid_thw"][picture, 1:].tolist()
            score = score.view(-1, 4).mean(1)
            if family == "qwen2.5-vl":  # windows of 2 x 2 cells, row by row, each row by row
                order = [
                    (y, x)
                    for top in range(0, rows // 2, 2)
                    for left in range(0, columns // 2, 2)
                    for y in range(top, min(top + 2, rows // 2))
                    for x in range(left, min(left + 2, columns // 2))
                ]
                plain = torch.zeros(rows // 2, columns // 2)
                for value, (y, x) in zip(score.tolist(), order, strict=True):
                    plain[y, x] = value
                score = plain.flatten()
        elif side == 2:
            score = torch.stack(
                [score.view(4, 4)[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean() for y in range(2) for x in range(2)]
            )
        wanted.append(score)
    wanted = torch.cat(wanted)
    assert int((batch["input_ids"] == zoo.IMAGE).sum()) == len(wanted)
    torch.testing.assert_close(seen[0].attention, wanted, rtol=1e-4, atol=1e-6)
    assert seen[0].keys.shape[0] == len(wanted)


@pytest.mark.parametrize("family", READABLE)
def test_a_patch_belongs_to_the_visual_token_that_it_changes(family):
    """With blocks that do nothing, a changed patch changes one visual token: that which `by_token` gives it to."""
    model = zoo.model(family)
    view = view_of(model)
    for unit in view.parts["vision"]:
        if unit.stack is not None:
            for ref in unit.linears:
                if ref.role in ("attn.o", "mlp.down"):
                    ref.module.weight.data.zero_()
                    if ref.module.bias is not None:
                        ref.module.bias.data.zero_()
    batch, cells = shapes(family), view.cells()
    grid = batch.get("image_grid_thw")

    def visual(changed):
        caught, inside = {}, {}

        def patch(_module, args, kwargs):
            hidden = args[0].clone()
            if changed is not None:
                row = hidden if hidden.ndim == 2 else hidden[0]
                row[changed] += torch.linspace(-1, 2, row.shape[-1]).square()
            inside["hidden"] = hidden
            return (hidden, *args[1:]), kwargs

        handles = [
            view.model.get_submodule(reader_of(view).path).register_forward_pre_hook(patch, with_kwargs=True),
            view.decoder.register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True),
        ]
        logits(model, batch)
        for handle in handles:
            handle.remove()
        return caught["inputs_embeds"][batch["input_ids"] == zoo.IMAGE], inside["hidden"]

    before, hidden = visual(None)
    tokens = hidden.shape[-2]
    besides = tokens - 16 if cells.patches else 0
    for place in (besides, besides + 1, besides + 6, tokens - 1, tokens // 2):
        after, _ = visual(place)
        changed = ((after - before).abs().sum(-1) > 1e-6).nonzero().squeeze(1).tolist()
        marks = torch.zeros(len(hidden) if hidden.ndim == 3 else 1, tokens - besides, 1)
        marks[0, place - besides] = 1.0
        assert cells.by_token(marks, grid)[:, 0].nonzero().squeeze(1).tolist() == changed and len(changed) == 1


def test_received_is_the_mean_over_queries_and_heads(monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 7, 4, generator=g), torch.randn(2, 2, 7, 4, generator=g)
    whole = tower.received(q * 0.5, k)
    for i in range(2):
        torch.testing.assert_close(whole[i].double(), naive_received(q[i], k[i], 0.5), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(tower, "LIMIT", 30)
    torch.testing.assert_close(tower.received(q * 0.5, k), whole)
    closed = torch.tensor([True] * 5 + [False] * 2)[None, None, None].expand(2, 1, 7, 7)
    masked = tower.received(q * 0.5, k, closed)
    assert float(masked[:, 5:].abs().max()) == 0
    additive = torch.where(closed, 0.0, torch.finfo(torch.float32).min)
    torch.testing.assert_close(tower.received(q * 0.5, k, additive), masked)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_where_the_patches_of_a_token_are_not_known(family):
    view = view_of(zoo.model(family))
    with pytest.raises(Unmet, match="one visual token is not known"):
        VisionZip().requires(view, batches(zoo.batch(family)))
    assert installed(view.model) is None


def test_refused_where_no_square_of_patches_makes_a_token():
    view = view_of(zoo.model("internvl"))
    assert view.cells() is not None
    view.model.config.vision_config.image_size = [20, 20]  # 25 patches, 6 tokens
    with pytest.raises(Unmet, match="one visual token is not known"):
        VisionZip().requires(view, batches(zoo.batch("internvl")))


def test_the_block_that_is_read():
    assert [tower.Cells().block(n) for n in (1, 2, 24)] == [0, 0, 22]
    windows = tower.Cells(whole=(7, 15, 23, 31))
    assert [windows.block(n) for n in (32, 25, 9, 2)] == [31, 23, 7, 0], "a shrunken tower may see windows alone"


def test_refused_where_the_prompts_disagree_with_the_config():
    view, batch = view_of(zoo.model("llava")), zoo.batch("llava")
    batch["input_ids"] = torch.cat([batch["input_ids"][:, :3], batch["input_ids"][:, 2:]], dim=1)
    with pytest.raises(Unmet, match="17"):
        VisionZip().requires(view, batches(batch))


@pytest.mark.parametrize("family", READABLE)
def test_two_images_and_batches_and_caches(family):
    view = reduced(zoo.model(family), VisionZip(keep=0.5, dominant=0.5))
    batch = prompts(family)
    together = generate(view.model, batch)
    assert torch.equal(together, generate(view.model, batch, use_cache=False))
    beams = generate(view.model, batch, num_beams=2)
    assert torch.equal(beams, generate(view.model, batch, num_beams=2, use_cache=False))
    logits(view.model, batch)
    kept = kept_of(view, batch)
    assert (kept & (batch["input_ids"] == zoo.IMAGE)).sum(1).unique().numel() == 1
    if family in ("llava", "paligemma", "qwen2-vl", "qwen2.5-vl", "qwen3-vl"):
        pair = typed(family, two_images(5, family))
        answers = generate(view.model, pair)
        assert torch.equal(answers, generate(view.model, pair, use_cache=False))
        alone = {k: v[1:] for k, v in pair.items() if k not in ("pixel_values", "image_grid_thw")}
        for key in {"pixel_values", "image_grid_thw"} & set(pair):
            alone[key] = pair[key].chunk(3)[2]
        assert torch.equal(generate(view.model, alone)[0], answers[1])


def test_keeps_what_the_tower_attends_to():
    view = reduced(zoo.model("llava"), VisionZip(keep=0.25, dominant=1.0))
    batch = prompts("llava")
    original = view_of(zoo.model("llava"))
    block = original.model.get_submodule(reader_of(original).path)
    weights = attention_by_eager(original, batch, block)
    logits(view.model, batch)
    for row in range(3):
        score = weights[row][:, 0, 1:].sum(0)
        kept = (kept_of(view, batch) & (batch["input_ids"] == zoo.IMAGE))[row, 2 + row : 18 + row]
        assert kept.nonzero().squeeze(1).tolist() == sorted(score.topk(4).indices.tolist())


def test_promise_is_broken_when_the_tower_loses_blocks():
    view = reduced(zoo.model("llava"), VisionZip())
    VisionZip().ensures(view)
    layers = view.tower.encoder.layers
    del layers[-1]
    view.refresh()
    with pytest.raises(PromiseBroken, match="no longer"):
        VisionZip().ensures(view)


def test_pictures_that_do_not_fit_the_prompt_are_told():
    view = reduced(zoo.model("llava"), VisionZip())
    batch = prompts("llava")
    watch = installed(view.model).watch.reader
    view.model.get_submodule(watch.path)._forward_pre_hooks.clear()
    with pytest.raises(ModelError, match="48 visual tokens, 0 in the tower"):
        logits(view.model, batch)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3"])
def test_the_walk_sees_what_inference_sees(family):
    """Finished tower blocks are replaced by what they returned; what is read is still there."""
    view = reduced(zoo.model(family), VisionZip(keep=0.5, dominant=0.5))
    data = [typed(family, zoo.batch(family, 2, seed)) for seed in range(2)]
    wanted = [logits(view.model, batch) for batch in data]
    kept = [installed(view.model).last[0].clone() for batch in data if logits(view.model, batch) is not None]
    walk = Walk(view, data, list(view.parts) if family != "gemma3" else ["vision", "language", "head"])
    units = 0
    for unit in walk:
        units += 1
        if unit.name in ("language.blocks[1]", "head"):
            assert all(torch.equal(one.whole[0], index) for one, index in zip(walk._kept, kept, strict=True))
    assert units > 6
    for index, output in enumerate(wanted):
        torch.testing.assert_close(walk.replay(index).logits, output, rtol=1e-5, atol=1e-5)


def test_gradient_weights_after_it():
    """The balance runs rows of a batch alone, with finished blocks replaced."""
    from svlm.calib.stats import Hessian

    view = reduced(zoo.model("llava"), VisionZip(keep=0.5))
    data = [zoo.batch("llava", 2)]
    for unit in Walk(view, data, ["vision", "language.blocks[1]"]):
        stats = unit.observe(Hessian, token_weights="gradient")
        assert all(stat.tokens > 0 for stat in stats.values())


def test_travels_with_copies():
    view = reduced(zoo.model("llava"), VisionZip(keep=0.5))
    batch = prompts("llava")
    twin = view_of(copy.deepcopy(view.model))
    assert torch.equal(logits(twin.model, batch), logits(view.model, batch))
    assert installed(twin.model).attached_to(twin.model, twin.decoder_path)
