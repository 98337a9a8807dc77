"""README and docs tell the truth about the tree: every room and file that they list is there, and none is left out."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("calib", "compress", "passes")
# not of the project: made by tools, or private to git and the machine that checks
UNLISTED = {"README.md", "shared"}


def _listed(document: str, heading: str) -> list[str]:
    """First words of the lines in the code block below `heading`."""
    text = (ROOT / document).read_text(encoding="utf-8")
    block = re.search(rf"^## {heading}$.*?^```\n(.*?)^```", text, flags=re.S | re.M)
    assert block is not None, f"{document} has no code block below '## {heading}'"
    return [line.split()[0] for line in block.group(1).splitlines() if line.strip()]


def _made_by_tools() -> set[str]:
    return {line.strip().rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.strip()}


def test_the_readme_map_lists_exactly_the_top_of_the_tree() -> None:
    listed = _listed("README.md", "Map")
    made = _made_by_tools()
    there = {
        f"{p.name}/" if p.is_dir() else p.name
        for p in ROOT.iterdir()
        if not p.name.startswith(".") and p.name not in UNLISTED | made and not p.name.endswith(".egg-info")
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == there


def test_the_architecture_map_lists_exactly_the_modules() -> None:
    listed = _listed("docs/architecture.md", "Every module")
    modules = {str(p.relative_to(ROOT)) for room in ROOMS for p in (ROOT / room).rglob("*.py") if p.stat().st_size}
    there = modules | {"cli.py", "__init__.py", "__main__.py", "recipes/__init__.py"}
    assert len(listed) == len(set(listed))
    assert sorted(there - set(listed)) == [], "not in docs/architecture.md"
    assert sorted(set(listed) - there) == [], "in docs/architecture.md, but not in the tree"


def test_files_named_in_the_text_exist() -> None:
    named = re.compile(r"`((?:calib|compress|passes|recipes|tests|benchmarks|docs)/[\w./-]+\.\w+)")
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for path in named.findall(document.read_text(encoding="utf-8")):
            assert (ROOT / path).is_file(), f"{document.name} names {path}"


def test_the_readme_names_every_shipped_recipe_and_every_doc() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "docs").glob("*.md")]:
        assert path.stem in text, path.name


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_script", ROOT / "benchmarks" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_in_the_readme_are_what_the_script_wrote() -> None:
    script = _script()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.partition(script.BEGIN)[2].partition(script.END)[0]
    kept = json.loads(script.KEPT.read_text(encoding="utf-8"))
    assert shown == script.block(kept)
    assert kept["recipe"]["name"] == "default"


def test_the_figures_of_verification_are_what_the_script_wrote() -> None:
    from benchmarks import gates

    kept = json.loads((ROOT / "benchmarks" / "results" / "gates.json").read_text(encoding="utf-8"))
    assert gates.table(kept) in (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
