"""Bad input through the command line: a message that names it, a non-zero exit code, nothing left half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import svlm
from svlm import cli
from svlm.compress import disk
from svlm.compress.errors import OutputError, RecipeError, Unmet, WorkFailed
from svlm.compress.gate import Gate
from svlm.compress.recipe import Recipe
from svlm.compress.stages import RunFolder, StageFolder
from svlm.compress.storage import DEMO
from svlm.passes import api, find

SMALL = {
    "calibration": {"fit": 4, "check": 8},
    "gate": None,
    "passes": [{"quantize.rtn": {"bits": 4, "group": 64}}],
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures and the rows that ask about them."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(8):
        Image.new("RGB", (96, 96), (30 * i, 90, 200 - 20 * i)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what colour is the background", "answer": "red"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _lacks_an_image(folder: Path) -> None:
    (folder / "3.png").unlink()


def _cuts_an_image_off(folder: Path) -> None:
    data = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(data[: len(data) // 2])


def _empties_the_file(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("")


def _lacks_a_question(folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"image": "0.png", "answer": "red"}\n')


def _breaks_a_letter(folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"image": "0.png", "question": "what is \\ud83d", "answer": "red"}\n')


def _nothing(folder: Path) -> None:
    pass


BROKEN = [
    (_lacks_an_image, SMALL, "3.png"),
    (_cuts_an_image_off, SMALL, "3.png"),
    (_empties_the_file, SMALL, "rows.jsonl"),
    (_lacks_a_question, SMALL, "question"),
    (_breaks_a_letter, SMALL, "line 9"),
    (_nothing, SMALL | {"gate": {"metric": ["exact_match"], "max_drop": 0.1}}, "exact_match"),
    (_nothing, SMALL | {"calibration": {"fit": 0, "check": 8}}, "fit"),
    (_nothing, SMALL | {"passes": [{"quantize.rtn": {"where": ["langage"]}}]}, "langage"),
    (_nothing, SMALL | {"passes": [{"quantize.rtn": {"where": ["language.blocks[99]"]}}]}, "language.blocks[99]"),
]


@pytest.mark.parametrize(
    ("breaks", "recipe", "named"), BROKEN, ids=[f"{b.__name__.strip('_')}-{n}" for b, _, n in BROKEN]
)
def test_data_and_recipes(
    pictures: Path, capsys: pytest.CaptureFixture[str], breaks: Callable[[Path], None], recipe: Any, named: str
) -> None:
    breaks(pictures)
    (pictures / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = pictures / "out"
    code = cli.main(
        ["compress", "demo", "-r", f"{pictures / 'recipe.yaml'}", "-d", f"{pictures / 'rows.jsonl'}", "-o", f"{out}"]
    )
    said = capsys.readouterr().err
    assert code == 2, said
    assert named in said and "svlm: error:" in said and "Traceback" not in said
    assert not out.exists()


def _writes_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[next(k for k in tensors if "q_proj" in k)][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _loses_a_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, held in shards.items():
        save_file({k: tensors[k] for k in held}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: shard for shard, held in shards.items() for k in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()


def _cuts_the_weights_off(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)


def _loses_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(k for k in tensors if "v_proj" in k)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("breaks", "named"),
    [
        (_writes_nan, "q_proj"),
        (_loses_a_shard, "model-00002-of-00002"),
        (_cuts_the_weights_off, "model"),
        (_loses_a_tensor, "v_proj"),
    ],
)
def test_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], breaks: Callable[[Path], None], named: str
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(DEMO, model)
    breaks(model)
    code = cli.main(["compress", f"{model}", "-r", "int4", "-d", "demo", "-o", f"{out}"])
    said = capsys.readouterr().err
    assert code == 2, said
    assert named in said and "svlm: error:" in said and "Traceback" not in said
    assert not out.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many MB; where mounting is not allowed, there is nothing to test on."""
    mounted: list[Path] = []

    def mounts(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("needs leave to mount a small tmpfs")
        mounted.append(folder)
        return folder

    yield mounts
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_too_small_is_noticed_before_the_work(
    small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(6)
    assert cli.main(["compress", "demo", "-r", "int4", "-o", f"{disk / 'out'}"]) == 3
    said = capsys.readouterr().err
    assert "the disk is too full" in said and "MB free" in said and "Traceback" not in said
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["before-pass", "before-result"])
def test_a_disk_that_fills_up_loses_nothing_and_resume_goes_on(small_disk: Callable[[int], Path], stage: int) -> None:
    disk = small_disk(60)
    out, hog = disk / "out", disk / "hog"
    plan = Recipe.from_json(SMALL, find)

    def fill(entry: dict[str, Any]) -> None:
        if entry["index"] == stage:
            with hog.open("wb") as file:
                file.write(bytes(shutil.disk_usage(disk).free - 400_000))

    with pytest.raises(WorkFailed) as caught:
        api.compress_model("demo", plan, "demo", out, api.Options(latency=False, on_stage=fill))
    assert "disk is full" in str(caught.value) and caught.value.exit_code == 3
    assert not (out / "svlm.json").exists(), "what is not whole does not look whole"
    hog.unlink()
    report = api.compress_model("demo", plan, "demo", out, api.Options(latency=False, resume=True))
    assert [s["verdict"] for s in report["stages"]] == ["baseline", "passed"]
    assert svlm.load(out) is not None


@pytest.mark.slow
def test_what_the_user_put_into_out_survives_another_run(tmp_path: Path) -> None:
    plan = Recipe.from_json(SMALL, find)
    api.compress_model("demo", plan, "demo", tmp_path / "out", api.Options(latency=False))
    (tmp_path / "out" / "notes.txt").write_text("good at counting")
    api.compress_model("demo", plan, "demo", tmp_path / "out", api.Options(latency=False, overwrite=True))
    assert (tmp_path / "out" / "notes.txt").read_text() == "good at counting"


@pytest.mark.slow
def test_a_recipe_that_cannot_run_takes_nothing_from_an_earlier_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.compress_model("demo", Recipe.from_json(SMALL, find), "demo", out, api.Options(latency=False, keep_stages=True))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "lock"}
    impossible = Recipe.from_json(SMALL | {"passes": [{"quantize.awq": {"group": 7}}]}, find)
    with pytest.raises(Unmet, match="group 7"):
        api.compress_model("demo", impossible, "demo", out, api.Options(latency=False, overwrite=True))
    assert all(p.read_bytes() == content for p, content in before.items())


