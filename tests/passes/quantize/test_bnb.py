"""quantize.bnb: what is saved, who loads it, what later passes, runtimes and exports do with codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svlm import passes
from svlm.calib.walk import Walk
from svlm.compress import storage
from svlm.compress.anatomy import ModelView
from svlm.compress.errors import ModelError, PromiseBroken, RecipeError, Unmet, UsageError, WorkFailed
from svlm.compress.export.compressed_tensors import stock_obstacle
from svlm.compress.export.run import export_model
from svlm.compress.inspect import part_sizes
from svlm.compress.pipeline import ask_promises
from svlm.compress.runtime.codebook import Codebook, codebooks
from svlm.compress.runtime.grid import Grid, quantize
from svlm.compress.runtime.kernels.use import use_kernels
from svlm.passes.distill.logits import Logits
from svlm.passes.prune.structured import Structured
from svlm.passes.quantize.bnb import BNB
from svlm.passes.quantize.gptq import GPTQ
from svlm.passes.quantize.hqq import HQQ
from tests import zoo
from tests.oracles import nf4
from tests.passes.quantize.helpers import ALL, BF16, batches, context, fresh, run, weights

DOWN = "model.language_model.layers.0.mlp.down_proj"
SAVED = "language_model.model.layers.0.mlp.down_proj"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def again(view: ModelView, folder: Path) -> ModelView:
    """Saved and loaded: the same weights, the same codebooks, the same promises."""
    storage.save(view, folder)
    loaded = storage.load_model(folder, find=passes.find)
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in view.model.state_dict().items())
    assert loaded.grids.keys() == view.grids.keys()
    for path, book in codebooks(view.grids).items():
        other = loaded.grids[path]
        assert isinstance(other, Codebook) and (other.levels, other.dtype) == (book.levels, book.dtype)
        assert torch.equal(other.scales(), book.scales()) and torch.equal(other.absmax, book.absmax)
    assert ask_promises(loaded, passes.find) == (list(dict.fromkeys(r.name for r in view.ledger)), None)
    return loaded


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_what_is_saved_is_bitsandbytes_layout(levels: str, double: bool, tmp_path: Path) -> None:
    view, notes = run(BNB(levels=levels, double=double))
    assert notes.numbers["linears"] == len(view.grids) == len(view.linears(ALL))
    assert 0.004 < notes.numbers["relative_weight_error"] < 0.03 and notes.numbers["stock_transformers"] == "loads it"
    again(view, tmp_path / "m")
    saved, prefix = tensors(tmp_path / "m"), SAVED + "."
    mine = {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
    assert len(mine) == (6 if double else 4)
    read = nf4.read(mine, levels)
    assert torch.equal(read.float().to(BF16).float(), view.linear(DOWN).module.weight)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config["load_in_4bit"] and not config["load_in_8bit"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == (levels, double)
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    texts = sum(tensor.numel() for name, tensor in saved.items() if "quant_state" in name)
    rest = sum(tensor.numel() * tensor.element_size() for tensor in saved.values()) - texts
    assert sum(stored for _, stored in part_sizes(view).values()) == rest, "inspect counts what lies on disk"


def test_eight_bits_are_a_grid_with_the_absmax_of_the_row(tmp_path: Path) -> None:
    view = fresh()
    before = weights(view, ALL)
    run(BNB(bits=8), view)
    again(view, tmp_path / "m")
    for path, w in before.items():
        grid = view.grids[path]
        assert isinstance(grid, Grid) and (grid.bits, grid.group, grid.symmetric) == (8, -1, True)
        absmax = w.abs().amax(1)
        torch.testing.assert_close(grid.scale.float().flatten() * 127, absmax, rtol=2**-8, atol=0)
        exact = w * (127 / absmax)[:, None]
        assert float((quantize(view.weight(path), grid) - exact).abs().max()) < 1.01, (
            "half a step, and a bfloat16 scale"
        )
    facts = export_model(tmp_path / "m", "bnb", tmp_path / "out", find=passes.find)
    assert facts["packed"] == len(before) and "inputs" in facts["notes"][0] and not facts["dense"]
    saved = tensors(tmp_path / "out")
    q, scb = saved[f"{SAVED}.weight"], saved[f"{SAVED}.SCB"]
    assert (q.dtype, scb.dtype, saved[f"{SAVED}.weight_format"].item()) == (torch.int8, torch.float32, 0)
    value = (q.double() * scb.double()[:, None] / 127).to(BF16).float()
    torch.testing.assert_close(value, view.linear(DOWN).module.weight.detach(), rtol=2**-7, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] and config["llm_int8_threshold"] == 6.0


def test_an_export_of_codes_is_what_is_saved(tmp_path: Path) -> None:
    view, _ = run(BNB())
    storage.save(view, tmp_path / "m")
    facts = export_model(tmp_path / "m", "bnb", tmp_path / "out", find=passes.find)
    ours, theirs = tensors(tmp_path / "m"), tensors(tmp_path / "out")
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[name], t) for name, t in ours.items())
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("m", "out")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert facts["packed"] == len(view.grids) and facts["notes"] == []


def test_other_formats_refuse_codes_by_name(tmp_path: Path) -> None:
    view, _ = run(BNB(where=("language",)))
    storage.save(view, tmp_path / "m")
    for name in ("gptq", "awq", "compressed-tensors"):
        with pytest.raises(UsageError) as caught:
            export_model(tmp_path / "m", name, tmp_path / "out", find=passes.find, dense=True)
        assert (
            caught.value.where in view.grids and "codebook nf4" in caught.value.found and "bnb" in caught.value.change
        )


def test_codes_and_integers_in_one_model(tmp_path: Path) -> None:
    """svlm loads both; an export takes one of them, and the other dense where that is asked for."""
    view, _ = run(BNB(where=("language.mlp",)))
    view, _ = run(HQQ(bits=8, group=-1, symmetric=True, where=("vision",)), view)
    assert "not both in one model" in stock_obstacle(view)
    again(view, tmp_path / "m")
    with pytest.raises(UsageError, match="cannot hold") as caught:
        export_model(tmp_path / "m", "bnb", tmp_path / "out", find=passes.find)
    assert "4 or 8 bits in a model, not both" in caught.value.found
    facts = export_model(tmp_path / "m", "bnb", tmp_path / "out", find=passes.find, dense=True)
    assert facts["packed"] + len(facts["dense"]) == len(view.grids) and facts["packed"] and facts["dense"]
    saved = tensors(tmp_path / "out")
    lost = next(path for path in facts["dense"])
    assert saved[next(n for n in saved if n.endswith(lost.partition("layers")[2] + ".weight"))].dtype is BF16
    with pytest.raises(UsageError, match="cannot hold any") as caught:
        view, _ = run(HQQ(where=("language.mlp",), group=16))
        storage.save(view, tmp_path / "four")
        export_model(tmp_path / "four", "bnb", tmp_path / "no", find=passes.find)
    assert "4-bit codes" in caught.value.found


def test_an_embedding_of_codes_with_its_tied_head(tmp_path: Path) -> None:
    view = fresh("gemma3")
    assert view.table.head is not None
    view, notes = run(BNB(where=("head", "language")), view, batches("gemma3"))
    assert notes.numbers["embeddings"] == 1 and "nn.Linear only" in notes.numbers["stock_transformers"]
    loaded = again(view, tmp_path / "m")
    assert loaded.table.head is not None and isinstance(loaded.grids[view.table.path], Codebook)
    facts = export_model(tmp_path / "m", "bnb", tmp_path / "out", find=passes.find, dense=True)
    assert list(facts["dense"]) == [view.table.path]


def test_later_passes_refuse_codes_by_name() -> None:
    view, _ = run(BNB(where=("language",)))
    ctx = context(view)
    for step in (GPTQ(group=-1), HQQ(group=-1), BNB(bits=8)):
        with pytest.raises(Unmet, match=f"{step.name}: a linear is quantized already") as caught:
            step.requires(view, ctx)
        assert caught.value.where in view.grids
    with pytest.raises(Unmet, match="quantized already"):
        Structured(ratio=0.5, multiple=4).requires(view, ctx)
    with pytest.raises(Unmet, match="no scales"):
        Logits(train="scales").requires(view, ctx)
    with pytest.raises(Unmet, match="off their grid"):
        Logits(train="full", where=("language",)).requires(view, ctx)
    tied = fresh("gemma3")
    tied, _ = run(BNB(where=("embeddings",)), tied, batches("gemma3"))
    with pytest.raises(Unmet, match="embedding is quantized already"):
        BNB(where=("head",)).requires(tied, context(tied))


def test_the_promise_is_broken_by_a_changed_weight_and_by_other_codes(tmp_path: Path) -> None:
    view, _ = run(BNB(where=("language",)))
    step = BNB(where=("language",))
    step.ensures(view)
    book = view.grids[DOWN]
    view.grids[DOWN] = Codebook("fp4", "bfloat16", torch.ones(999))
    with pytest.raises(PromiseBroken, match="promised the codebook nf4"):
        step.ensures(view)
    view.grids[DOWN] = book
    with torch.no_grad():
        view.linear(DOWN).module.weight[2, 3] += 0.01
    with pytest.raises(PromiseBroken, match="promised weights on the codebook") as caught:
        step.ensures(view)
    assert caught.value.where == DOWN
    with pytest.raises(WorkFailed, match="off its codebook"):
        storage.save(view, tmp_path / "m")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    view, _ = run(BNB(where=("language",)))
    storage.save(view, tmp_path / "m")
    (file,) = (tmp_path / "m").glob("*.safetensors")
    left = {name: t for name, t in load_file(file).items() if name != f"{SAVED}.weight.nested_absmax"}
    save_file(left, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks a tensor") as caught:
        storage.load_model(tmp_path / "m", find=passes.find)
    assert caught.value.where == SAVED and "nested_absmax" in caught.value.found


def test_a_walk_over_codes_goes_on_after_a_kill(tmp_path: Path) -> None:
    """The scratch of a later pass holds the codebooks of its units."""
    view, _ = run(BNB(where=("language.mlp",)))
    for _ in Walk(view, batches(), "language", scratch=tmp_path):
        pass
    other, _ = run(BNB(where=("language.mlp",)))
    for path in list(other.grids):
        del other.grids[path]
    for _ in Walk(other, batches(), "language", scratch=tmp_path):
        raise AssertionError("all units were finished")
    assert other.grids.keys() == view.grids.keys()
    for path, book in codebooks(view.grids).items():
        found = other.grids[path]
        assert isinstance(found, Codebook) and torch.equal(found.scales(), book.scales())
        assert found.off_grid(other.weight(path)) == 0.0


def test_kernels_run_codes_dequantized() -> None:
    view, _ = run(BNB(where=("language.mlp",)))
    with torch.no_grad():
        wanted = view.model(**zoo.batch("llava")).logits
        facts = use_kernels(view, dtype=torch.float32)
        found = view.model(**zoo.batch("llava")).logits
    assert all("floats" in kind for kind in facts["kinds"])
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_settings_and_the_ladder() -> None:
    assert BNB().weaker() == BNB(bits=8) and BNB(bits=8).weaker() is None
    for wrong in ({"bits": 3}, {"levels": "int4"}):
        with pytest.raises(RecipeError):
            BNB.from_settings(wrong)
