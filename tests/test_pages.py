"""Pages: every section follows from the report; verify's page; several runs; and what a browser sees."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from svlm import cli
from svlm.compress.errors import DataError, UsageError
from svlm.compress.report import html
from svlm.compress.report.analyses import sections
from svlm.compress.report.compare import comparison_html, run_facts
from svlm.compress.report.files import read_answers, write_texts
from svlm.compress.report.gallery import gallery_rows
from svlm.compress.report.sections import bias_rows, heat, times
from svlm.compress.report.verified import as_report, write_verified
from svlm.compress.report.words import whole
from svlm.passes.compare import compare_runs
from tests import browser, reports
from tests.test_report import Page


@pytest.fixture(scope="module")
def rich() -> str:
    return html(reports.rich(stopped=True), reports.gallery())


def test_every_section_that_the_report_has_is_shown(rich: str) -> None:
    page = Page(rich)
    for words in (
        "▼ −4.0", "−7.0 to −1.0", "n = 172, 88.0 %", "by right answer", "172 questions that yes or no answers", "4.2 %",
        "7.500", "amplification", "+0.021", "+0.004 to +0.040", "Alignment by block", "mutual k-NN", "Robustness",
        "blur", "+5.0 [+3.0, +7.0]", "Which part lost it", "Most of it was lost in the vision tower.", "71 %",
        "Only svlm loads it as it was measured", "logits differ by up to 3.1",
    ):  # fmt: skip
        assert words in page.text, words
    # 3 of accuracy, 2 of parts, calibration, bias, alignment, 2 of robustness, attribution
    assert page.tags.count("svg") == 11
    for anchor in ("stages", "accuracy", "tags", "gallery", "checks", "alignment", "robustness", "attribution", "time"):
        assert f"#{anchor}" in page.addresses


def test_a_section_that_the_report_lacks_is_left_out() -> None:
    page = Page(html(reports.report()))
    for words in ("What averages hide", "Alignment", "Robustness", "Which part", "What validation took", "None", "nan"):
        assert words not in page.text, words


def test_every_link_leads_somewhere(rich: str) -> None:
    links = {address for address in Page(rich).addresses if f'<a href="{address}"' in rich}
    assert links
    assert [link for link in links if f'<h2 id="{link[1:]}"' not in rich] == []


def test_the_heat_map_marks_what_holms_correction_leaves() -> None:
    table = heat(reports.rich())
    assert table is not None
    assert [stage["index"] for stage in table["stages"]] == [1, 2, 3]
    (group,) = table["groups"]
    cells = {row["name"]: row["cells"][-1] for row in group["rows"]}
    assert {name: cell["mark"] for name, cell in cells.items()} == {"what": "", "exists": "▼", "count": ""}
    assert cells["exists"]["tone"] == pytest.approx(-0.04 / 0.05)
    many = reports.rich()
    values = many["stages"][3]["quality"]["by_tag"]["kind"]
    values |= {f"v{i}": {**values["count"], "delta": i / 1000, "p_holm": None} for i in range(40)}
    table = heat(many)
    assert table is not None
    assert table["groups"][0]["left"] == 43 - 24
    assert "v39" in {row["name"] for row in table["groups"][0]["rows"]}
    assert "v1" not in {row["name"] for row in table["groups"][0]["rows"]}


def test_the_share_of_validation_counts_what_was_rolled_back() -> None:
    report = reports.rich()
    report["stages"][3]["tries"][0] |= {"seconds": 10.0, "seconds_measuring": 7.0}
    found = times(report)
    assert found is not None
    measuring = 4 * 3.0 + 7.0
    assert found["total"] == pytest.approx(12 + 13 + 14 + 15 + 10 + measuring)
    assert found["share"] == pytest.approx(measuring / found["total"])
    assert times(reports.report()) is None


def test_a_bias_is_called_shown_where_its_interval_is_off_zero() -> None:
    report = reports.rich()
    report["stages"][3]["quality"]["bias"] |= {"tag_gap": {"kind": {"value": 0.1, "ci95": None}}, "says": ["words"]}
    rows = {row["key"]: row["shown"] for row in bias_rows(report)}
    assert rows == {"amplification": True, "yes rate": False, "tag gap: kind": False}


def test_analyses_take_what_verify_finds() -> None:
    """The shapes of `svlm verify --robustness --attribute`, and of blocks that have no number."""
    match = {"value": 0.9, "delta": 0.01, "ci95": [0.0, 0.02], "mcnemar_p": 0.5}
    restored = {"kl": 0.01, "share": 0.7, "ci95": [0.6, 0.8], "exact_match": match}
    report = reports.report() | {"analysis": {
        "alignment": {"blocks": [{"part": "connector", "block": None, "name": "connector", "cka": 0.98, "mir": None}],
                      "says": ["alike"]},
        "robustness": {"rows": [{"change": "longer_prompt", "strength": None, "reference_loss": 0.01, "loss": 0.03,
                                 "difference": 0.02, "ci95": None}],
                       "by_change": {"longer_prompt": {"difference": 0.02, "ci95": [-0.1, 0.1], "clear": False}},
                       "left_out": {"shift": "no room"}, "says": []},
        "attribution": {"parts": [{"part": "vision", "unchanged": False, "restored": restored, "alone": restored},
                                  {"part": "connector", "unchanged": True}],
                        "blocks": {"vision": [{"block": "vision.blocks[2]", **restored}]},
                        "says": ["most of it was lost in the vision tower"]},
    }}  # fmt: skip
    alignment, robustness, attribution = sections(report)
    assert alignment["sentences"] == ["alike"]
    assert alignment["rows"] == [["connector", "0.9800"]]
    assert robustness["sentences"] == ["Left out: shift (no room)."]
    assert [row[:2] for row in attribution["rows"]] == [["vision", "0.0100"], ["vision.blocks[2]", "0.0100"]]
    assert attribution["rows"][0][2:] == ["70 % [60, 80]", "90.0 %"]
    Page(html(report))


def test_figures_keep_their_units() -> None:
    assert (
        whole("91.4 % of 7.82 MB, −1.2 points in 3 ms") == "91.4\u00a0% of 7.82\u00a0MB, −1.2\u00a0points in 3\u00a0ms"
    )


def test_a_photograph_does_not_blow_up_the_page() -> None:
    noise = random.Random(0).randbytes(600 * 600 * 3)
    photo = SimpleNamespace(open=lambda: Image.frombytes("RGB", (600, 600), noise))
    sample = SimpleNamespace(id="q0", images=(photo,), question="what?", answers=("a",), tags={})
    (row,) = gallery_rows([sample], None, reports.answers(count=1))
    assert row["image"].startswith("data:image/jpeg;base64,")
    assert len(row["image"]) < 120_000
    assert (row["before"], row["flip"]) == ("yes", "wrong_to_right")


# --------------------------------------------------------------------------------------------------------------- verify


def _verified(passed: bool) -> dict[str, Any]:
    quality = reports.rich()["stages"][3]["quality"]
    gate = {"metric": "exact_match", "max_drop": 0.01, "on_fail": "stop"}
    says = "exact match lost 1.17 points, allowed 1.00 points"
    return {
        "model": "runs/int4", "against": "./my-vlm", "data": {"name": "q.jsonl", "check": 512}, "quality": quality,
        "gate": gate, "passed": passed, "says": says, "analysis": reports.rich()["analysis"],
    }  # fmt: skip


def test_verify_writes_the_same_sections(tmp_path: Path) -> None:
    write_verified(tmp_path / "new", _verified(False), reports.gallery(3))
    assert json.loads((tmp_path / "new" / "verify.json").read_text())["passed"] is False
    page = Page((tmp_path / "new" / "verify.html").read_text())
    for words in (
        "verify · runs/int4 against ./my-vlm", "gate fails", "91.4 % before, 90.2 % after", "▼ −4.0", "✕ refused",
        "exact match lost 1.17 points", "Alignment by block", "Which part lost it", "what is left of the <b>cake</b>",
    ):  # fmt: skip
        assert words in page.text, words
    for words in ("svlm.load", "Bytes on disk", "the recipe as it was run"):
        assert words not in page.text, words
    assert as_report(_verified(True))["badge"] == {"good": True, "text": "gate holds"}
    assert as_report(_verified(True) | {"gate": None})["badge"]["text"] == "no gate was asked for"


# -------------------------------------------------------------------------------------------------------- several runs


def _runs(folder: Path, wrong: dict[str, tuple[int, ...]]) -> list[Path]:
    paths = []
    for i, (name, numbers) in enumerate(wrong.items()):
        report = reports.report()
        report["stages"][3]["settings"]["bits"] = 4 - i
        report["stages"][3]["cost"]["bytes"] -= i * 300_000
        (folder / name).mkdir()
        write_texts(folder / name, {"report.json": json.dumps(report)})
        kept = {"questions": "ab", "stage": 3, "items": reports.answers(numbers)}
        write_texts(folder / name, {"answers.json": json.dumps(kept)})
        paths.append(folder / name)
    return paths


def test_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    facts = compare_runs(_runs(tmp_path, {"good": (), "bad": tuple(range(0, 20, 2))}))
    (pair,) = facts["pairs"]
    assert (pair["a"], pair["b"], pair["n"]) == ("good", "bad", 60)
    assert pair["delta"] == pytest.approx(-10 / 60)
    assert pair["ci95"][1] < 0
    assert facts["settings"]["quantize.gptq: bits"] == ["4", "3"]
    assert "prune.structured: ratio" not in facts["settings"]
    assert facts["says"][0].startswith("bad is the smallest, 1.44 MB (÷5.42) at 90.2 %")
    assert facts["says"][1] == "bad has the highest exact match as well."
    page = Page(comparison_html(facts))
    for words in ("bad less good", "▼ worse", "quantize.gptq: bits", "★ bad", "McNemar"):
        assert words in page.text, words
    assert page.tags.count("svg") == 2
    assert all(address.startswith("#") for address in page.addresses)


def test_runs_judged_on_different_questions_are_refused_or_marked(tmp_path: Path) -> None:
    first, second = _runs(tmp_path, {"a": (), "b": ()})
    kept = read_answers(second)
    assert kept is not None
    write_texts(second, {"answers.json": json.dumps(kept | {"questions": "cd"})})
    with pytest.raises(DataError, match="different questions"):
        compare_runs([first, second])
    facts = compare_runs([first, second], other_data=True)
    assert facts["pairs"] == []
    assert "different questions" in facts["warnings"][0]
    assert "their accuracies do not compare" in Page(comparison_html(facts)).text
    assert not any("has the highest" in sentence for sentence in facts["says"])


def test_runs_of_an_earlier_svlm_are_known_by_both_splits(tmp_path: Path) -> None:
    first, second = _runs(tmp_path, {"a": (), "b": ()})
    (first / "answers.json").unlink()
    facts = compare_runs([first, second])
    assert facts["warnings"] == []
    assert facts["pairs"] == []
    report = json.loads((first / "report.json").read_text())
    report["data"]["fingerprint"] = "other"
    write_texts(first, {"report.json": json.dumps(report)})
    with pytest.raises(DataError, match="different questions"):
        compare_runs([first, second])


def test_the_command_line_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = _runs(tmp_path, {"good": (), "bad": (2, 4, 6)})
    page = tmp_path / "pages" / "compare.html"
    assert cli.main(["report", str(first), str(second), "-o", str(page)]) == 0
    out = capsys.readouterr().out
    for words in ("bad less good", "quantize.gptq: bits", "is the smallest"):
        assert words in out, words
    assert page.is_file()
    assert cli.main(["report", str(first), str(second), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["n"] == 60
    for wrong in (["--markdown", str(second)], ["-o", str(page)], ["--other-data"], [str(tmp_path / "none")]):
        assert cli.main(["report", str(first), *wrong]) == 2
    capsys.readouterr()


def test_one_run_is_no_comparison(tmp_path: Path) -> None:
    (first,) = _runs(tmp_path, {"a": ()})
    with pytest.raises(UsageError, match="two different runs"):
        compare_runs([first, tmp_path / "x" / ".." / "a"])


def test_a_run_that_another_beats_is_not_on_the_front() -> None:
    worse = copy.deepcopy(reports.report())
    worse["stages"][3]["quality"]["exact_match"]["value"] -= 0.1
    worse["model"]["fingerprint"] = "other"
    facts = run_facts([Path("a/x"), Path("b/x")], [reports.report(), worse], True)
    assert facts["names"] == ["a/x", "b/x"]
    assert [row["front"] for row in facts["rows"]] == [True, False]
    assert "different originals" in facts["warnings"][0]


# -------------------------------------------------------------------------------------------------------------- browser


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium here")
def test_nothing_sticks_out_on_a_phone_and_the_console_is_silent(rich: str, tmp_path: Path) -> None:
    assert len(rich) < 3_000_000
    frames, said = browser.look(rich, tmp_path, 390, 1280)
    assert said == []
    for width in (390, 1280):
        assert (frames[width]["scroll"], frames[width]["out"]) == (width, [])


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium here")
def test_the_browser_would_have_told(tmp_path: Path) -> None:
    wide = '<body style="margin: 0"><p style="width: 500px">x</p><script>console.error("no")</script>'
    frames, said = browser.look(wide, tmp_path, 390)
    assert frames[390]["scroll"] == 500
    assert frames[390]["out"]
    assert len(said) == 1
