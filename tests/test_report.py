"""The report says what report.json says: verdict, every stage, what was rolled back; the page needs nothing else."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from svlm.compress.errors import OutputError
from svlm.compress.report import gallery_rows, headline, html, markdown, read, stage_rows, write
from svlm.compress.report.facts import facts, last_facts
from svlm.compress.report.files import read_answers
from svlm.compress.report.terminal import Lines, print_stages, stage_line
from svlm.compress.report.words import amount, points, settings_text, size
from tests import reports

VOID = {"meta", "br", "img", "link", "input", "hr", "path", "use"}


class Page(HTMLParser):
    """Checks that tags are nested and collects texts and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(html(reports.report(stopped=True), reports.gallery()))


def test_the_verdict_says_size_accuracy_interval_and_flips() -> None:
    first, where, second, third, fourth = headline(reports.report())
    assert first == "demo is now 4.49 times smaller: 7.82 MB before, 1.74 MB after."
    assert "6.9 ms, is 45 % the vision tower, 55 % the language model's reading of the prompt: cutting" in where
    assert where.endswith("can pay before the language model.")
    assert "on 512 questions: 91.4 % before, 90.2 % after, a change of −1.2 points" in second
    assert "95 % interval −2.5 to +0.2" in second
    assert third == "12 answers went from right to wrong, 6 from wrong to right."
    tried = "was tried with bits 3 (−4.1 points), then bits 4 (−1.2 points); the last was taken"
    assert fourth == f"Stage 3, quantize.gptq, {tried}."


def test_where_the_first_token_spends_its_time_says_where_to_cut() -> None:
    report = reports.report()
    cost = report["stages"][0]["cost"]
    cost["latency_ms"] = {"vision": 6.0, "connector": 1.0, "prefill": 3.0, "decode_per_token": 1.0}
    cost["kv_bytes"], report["stages"][-1]["cost"]["kv_bytes"] = 4000, 1000
    said = headline(report)
    assert "60 % the vision tower, 10 % the connector, 30 % the language model's" in said[1]
    assert said[1].endswith("inside the tower, or by smaller pictures.")
    assert said[2] == "After a question is read, the cache holds 1.00 kB now, 4.00 kB before."
    cost["latency_ms"] = dict.fromkeys(cost["latency_ms"])
    assert not any("first token" in sentence for sentence in headline(report))


def test_a_stopped_run_says_where_why_and_what_is_left() -> None:
    last = headline(reports.report(stopped=True))[-1]
    assert "stopped at stage 4, tokens.random: exact match lost 40.20 points" in last
    assert "the result of stage 3 (quantize.gptq)" in last


def test_nothing_changed_is_said_when_the_first_pass_fails() -> None:
    report = reports.report()
    report["stages"] = [report["stages"][0], copy.deepcopy(report["stages"][1]) | {"verdict": "failed"}]
    sentences = headline(report)
    assert sentences[0] == "Nothing of demo was changed."
    assert sentences[-1].endswith("What lies here is the original.")
    Page(html(report))


def test_stage_rows_hold_the_raw_numbers_of_every_stage() -> None:
    rows = stage_rows(reports.report(stopped=True))
    names = ["original", "prune.structured", "distill.logits", "quantize.gptq", "tokens.random"]
    assert [r["pass"] for r in rows] == names
    assert [r["in_effect"] for r in rows] == [True, True, True, True, False]
    assert rows[3]["ratio"] == pytest.approx(7_816_000 / 1_742_000)
    assert (rows[3]["low"], rows[3]["high"]) == (-0.0254, 0.002)
    assert rows[4]["flops"] == 190e6 + 4e6 * 6


