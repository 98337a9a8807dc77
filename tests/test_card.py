"""The model card: front matter that the hub reads, what judged the model, and what the original said is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from svlm.compress.report import write_run
from svlm.compress.report.card import MARK, card, card_files
from tests import reports

THEIRS = """---
license: other
license_name: tongyi
license_link: https://example.org/licence
language: [en, de]
tags: [theirs]
---
# A model of ours
Be kind to it.
"""


def _report(source: str = "owner/big-vlm") -> dict[str, Any]:
    made = reports.rich()
    made["model"]["source"] = source
    return made


def _matter(text: str) -> dict[str, Any]:
    """Front matter as the hub's own reader takes it apart."""
    from huggingface_hub import ModelCard

    assert text.startswith("---\n")
    return ModelCard(text, ignore_metadata_errors=False).data.to_dict()


def _original(folder: Path) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(THEIRS)
    (folder / "LICENSE").write_text("all rights to you")
    (folder / "weights.md").write_text("not about licences")
    return folder


def test_the_front_matter_names_the_original_and_no_licence_of_svlms_choosing() -> None:
    text = card(_report())
    matter = _matter(text)
    assert matter["base_model"] == "owner/big-vlm"
    assert matter["base_model_relation"] == "quantized"
    assert matter["pipeline_tag"] == "image-text-to-text"
    assert {"svlm", "quantize-gptq", "prune-structured"} <= set(matter["tags"])
    assert matter["library_name"] == "svlm"
    assert "license" not in matter
    assert "# license: fill in" in text
    assert "named none that svlm found" in text


def test_a_folder_is_no_base_model() -> None:
    for source in ("demo", "./my-vlm", "/data/my vlm"):
        text = card(_report(source))
        assert "base_model" not in _matter(text)
        assert "# base_model: owner/name" in text


def test_the_card_says_verdict_stages_loading_data_and_limits() -> None:
    text = card(_report())
    for words in (
        "**owner/big-vlm is now 4.49 times smaller: 7.82 MB before, 1.74 MB after.**",
        "| 3 quantize.gptq | bits 4, group 64",
        "−1.2 [−2.5, +0.2]", 'svlm.load("OUT")', "svlm ask OUT", "512 questions judged every stage", "ab12ab12",
        "below 2.3 points", "Hit hardest: kind: exists, −4.0 points on 172 questions.",
    ):  # fmt: skip
        assert words in text, words
    assert "AutoModelForImageTextToText" not in text, "stock transformers was tried and did not load it"
    report = _report()
    report["reload"]["stock"] = {"works": True, "says": ""}
    assert "AutoModelForImageTextToText.from_pretrained" in card(report)
    assert _matter(card(report))["library_name"] == "transformers"


def test_what_the_original_says_of_itself_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_run(out, _report(), [], {"items": []}, _original(tmp_path / "big"))
    assert (out / "ORIGINAL_README.md").read_text() == THEIRS
    assert (out / "LICENSE").read_text() == "all rights to you"
    assert not (out / "weights.md").exists()
    text = (out / "README.md").read_text()
    matter = _matter(text)
    assert (matter["license"], matter["license_name"], matter["language"]) == ("other", "tongyi", ["en", "de"])
    assert "The original's: tongyi." in text
    assert "`LICENSE`, `ORIGINAL_README.md`" in text


def test_a_readme_of_the_users_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "LICENSE").write_text("mine, too")
    files = card_files(_report(), tmp_path, _original(tmp_path / "big"))
    assert sorted(files) == ["MODEL_CARD.md", "ORIGINAL_README.md"]
    assert yaml.safe_load(files["MODEL_CARD.md"].split("---")[1])["license"] == "other"


def test_a_licence_that_was_filled_in_survives_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n{MARK}\n# old\n")
    (name,) = files = card_files(_report(), tmp_path, None)
    assert name == "README.md"
    assert _matter(files[name])["license"] == "mit"
    assert "The original's: mit." in files[name]


def test_front_matter_that_is_broken_is_no_obstacle(tmp_path: Path) -> None:
    original = _original(tmp_path / "big")
    (original / "README.md").write_text("---\nlicense: [mit\n---\n# broken\n")
    files = card_files(_report(), tmp_path, original)
    assert "license" not in _matter(files["README.md"])
    assert files["ORIGINAL_README.md"].endswith("# broken\n")
