"""Imports go downwards only: cli -> passes -> calib -> compress."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# a room may import from rooms of its own rank and below
RANK = {"compress": 0, "recipes": 0, "calib": 1, "passes": 2, "cli": 3, "__main__": 4, "__init__": 4}
ROOMS = ("compress", "calib", "passes", "recipes")
FILES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])


def _room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def _imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name inside svlm) of every import of the package by itself, wherever it stands in the file."""
    package = ("svlm", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "svlm":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            for alias in node.names:
                yield node.lineno, ".".join([*base, *([node.module] if node.module else []), alias.name])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "svlm":
            yield node.lineno, f"{node.module}.{node.names[0].name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    mine = RANK[_room(path)]
    for line, name in _imports(tree, path):
        target = name.split(".")[1] if "." in name else "__init__"
        if target not in RANK:  # a name of the root itself, as in `from . import __version__`
            target = "__init__"
        assert RANK[target] <= mine, f"{path.name}:{line} imports {name}: {_room(path)} may not import {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_package_imports_itself_relatively(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    absolute = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "svlm")
        or (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "svlm" for a in node.names))
    ]
    assert not absolute, f"absolute imports of svlm in lines {absolute}"


def test_the_test_sees_an_upward_import(tmp_path: Path) -> None:
    tree = ast.parse("def f():\n    from ..passes import find\n    from ...calib.walk import Walk\n")
    names = [name for _, name in _imports(tree, ROOT / "compress" / "export" / "some.py")]
    assert names == ["svlm.compress.passes.find", "svlm.calib.walk.Walk"]
    assert RANK[names[1].split(".")[1]] > RANK["compress"]


def test_every_room_is_looked_at() -> None:
    assert {_room(path) for path in FILES} == set(RANK)
    assert len(FILES) > 30