def test_two_runs_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "out"), RunFolder(tmp_path / "out")
    first.claim(resume=False, overwrite=False)
    with first.locked(), pytest.raises(OutputError, match="another run"), second.locked():
        pass
    with second.locked():
        pass
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="no folder"):
        RunFolder(tmp_path / "link").claim(resume=False, overwrite=False)


WHOLE = {"index": 0, "verdict": "passed", "quality": {}, "cost": {}}
DAMAGED = ("[]", '{"schema": 1}', "{", '{"schema": 1, "storage_dtype": "nn"}', '{"stages": [{}]}', '{"stages": [null]}')


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_books_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    shutil.copytree(DEMO, tmp_path / "out")
    for name in ("svlm.json", "report.json"):
        (tmp_path / "out" / name).write_text(content)
    for command in (["inspect", f"{tmp_path / 'out'}"], ["report", f"{tmp_path / 'out'}"]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said and "Error:" not in said.replace("JSONDecodeError:", ""), said


@pytest.mark.parametrize(("entry", "items"), [({}, [1]), (None, [1]), ({"index": 0}, [1]), (WHOLE, []), (WHOLE, None)])
def test_a_stage_that_is_not_whole_is_not_finished(tmp_path: Path, entry: object, items: object) -> None:
    folder = StageFolder(tmp_path, tmp_path / "scratch")
    folder.finish(WHOLE, [1])
    assert folder.finished() == WHOLE
    folder.finish(entry, items)
    assert folder.finished() is None


def test_gates_that_say_nothing() -> None:
    steps = {"passes": ["quantize.rtn", {"quantize.gptq": {}, "gate": {"metric": "kl", "max": 1}}]}
    ungated = Recipe.from_json(steps | {"gate": None}, find)
    assert [step.gate for step in ungated.steps] == [None, Gate("kl", max=1)]
    assert Recipe.from_json(steps, find).steps[0].gate is not None
    with pytest.raises(RecipeError):
        Recipe.from_json(steps | {"gate": False}, find)
    with pytest.raises(RecipeError):
        Gate.parse("")
    with pytest.raises(RecipeError, match="not YAML"):
        ungated.override([("quantize.rtn", "bits", "[")])


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for make in (disk.make_folder, lambda path: disk.write_json(path / "a.json", {})):
        with pytest.raises(OutputError, match="cannot make a folder here"):
            make(tmp_path / "file" / "below")


def test_files_of_a_folder_can_be_read_by_others(tmp_path: Path) -> None:
    with disk.whole_folder(tmp_path / "made") as folder:
        (folder / "weights").touch(mode=0o600)
    assert (tmp_path / "made" / "weights").stat().st_mode & 0o777 == 0o644
