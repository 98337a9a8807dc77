"""The wheel holds svlm/ and nothing beside it, and all that svlm needs at run time."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("calib", "compress", "passes", "recipes")
NEEDED = [
    "svlm/__init__.py", "svlm/__main__.py", "svlm/cli.py", "svlm/py.typed", "svlm/passes/__init__.py",
    "svlm/recipes/default.yaml", "svlm/recipes/int4.yaml", "svlm/recipes/tokens-half.yaml", "svlm/recipes/tiny.yaml",
    "svlm/calib/demo/model/model.safetensors", "svlm/calib/demo/model/config.json",
    "svlm/calib/demo/model/processor_config.json", "svlm/calib/demo/model/tokenizer.json",
    "svlm/calib/demo/model/chat_template.jinja", "svlm/calib/demo/atlas.webp", "svlm/calib/demo/atlas.json",
    "svlm/compress/report/report.html", "svlm/compress/report/base.html", "svlm/compress/report/style.css",
]  # fmt: skip


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is in a wheel built from a copy of the tree (so that no build/ folder is left in it)."""
    tree = tmp_path_factory.mktemp("wheel") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "py.typed", "__init__.py", "__main__.py", "cli.py"):
        shutil.copy(ROOT / name, tree)
    for room in (*ROOMS, "tests", "docs", "benchmarks"):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", "dist", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("svlm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_nothing_lies_outside_svlm(names: list[str]) -> None:
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"svlm"}


def test_what_svlm_needs_is_there(names: list[str]) -> None:
    assert not set(NEEDED) - set(names)


def test_every_module_of_the_tree_is_there(names: list[str]) -> None:
    modules = {f"svlm/{p.relative_to(ROOT)}" for room in ROOMS for p in (ROOT / room).rglob("*.py")}
    assert not modules - set(names), "pyproject.toml's list of packages lacks a room"


def test_nothing_is_there_that_a_user_does_not_run(names: list[str]) -> None:
    assert not [n for n in names if n.startswith(("svlm/tests", "svlm/benchmarks", "svlm/docs")) or "__pycache__" in n]