def test_the_page_shows_every_stage_try_tag_part_and_fact(page: Page) -> None:
    for words in (
        "demo is now 4.49 times smaller", "3 quantize.gptq", "−1.2 [−2.5, +0.2]", "0.0302", "−12 +6", "1.74 MB (÷4.49)",
        "ratio 0.33, where language, what mlp", "exact match lost 40.20 points", "stopped at a gate",
        "3 quantize.gptq, try 1", "bits 3, group 64", "exists", "embeddings", "a <processor> & more",
        "ab12ab12", "svlm.load", "from_pretrained", "what is left of the <b>cake</b> 1?",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("svg") == 5
    assert page.tags.count("img") == 10


def test_answers_that_turned_wrong_come_first(page: Page) -> None:
    order = [m.group() for m in re.finditer(r"right → wrong|wrong → right|another answer|same answer", page.text)]
    assert order == ["right → wrong"] * 3 + ["wrong → right"] * 2 + ["another answer"] * 2 + ["same answer"] * 3


def test_the_page_needs_nothing_from_elsewhere(page: Page) -> None:
    text = html(reports.report(), reports.gallery())
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(http" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_no_name_is_drawn_in_a_fixed_colour() -> None:
    figures = re.findall(r"<svg.*?</svg>", html(reports.report(stopped=True)), flags=re.S)
    for figure in figures:
        fixed = set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", figure))
        assert fixed <= {"#000000"}, fixed  # matplotlib's default of shapes that are drawn with `use`, overridden there
        assert "var(--ink)" in figure


def test_a_stage_that_was_never_measured_is_a_dash_not_a_zero() -> None:
    report = reports.report()
    report["stages"].append(reports.stage(4, "distill.logits", "failed", gate_says="", quality={}, cost={}))
    row = stage_rows(report)[-1]
    assert row["exact_match"] is None
    assert row["bytes"] is None
    assert "| 4 distill.logits |  | failed | – | – | – |" in markdown(report)
    Page(html(report))


def test_the_verdict_of_a_kept_or_skipped_stage_is_not_all_gates_hold() -> None:
    for verdict, words in (("kept", "a failed gate was kept"), ("skipped", "a stage was skipped")):
        report = reports.report()
        report["stages"][2]["verdict"] = verdict
        text = Page(html(report)).text
        assert words in text
        assert "all gates hold" not in text
    assert "all gates hold" in Page(html(reports.report())).text


def test_a_broken_promise_is_shown() -> None:
    report = reports.report()
    report["stages"][3] |= {"verdict": "failed", "broken_promise": "prune.structured's promise is broken: 2 % zeros"}
    assert "prune.structured's promise is broken: 2 % zeros" in Page(html(report)).text


def test_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    write(tmp_path, reports.report(), reports.gallery(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert read(tmp_path) == reports.report()
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "nowhere", reports.report(), [])


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    report = reports.report()
    report["stages"][1]["quality"]["perplexity"] = float("inf")
    report["stages"][1]["quality"]["kl"] = float("nan")
    write(tmp_path, report, [])
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["stages"][1]["quality"]["kl"] is None


def test_read_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no report here"):
        read(tmp_path)


def test_markdown_is_a_table_with_a_row_a_stage() -> None:
    lines = markdown(reports.report()).splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert lines[0].startswith("demo is now 4.49 times smaller")
    assert sum(bool(re.match(r"\| \d ", line)) for line in table) == 4
    widths = {line.count("|") for line in lines[2:8] if line.startswith("|")}
    assert len(widths) == 1


def test_the_terminal_shows_table_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    print_stages(reports.report(stopped=True))
    text = capsys.readouterr().out
    assert "−1.2 [−2.5, +0.2]" in text  # brackets are not taken for markup
    assert "4 tokens.random" in text
    assert "The run stopped at stage 4" in text


def test_a_finished_stage_is_one_line() -> None:
    stages = reports.report(stopped=True)["stages"]
    assert stage_line(stages[0]) == "stage 0 original: baseline; exact match 91.4 %; 7.82 MB; 12 s"
    assert "change −1.2 [−2.5, +0.2]" in stage_line(stages[3])
    timed = stages[0] | {"notes": {"seconds": {"forward": 8.04, "solve": 3.5}}}
    assert stage_line(timed).endswith("; 12 s (forward 8.0 s, solve 3.5 s)")
    assert stage_line(stages[4]).endswith("(exact match lost 40.20 points, allowed 2.00 points)")


def test_lines_tell_count_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines(every=0.0) as told:
        told.start("gptq", 4)
        told.step(2, "language.blocks[1]")
        told.start("judge", 1)
        told.done()
        told.done()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "gptq: 0/4"
    assert re.fullmatch(r"gptq: 2/4  [\d.]+/s  \d+ s left  language\.blocks\[1\]", lines[1])
    assert len(lines) == 3  # the nested work was over before there was anything to say
    assert lines[-1].startswith("gptq: done in")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1742, "1.74 kB"), (999_600, "1.00 MB"), (15_460_000, "15.5 MB"), (None, "–")],
)
def test_sizes(count: float | None, text: str) -> None:
    assert size(count) == text


def test_numbers_are_spelled_as_people_read_them() -> None:
    assert (amount(64), amount(28.5), amount(3_900_000), amount(450e6)) == ("64", "28.5", "3.90 M", "450 M")
    assert (points(-0.0117), points(0.0031), points(-0.0001), points(None)) == ("−1.2", "+0.3", "0.0", "–")
    settings = {"lr": 1e-4, "what": ["mlp", "heads"], "tied": True, "x": None}
    assert settings_text(settings) == "lr 0.0001, what mlp+heads, tied true"


