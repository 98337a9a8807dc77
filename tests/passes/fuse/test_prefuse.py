"""fuse.prefuse on every family whose visual tokens lie in the decoder's sequence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from svlm import passes
from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.anatomy import view_of
from svlm.compress.errors import PromiseBroken, Unmet, UsageError
from svlm.compress.export.run import export_model
from svlm.compress.pipeline import apply_pass, ask_promises
from svlm.compress.runtime.images import square
from svlm.compress.runtime.prefusion import SLOT, sinusoids
from svlm.compress.runtime.reduce import installed, remove
from svlm.passes.distill.logits import Logits
from svlm.passes.fuse.prefuse import Prefuse
from svlm.passes.prune.layers import Layers
from svlm.passes.prune.structured import Structured
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.tokens._merge import cells
from svlm.passes.tokens.pool import Pool
from tests import zoo
from tests.passes.fuse.prefused import context, fused
from tests.passes.tokens.helpers import (
    ELSEWHERE,
    generate,
    kept_of,
    logits,
)


def inputs_of_the_decoder(model, batch):
    caught = {}
    handle = view_of(model).decoder.register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
    logits(model, batch)
    handle.remove()
    return caught


# ------------------------------------------------------------------------------------------------------- what it is


def test_it_starts_as_pooling(family):
    """Gates of 0: the logits are those of `tokens.pool`, and of the original where all tokens stay."""
    _, model, batch, _ = family
    start = fused(model, Prefuse(tokens=2, blocks=1, gate=0.0), lively=False)
    pooled = view_of(copy.deepcopy(model))
    Pool(keep=2 / int((batch["input_ids"][0] == zoo.IMAGE).sum())).rebuild(pooled, {})
    torch.testing.assert_close(logits(start.model, batch), logits(pooled.model, batch), rtol=1e-5, atol=1e-5)
    assert start.visual_tokens(batch) == [2, 2, 2]
    every = fused(model, Prefuse(tokens=64, blocks=1, gate=0.0), lively=False)
    assert torch.equal(logits(every.model, batch), logits(model, batch))


def test_its_blocks_compute_what_the_decoders_own_would(family):
    """Rotary embedding, masks, windows, deep features: the copies give the hidden states of the original."""
    _, model, batch, _ = family
    start = fused(model, Prefuse(tokens=2, blocks=2), lively=False)
    fusion, seen = start.model.get_submodule(SLOT), {}
    run = fusion._run

    def noting(embeds, call):
        seen["h"] = run(embeds, call)
        return seen["h"]

    fusion._run = noting
    logits(start.model, batch)
    third = next(unit for unit in view_of(model).parts["language"] if unit.index == 2).module
    wanted = {}

    def note(_module, args, kwargs):
        wanted["h"] = args[0] if args else kwargs["hidden_states"]

    handle = third.register_forward_pre_hook(note, with_kwargs=True)
    logits(model, batch)
    handle.remove()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(seen["h"][real], wanted["h"][real], rtol=1e-5, atol=1e-5)


def sized(added, token):
    return added * token.square().sum().sqrt() / added.square().sum().sqrt()


def naive(fusion, x, states, prompt, places, keep):
    """What the decoder is given, by loops. x, states: [q, D]; places: of one image; keep: those that stay."""
    compress, width = fusion.compress, x.shape[1]
    out = x.clone()
    for t in range(len(x)):
        if prompt[t]:
            out[t] = x[t] + compress.gate[0] * sized(states[t] - x[t], x[t])
        if t in places:
            out[t] = x[t] + compress.gate[1] * sized(states[t] - x[t], x[t])
    image = out[places].clone()
    _, weights = cells(square(len(places)), len(keep))
    spots = sinusoids(len(places), width)
    values = image @ compress.v_proj.weight.T
    keys = (F.layer_norm(image, (width,)) + spots) @ compress.k_proj.weight.T
    each = width // compress.heads
    for j, place in enumerate(keep):
        inside = weights[j].nonzero().squeeze(1)
        spot = spots[inside].mean(0)
        query = compress.q_proj.weight @ (F.layer_norm(compress.query[j], (width,)) + spot)
        mixed = []
        for h in range(compress.heads):
            part = slice(h * each, (h + 1) * each)
            scores = torch.stack([query[part] @ keys[t, part] / each**0.5 for t in inside])
            mixed.append(torch.softmax(scores, 0) @ values[inside][:, part])
        out[place] = compress.o_proj.weight @ torch.cat(mixed)
    return out


def test_against_loops(llava):
    """Row by row: gates, attention within cells, places; the decoder sees nothing else of the image."""
    model, _, view = llava
    batch = zoo.batch("llava", 2)
    fusion, seen = view.model.get_submodule(SLOT), {}
    run = fusion._run
    fusion._run = lambda embeds, call: seen.setdefault("h", run(embeds, call))
    try:
        short = inputs_of_the_decoder_after(view, batch)
    finally:
        del fusion._run
    full = inputs_of_the_decoder(model, batch)["inputs_embeds"]
    kept = kept_of(view, batch)
    prompt = (batch["labels"] == -100) & batch["attention_mask"].bool() & (batch["input_ids"] != zoo.IMAGE)
    for row in range(2):
        places = (batch["input_ids"][row] == zoo.IMAGE).nonzero().squeeze(1).tolist()
        stay = kept[row].nonzero().squeeze(1).tolist()
        keep = [p for p in stay if p in places]
        with torch.no_grad():
            wanted = naive(fusion, full[row], seen["h"][row], prompt[row], places, keep)
        found = short["inputs_embeds"][row][-len(stay) :]
        torch.testing.assert_close(found, wanted[stay], rtol=1e-5, atol=1e-5)
        assert len(keep) == 2


def inputs_of_the_decoder_after(view, batch):
    caught = {}
    handle = view.decoder.register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
    with torch.no_grad():
        view.model(**batch)
    handle.remove()
    return caught


# ------------------------------------------------------------------------------------------------ disk, later passes


def test_saved_and_loaded(family, tmp_path):
    _, _, batch, view = family
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    assert torch.equal(logits(again.model, batch), logits(view.model, batch))
    assert torch.equal(generate(again.model, batch), generate(view.model, batch))
    assert ask_promises(again, passes.find) == (["fuse.prefuse"], None)
    twin = copy.deepcopy(again.model)
    assert installed(twin).rewrite.__self__ is twin.get_submodule(SLOT)
    assert torch.equal(generate(twin, batch), generate(view.model, batch))


@pytest.mark.parametrize("where", [None, "prefusion.*"])
def test_it_trains(where):
    """Whole, or what is new alone; every new parameter moves, and answers come nearer."""
    model = zoo.model("llava")
    batches = [zoo.batch("llava", 2, seed=i) for i in range(4)]
    view, teacher = fused(model, Prefuse(tokens=2, blocks=1, gate=0.5)), view_of(copy.deepcopy(model))
    before = {k: v.clone() for k, v in view.model.state_dict().items()}
    step = Logits(steps=6, batch_size=2, lr=5e-3, where=where, data="fit")
    notes = apply_pass(step, view, context(view, teacher, batches))
    assert notes.numbers["kl_best"] < notes.numbers["kl_first"]
    moved = {k for k, v in view.model.state_dict().items() if not torch.equal(v, before[k])}
    new = {k for k in before if k.startswith(SLOT)}
    assert new <= moved
    assert (moved == new) == (where is not None)
    assert ask_promises(view, passes.find)[1] is None


def test_calibration_sees_both_sequences():
    """Blocks before the decoder are given all tokens, those of the decoder the few that stay; modalities weigh half."""

    class Weights:
        def __init__(self):
            self.rows, self.weights = [], []

        def update(self, x, weights):
            self.rows.append(x)
            self.weights.append(weights)

    view, batch = fused(zoo.model("llava")), zoo.batch("llava", 2)
    real = int(batch["attention_mask"].sum())
    for name, visual in (("connector.fuse0", 32), ("language.blocks[0]", 4)):
        unit = next(iter(Walk(view, [batch], name)))
        stat = next(iter(unit.observe(Weights, unit.linears[:1], "balanced").values()))
        weights = stat.weights[0]
        assert int((weights > 0).sum()) == real - 32 + visual
        assert sorted({int((weights == w).sum()) for w in weights.unique() if w > 0}) == sorted({visual, real - 32})
    unit = next(iter(Walk(view, [batch], "connector.compress")))
    stats = unit.observe(Weights, token_weights="balanced")
    assert {ref.path.rpartition(".")[2]: len(s.rows[0]) for ref, s in stats.items()} == {
        "q_proj": 4,
        "k_proj": 32,
        "v_proj": 32,
        "o_proj": 4,
    }


def test_quantized_after_it_and_loaded(tmp_path):
    view, batch = fused(zoo.model("llava")), zoo.batch("llava", 2)
    view.storage_dtype = torch.bfloat16
    storage.round_to_storage(view)
    apply_pass(GPTQ(bits=4, group=-1), view, context(view, None, [batch]))
    assert {path.split(".")[1] for path in view.grids if path.startswith(SLOT)} == {"fuse0", "fuse1", "compress"}
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    torch.testing.assert_close(logits(again.model, batch), logits(view.model, batch), rtol=1e-5, atol=1e-5)
    assert ask_promises(again, passes.find)[1] is None and again.grids.keys() == view.grids.keys()
    with pytest.raises(UsageError, match=r"parts that no config says[\s\S]*connector\.fuse0"):
        export_model(tmp_path / "saved", "gptq", tmp_path / "out", find=passes.find)
    with pytest.raises(Unmet, match="on a grid"):
        remove(view.model)
        Prefuse().requires(view, context())


def test_pruned_before_it_and_not_after():
    model, batch = zoo.model("llava"), zoo.batch("llava", 2)
    view = view_of(model)
    ctx = context(view, None, [batch])
    step = Structured(ratio=0.5, multiple=4, what=("mlp",), importance="magnitude")
    apply_pass(step, view, ctx)
    apply_pass(Prefuse(tokens=2), view, ctx)
    assert view.model.get_submodule(SLOT).fuse0.mlp.up_proj.out_features == 24
    for later in (
        Structured(ratio=0.6, multiple=4, what=("hidden",), importance="magnitude"),
        Layers(criterion="random"),
    ):
        with pytest.raises(Unmet, match=r"more parts than its config says[\s\S]*connector\.fuse0"):
            later.requires(view, ctx)


def test_uneven_blocks_before_it(tmp_path):
    """Blocks whose shapes no config says: the copies take theirs from the checkpoint."""
    model, batch = zoo.model("llava"), zoo.batch("llava", 2)
    view = view_of(model)
    ctx = context(view, None, [batch])
    step = Structured(ratio=0.5, multiple=4, what=("mlp",), importance="magnitude", allocation="global")
    apply_pass(step, view, ctx)
    assert view.ledger.uneven
    apply_pass(Prefuse(tokens=2, blocks=2, gate=0.5), view, ctx)
    storage.save(view, tmp_path / "saved")
    again = storage.load_model(tmp_path / "saved", find=passes.find)
    assert torch.equal(logits(again.model, batch), logits(view.model, batch))


# ---------------------------------------------------------------------------------------------- refusals and promises


@pytest.mark.parametrize("name", ELSEWHERE)
def test_refused_by_name(name):
    view = view_of(zoo.model(name))
    with pytest.raises(Unmet, match="cannot put blocks in front"):
        Prefuse().requires(view, context())
    assert installed(view.model) is None and SLOT not in dict(view.model.named_children())


def test_settings_and_promise(llava):
    view = view_of(copy.deepcopy(llava[0]))
    with pytest.raises(Unmet, match="more blocks than there are"):
        Prefuse(blocks=4).requires(view, context())
    step = Prefuse(tokens=2, blocks=2, gate=0.7)
    view = copy.deepcopy(llava[2])
    step.ensures(view)
    with pytest.raises(PromiseBroken, match="another one"):
        Prefuse(tokens=3).ensures(view)
    with pytest.raises(Unmet, match="reduced already"):
        Prefuse().requires(view, context())
    fusion = view.model._modules.pop(SLOT)
    with pytest.raises(PromiseBroken, match="blocks are gone"):
        step.ensures(view)
    view.model.add_module(SLOT, fusion)
    remove(view.model)
    assert "generate" not in vars(view.model)
    with pytest.raises(PromiseBroken, match="no reduction"):
        step.ensures(view)
    for bad in ({"tokens": 0}, {"blocks": 0}, {"gate": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Prefuse(**bad)


def test_parameters_up_flops_down():
    """Of a LLaVA with more tokens than the zoo's: what the report says of cost."""
    import transformers as tf

    from svlm.calib.cost import cost

    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**zoo.VISION | {"image_size": 32}),
        text_config=tf.LlamaConfig(**zoo.TEXT | {"num_hidden_layers": 6}),
        image_token_index=zoo.IMAGE,
        image_seq_length=64,
    )
    torch.manual_seed(0)
    view = view_of(tf.AutoModelForImageTextToText.from_config(config).eval())
    g = torch.Generator().manual_seed(0)
    batch = zoo.text_batch(64, 1, g) | {"pixel_values": torch.randn(1, 3, 32, 32, generator=g)}
    before = cost(view, batch, latency=False)
    apply_pass(Prefuse(tokens=4), view, context())
    after = cost(view, batch, latency=False)
    assert before["visual_tokens"] == 64 and after["visual_tokens"] == 4
    assert after["flops"]["prefill"] < 0.5 * before["flops"]["prefill"]
    new = sum(p.numel() for p in view.model.get_submodule(SLOT).parameters())
    assert after["parameters"] == before["parameters"] + new
    assert after["parameters_by_part"]["connector"] == before["parameters_by_part"]["connector"] + new
    assert after["parameters_by_part"]["language"] == before["parameters_by_part"]["language"]
    assert after["flops"]["decode"] < before["flops"]["decode"]


def test_the_openvino_runtime_refuses_it(llava):
    from svlm.compress.runtime.openvino.convert import image_modules

    assert image_modules(view_of(copy.deepcopy(llava[0])))
    with pytest.raises(Unmet, match=r"prefusion\.fuse0 works on text"):
        image_modules(llava[2])
