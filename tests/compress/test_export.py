"""Packed layouts against a naive reader, what is refused and why, and the command line. No other project is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from svlm import passes
from svlm.cli import main
from svlm.compress import storage
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.errors import OutputError, UsageError, WorkFailed
from svlm.compress.export import awq, gptq
from svlm.compress.export.common import Rounded, half_scales, integers, zeros_of
from svlm.compress.export.run import NOTE_FILE, export_model
from svlm.compress.export.skeleton import initialised_by_weight
from svlm.compress.export.table import FORMATS, find_format
from svlm.compress.runtime.grid import Grid, dequantize, quantize
from svlm.passes.quantize._rtn import absmax_grid
from tests import zoo
from tests.compress.test_compressed_tensors import rounded
from tests.oracles import packed

BF16 = torch.bfloat16


def linear(bits: int, group: int, symmetric: bool, shape: tuple[int, int] = (32, 64)) -> tuple[torch.Tensor, Grid]:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    grid = absmax_grid(w, bits, group, symmetric, BF16)
    return quantize(w, grid), grid


def exact(q: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(q - zero) * scale without rounding, float64."""
    spread = q.shape[1] // grid.scale.shape[1]
    zero, scale = (t.double().repeat_interleave(spread, 1) for t in (zeros_of(grid), grid.scale))
    return (q.double() - zero) * scale


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (3, False), (4, True), (4, False), (8, True)])
def test_gptq_words_say_what_a_naive_reader_reads(bits: int, symmetric: bool, group: int, v2: bool) -> None:
    q, grid = linear(bits, group, symmetric)
    if grid.zero is not None and not v2:
        grid.zero = grid.zero.clamp_min(grid.low + 1)
    qweight, qzeros = gptq.pack_linear(q, zeros_of(grid), bits, v2=v2)
    assert qweight.shape == (64 * bits // 32, 32) and qzeros.shape == (grid.scale.shape[1], 32 * bits // 32)
    assert qweight.dtype == qzeros.dtype == torch.int32
    g_idx = torch.arange(64) // (64 // grid.scale.shape[1])
    read = packed.gptq(qweight, qzeros, grid.scale.t(), g_idx, bits, v2)
    assert torch.equal(read, exact(q, grid))


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_words_say_what_a_naive_reader_reads(symmetric: bool, group: int) -> None:
    q, grid = linear(4, group, symmetric)
    qweight, qzeros = awq.pack_outputs(q.t()), awq.pack_outputs(zeros_of(grid).t())
    assert qweight.shape == (64, 4) and qzeros.shape == (grid.scale.shape[1], 4) and qweight.dtype == torch.int32
    assert torch.equal(packed.awq(qweight, qzeros, grid.scale.t()), exact(q, grid))


def test_scales_that_fp16_cannot_hold_are_counted_and_bounded() -> None:
    q = torch.full((2, 4), 7, dtype=torch.int8)
    books = Rounded()
    fine = Grid(4, -1, True, torch.tensor([[0.01], [2.0**-17]], dtype=BF16))
    assert torch.equal(half_scales("fine", fine, q, books).float(), fine.scale.float())
    assert (books.scales, books.changed) == (2, 0) and "all 2 scales" in books.sentence()
    tiny = Grid(4, -1, True, torch.tensor([[0.01], [1.9e-6]], dtype=BF16))
    half = half_scales("tiny", tiny, q, books)
    moved = float((half.double() - tiny.scale.double()).abs().max())
    assert (books.scales, books.changed) == (4, 1) and 0 < moved <= 2.0**-25
    assert books.largest == pytest.approx(7 * moved) and books.where == "tiny"
    assert "1 of 4 scales" in books.sentence()


def test_a_weight_off_its_grid_is_not_packed() -> None:
    q, grid = linear(4, 16, True)
    value = dequantize(q, grid)
    assert torch.equal(integers("x", value, grid), q)
    value[2, 5] += 0.3 * float(grid.scale[2, 0])
    with pytest.raises(WorkFailed, match="off its grid"):
        integers("x", value, grid)


def source(family: str, kinds: dict[str, tuple[int, int, bool]], folder: Path) -> tuple[ModelView, Path]:
    view = view_of(zoo.model(family))
    rounded(view, kinds)
    storage.save(view, folder / "src")
    return view, folder / "src"


def export(spec: Path, name: str, out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Facts, tensors and quantization_config of an export."""
    facts = export_model(spec, name, out, find=passes.find, **options)
    tensors: dict[str, Any] = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    return facts, tensors, json.loads((out / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("family", "old"), [("llava", "language_model.model."), ("smolvlm", "model.text_model.")])
@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_the_files_hold_our_integers_under_the_names_that_transformers_saves(
    name: str, family: str, old: str, tmp_path: Path
) -> None:
    view, spec = source(family, {"language": (4, 16, False)}, tmp_path)
    for grid in view.grids.values():  # what v1 cannot store is tested below
        assert grid.zero is not None
    dense = name == "gptq" and any(int(g.zero.min()) == g.low for g in view.grids.values() if g.zero is not None)
    facts, tensors, config = export(spec, name, tmp_path / "out", dense=dense)
    assert facts == json.loads((tmp_path / "out" / NOTE_FILE).read_text())
    assert facts["packed"] == len(view.grids) - len(facts["dense"]) > 15
    assert not (tmp_path / "out" / "svlm.json").exists()
    (path,) = [p for p in view.grids if p.endswith("layers.1.self_attn.k_proj")]
    saved = old + path.partition("layers.")[1] + path.partition("layers.")[2]
    words = [tensors[f"{saved}.{part}"] for part in ("qweight", "qzeros", "scales")]
    assert words[2].dtype == torch.float16 and f"{saved}.weight" not in tensors
    read = packed.awq(*words) if name == "awq" else packed.gptq(*words, tensors[f"{saved}.g_idx"], 4, name == "gptq_v2")
    ours = view.linear(path).module.weight
    assert torch.equal(read.to(BF16).float(), ours)
    assert (config["bits"], config["group_size"]) == (4, 16)
    if name == "awq":
        assert config["zero_point"] and config["version"] == "gemm" and "lm_head" in config["modules_to_not_convert"]
        assert path.partition(".layers.")[0] not in config["modules_to_not_convert"]
    else:
        assert config["checkpoint_format"] == name and config["sym"] is False
        assert config["block_name_to_quantize"] == path.partition(".layers.")[0] + ".layers"
        assert (config["modules_in_block_to_quantize"] is None) == (not facts["dense"])


def test_v1_refuses_a_zero_point_of_zero_and_v2_takes_it(tmp_path: Path) -> None:
    view = view_of(zoo.model("smolvlm"))
    path = "model.text_model.layers.0.mlp.up_proj"
    with torch.no_grad():
        view.linear(path).module.weight[3].abs_()  # nothing below zero: the lowest integer stands for 0
    rounded(view, {"language": (4, -1, False)})
    storage.save(view, tmp_path / "src")
    with pytest.raises(UsageError, match="cannot hold") as caught:
        export(tmp_path / "src", "gptq", tmp_path / "v1")
    assert caught.value.where == path and "gptq_v2" in caught.value.found and "--dense" in caught.value.change
    assert not (tmp_path / "v1").exists()
    facts, *_ = export(tmp_path / "src", "gptq_v2", tmp_path / "v2")
    assert facts["packed"] == len(view.grids) and not facts["dense"]


@pytest.mark.parametrize("what", ["scale", "bias"])
def test_what_is_beyond_fp16_is_refused(what: str, tmp_path: Path) -> None:
    view = view_of(zoo.model("llava"))
    path = "model.multi_modal_projector.linear_2"
    module = view.linear(path).module
    with torch.no_grad():
        (module.bias if what == "bias" else module.weight).fill_(1e6)
    rounded(view, {"connector": (4, -1, True), "language": (4, -1, True)})
    storage.save(view, tmp_path / "src")
    with pytest.raises(UsageError, match="cannot hold 1 of") as caught:
        export(tmp_path / "src", "awq", tmp_path / "out")
    assert caught.value.where == path and f"a {what} of" in caught.value.found


def test_mixed_grids_are_refused_or_written_dense_with_the_same_values(tmp_path: Path) -> None:
    view, spec = source("llava", {"connector": (8, -1, True), "language": (4, 16, True)}, tmp_path)
    with pytest.raises(UsageError, match="cannot hold 2 of") as caught:
        export(spec, "gptq", tmp_path / "out")
    assert caught.value.where == "model.multi_modal_projector.linear_1"
    assert "8 bits, group -1" in caught.value.found and "and 1 more" in caught.value.found
    facts, tensors, config = export(spec, "gptq", tmp_path / "out", dense=True)
    assert set(facts["dense"]) == {f"model.multi_modal_projector.linear_{i}" for i in (1, 2)}
    assert any("2 linears" in note and "written dense" in note for note in facts["notes"])
    ours = view.linear("model.multi_modal_projector.linear_1").module.weight
    assert torch.equal(tensors["multi_modal_projector.linear_1.weight"].float(), ours)
    assert config["block_name_to_quantize"] == "model.language_model.layers"


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [("awq", (3, 16, True), "3 bits"), ("gptq", (4, 8, True), "groups of 8"), ("awq", (4, 8, True), "groups of 8")],
)
def test_a_kind_that_the_format_does_not_know_is_refused(
    name: str, kind: tuple[int, int, bool], says: str, tmp_path: Path
) -> None:
    _, spec = source("llava", {"language": kind}, tmp_path)
    for dense in (False, True):
        with pytest.raises(UsageError, match="cannot hold any") as caught:
            export(spec, name, tmp_path / "out", dense=dense)
        assert caught.value.where.startswith("model.language_model.layers.0") and says in caught.value.found


def test_three_bits_need_widths_that_32_divides(tmp_path: Path) -> None:
    _, spec = source("llava", {"language": (3, -1, True)}, tmp_path)
    with pytest.raises(UsageError) as caught:
        export(spec, "gptq", tmp_path / "out")
    assert "packed by 32" in caught.value.found


def test_what_no_loader_could_take_is_refused(tmp_path: Path) -> None:
    plain = view_of(zoo.model("llava"))
    plain.storage_dtype = BF16
    storage.round_to_storage(plain)
    storage.save(plain, tmp_path / "plain")
    for name in ("gptq", "awq", "bnb", "compressed-tensors"):
        with pytest.raises(UsageError, match="this model has none"):
            export(tmp_path / "plain", name, tmp_path / "out")
    with pytest.raises(UsageError, match="did you mean 'gptq'"):
        export(tmp_path / "plain", "gpt", tmp_path / "out")
    view, spec = source("blip-2", {"language": (4, 16, True)}, tmp_path)
    with pytest.raises(UsageError, match="input_ids") as caught:
        export(spec, "gptq", tmp_path / "out")
    assert caught.value.where in view.grids
    with pytest.raises(UsageError, match="cannot hold any") as caught:
        export(spec, "bnb", tmp_path / "out")
    assert caught.value.where in view.grids and "one scale a row" in caught.value.found
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    with pytest.raises(OutputError):
        export(spec, "awq", tmp_path / "mine")
    assert not (tmp_path / "out").exists() and (tmp_path / "mine" / "letter.txt").read_text() == "keep"


def test_linears_that_are_initialised_through_their_weight_are_found() -> None:
    def found(family: str, stub: bool) -> set[str]:
        view = view_of(zoo.model(family))
        refs = [ref.path for part in ("vision", "connector", "language") for ref in view.linears(part)]
        return {path.rpartition(".")[2] for path in initialised_by_weight(view.model, refs, stub=stub)}

    def refs_of(family: str) -> set[str]:
        return {ref.path.rpartition(".")[2] for ref in view_of(zoo.model(family)).linears("vision")}

    assert found("llava", stub=False) == set()
    assert found("llava", stub=True) == refs_of("llava")  # CLIP asks whether there is a weight, and then uses it
    assert found("llava-onevision", stub=False) == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert found("qwen2-vl", stub=True) == set()


def test_the_list_of_what_is_not_packed_is_short_and_exact() -> None:
    view = view_of(zoo.model("qwen2-vl"))
    language = {ref.path for ref in view.linears("language")}
    assert sorted(awq.unpacked_modules(view.model, language)) == ["lm_head", "model.visual"]
    some = language - {"model.language_model.layers.1.mlp.up_proj"}
    assert "model.language_model.layers.1.mlp.up_proj" in awq.unpacked_modules(view.model, some)

    class Ambiguous(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    with pytest.raises(WorkFailed, match="packed linear"):
        awq.unpacked_modules(Ambiguous(), {"out_proj"})


def test_the_command_line_copies_what_is_in_the_format_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view, spec = source("llava", {"vision": (3, 8, True), "language": (4, 16, False)}, tmp_path)
    (spec / "report.json").write_text("{}")
    arguments = ["export", str(spec), "--format", "compressed-tensors", "-o", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packed"] == len(view.grids) and facts["bytes"] == storage.weight_bytes(spec)
    assert not (tmp_path / "out" / "report.json").exists()
    ours = storage.load_model(tmp_path / "out", find=passes.find)
    batch = zoo.batch("llava")
    with torch.no_grad():
        assert torch.equal(ours.model(**batch).logits, view.model(**batch).logits)
    assert main(arguments) == 2  # the folder holds something now
    assert "holds something" in capsys.readouterr().err


def test_the_command_line_says_what_was_written_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, spec = source("llava", {"connector": (8, -1, True), "language": (4, 16, True)}, tmp_path)
    arguments = ["export", str(spec), "--format", "awq", "-o", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "model.multi_modal_projector.linear_1" in capsys.readouterr().err
    assert main([*arguments, "--dense"]) == 0
    said = capsys.readouterr().out
    assert "21 linears packed" in said and "note: 2 linears (model.multi_modal_projector.linear_1, ...)" in said


def test_help_says_of_each_format_where_it_runs_packed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, row in FORMATS.items():
        assert f"{name}: " in text and find_format(name) is row
        assert f"packed: {row.packed}" in text and f"unpacked: {row.unpacked}" in text and row.loader in text