def _sample(i: int, colour: tuple[int, int, int]) -> Any:
    picture = SimpleNamespace(open=lambda: Image.new("RGBA", (600, 300), colour))
    question, tags = f"question {i}", {"kind": "what"}
    return SimpleNamespace(id=f"q{i}", images=(picture,), question=question, answers=("a",), tags=tags)


def test_the_gallery_takes_flips_first_and_no_picture_twice() -> None:
    samples = [_sample(i, (i, 0, 0)) for i in range(30)]
    before = [{"id": f"q{i}", "image_id": f"i{i // 2}", "answer": "a", "correct": i != 20} for i in range(30)]
    after = [{**row, "answer": "b" if i == 25 else "a", "correct": i not in (24, 25)} for i, row in enumerate(before)]
    rows = gallery_rows(samples, before, after)
    assert len(rows) == 10
    assert [r["flip"] for r in rows[:2]] == ["right_to_wrong", "wrong_to_right"]
    assert [r["question"] for r in rows[:2]] == ["question 24", "question 20"]  # 25 asks about the picture of 24
    assert {r["flip"] for r in rows[2:]} == {"same"}
    import base64
    import io

    picture = Image.open(io.BytesIO(base64.b64decode(rows[0]["image"].removeprefix("data:image/png;base64,"))))
    assert picture.size == (288, 144)


def test_facts_besides_exact_match_are_told_where_they_are_there() -> None:
    rates = {"n": 40, "neither": 2, "yes_rate": 0.6, "accuracy": 0.8, "precision": 0.75, "recall": 0.9, "f1": 0.818}
    blank = {"perplexity": 40.0, "reference_perplexity": 50.0, "seeing_perplexity": 1.5}
    quality = {
        "score": {"name": "anls", "value": 0.7, "reference": 0.712, "delta": -0.012, "ci95": [-0.02, 0.001]},
        "yes_no": {**rates, "reference": {**rates, "yes_rate": 0.5, "neither": 0}},
        "calibration": {"ece": 0.031, "reference_ece": 0.02, "bins": []},
        "blank": {"n": 64, **blank, "reference_seeing_perplexity": 1.25},
    }
    told = facts(quality)
    assert told[0] == (
        "ANLS: 71.2 % before, 70.0 % after, a change of −1.2 points (paired 95 % interval −2.0 to +0.1)."
    )
    assert told[1].startswith("40 yes/no questions: says yes to 60.0 % (50.0 % before), accuracy 80.0 %")
    assert told[1].endswith("; 2 answers are neither (0 before).") and "3.1 % on average, 2.0 % before" in told[2]
    assert "blank picture 40, with the real one 1.5; before 50 and 1.25" in told[3] and len(told) == 4
    assert facts({}) == facts({"yes_no": None, "blank": None}) == []
    made = reports.report()
    assert last_facts(made) == [], "an old report"
    made["stages"][-1]["quality"] |= quality
    assert last_facts(made) == told and last_facts({"stages": made["stages"][:1]}) == []


@pytest.mark.parametrize("items", ["null", '"abc"', "[null]", "[{}]", '[{"id": 1}]'])
def test_answers_that_are_not_whole_are_none(tmp_path: Path, items: str) -> None:
    (tmp_path / "answers.json").write_text(f'{{"items": {items}}}')
    assert read_answers(tmp_path) is None


def test_the_share_of_validation_is_said_where_every_stage_knows_it() -> None:
    report = reports.report()
    assert not any("Validation" in sentence for sentence in headline(report)), "of old runs nobody knows it"
    for stage in report["stages"]:
        stage["seconds_measuring"] = 2.0
        for tried in stage["tries"]:
            tried["seconds_measuring"] = 3.0
    seconds = sum(s["seconds"] + sum(t["seconds"] for t in s["tries"]) for s in report["stages"])
    share = 100 * 11 / (seconds + 11)
    said = f"Validation took {share:.0f} % of the stages' time, 11 s"
    assert f"{said}." in headline(report)
    more = report | {"seconds_finishing": 7.4}
    assert f"{said}; loading the result in a fresh process and comparing hidden states, 7 s more." in headline(more)
    assert [row["measuring"] for row in stage_rows(report)] == [2.0] * 4
    assert "validation 2 s" in stage_line(report["stages"][1])
    del report["stages"][3]["tries"][0]["seconds_measuring"]
    assert not any("Validation" in sentence for sentence in headline(report))
