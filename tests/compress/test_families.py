"""Rows: those that ship, a user's own, and what is said where none fits."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from svlm.compress import families
from svlm.compress.anatomy import view_of
from svlm.compress.blocks import LAYOUTS
from svlm.compress.errors import ModelError
from svlm.compress.families import Family
from svlm.compress.inspect import inspect_table
from tests import zoo

everywhere = pytest.mark.parametrize("family", zoo.FAMILIES)


@everywhere
def test_rows_survive_json_and_yaml(family: str, tmp_path: Any) -> None:
    model = zoo.model(family)
    view = view_of(model)
    text = yaml.safe_dump(json.loads(json.dumps(view.family.to_json())))
    (tmp_path / "row.yaml").write_text(text)
    row = Family.from_yaml(tmp_path / "row.yaml")
    assert row == dataclasses.replace(view.family, own=True)
    again = view_of(model, rows=[row])
    assert [u.name for u in again.units] == [u.name for u in view.units]


@everywhere
def test_no_weights_are_needed(family: str) -> None:
    with torch.device("meta"):
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_config(zoo.CONFIGS[family]())
    assert all(p.is_meta for p in model.parameters())
    assert set(inspect_table(view_of(model))["parts"]) >= {"vision", "language", "head"}


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "internvl", "florence-2", "trocr"])
def test_an_unknown_family_says_what_was_seen_and_the_row_to_add(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    model = zoo.model(family)
    wanted = view_of(model)
    monkeypatch.setattr(families, "FAMILIES", ())
    with pytest.raises(ModelError) as error:
        view_of(model, source="somewhere")
    text = str(error.value)
    assert model.config.model_type in text and type(model).__name__ in text and "somewhere" in text
    assert f"3 x {type(wanted.units[0].module).__name__}" in text or family == "florence-2"
    assert "list " in text and "anatomy" in text
    row = text[text.index("name: ") :]
    (tmp_path / "row.yaml").write_text("\n".join(line.removeprefix("    ") for line in row.splitlines()))
    if family == "trocr":  # no uniform way in finds its tower: the user fills it in
        draft = (tmp_path / "row.yaml").read_text()
        assert "THE DOTTED PATH OF THE VISION TOWER" in draft
        (tmp_path / "row.yaml").write_text(draft.replace("THE DOTTED PATH OF THE VISION TOWER", "encoder"))
    drafted = view_of(model, rows=[Family.from_yaml(tmp_path / "row.yaml")])
    if family in ("florence-2", "trocr"):  # a draft to correct: nested blocks, parts below an unknown tower
        assert sum(len(unit.linears) for unit in drafted.units) >= sum(len(unit.linears) for unit in wanted.units)
        return
    found = {ref.path: (ref.role, ref.unit.part) for u in drafted.units for ref in u.linears}
    assert found == {ref.path: (ref.role, ref.unit.part) for u in wanted.units for ref in u.linears}


@pytest.mark.parametrize("cls", ["CLIPEncoderLayer", "LlamaDecoderLayer", "LlavaMultiModalProjector"])
def test_an_unknown_block_class_is_served_by_a_users_row(
    cls: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    model = zoo.model("llava")
    wanted = view_of(model)
    monkeypatch.delitem(LAYOUTS, cls)
    with pytest.raises(ModelError) as error:
        view_of(model)
    text = str(error.value)
    assert cls in text and "extends: llava" in text
    row = text[text.index("extends: ") :]
    (tmp_path / "row.yaml").write_text("\n".join(line.removeprefix("    ") for line in row.splitlines()))
    view = view_of(model, rows=[Family.from_yaml(tmp_path / "row.yaml")])
    assert view.family.own and cls in view.family.blocks
    stages = [[[ref.path for ref in s] for s in u.stages] for u in view.units]
    assert stages == [[[ref.path for ref in s] for s in u.stages] for u in wanted.units]


def test_linears_that_no_row_names_are_an_error() -> None:
    model = zoo.model("llava")
    model.model.extra = nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"model\.extra"):
        view_of(model)
    del model.model.extra
    model.model.language_model.layers[1].adapter = nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"layers\.1\.adapter"):
        view_of(model)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"name": "x"}, "lacks: model_types, places"),
        ({"nmae": "x"}, "did you mean 'name'"),
        ({"extends": "lava"}, "did you mean 'llava'"),
        ({"name": "x", "model_types": ["x"], "places": [{"part": "visoin", "path": "a"}]}, "did you mean 'vision'"),
        ({"name": "x", "model_types": ["x"], "places": [{"parts": "vision", "path": "a"}]}, "did you mean 'part'"),
        ({"extends": "llava", "blocks": {"B": {"steps": [{"linears": {"attn.qq": "q"}}]}}}, "no such role"),
        ({"extends": "llava", "blocks": {"B": {"stages": []}}}, "did you mean 'steps'"),
        (["x"], "mapping"),
    ],
)
def test_broken_rows(row: Any, words: str, tmp_path: Any) -> None:
    path = tmp_path / "row.yaml"
    path.write_text(yaml.safe_dump(row))
    with pytest.raises(ModelError) as error:
        Family.from_yaml(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_a_row_that_points_nowhere(tmp_path: Any) -> None:
    model = zoo.model("llava")
    row = Family.from_json({"extends": "llava", "tower": "model.eye"})
    with pytest.raises(ModelError, match=r"model\.eye"):
        view_of(model, rows=[row])
    with pytest.raises(ModelError, match="cannot read"):
        Family.from_yaml(tmp_path / "missing.yaml")
