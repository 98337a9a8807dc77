"""What is said of a pass beside its controls."""

from __future__ import annotations

from types import SimpleNamespace

from svlm.compress.controls import beside, remarks
from svlm.compress.errors import Unmet
from svlm.compress.report.rows import control_text


def row(name, delta, low, high):
    match = {"value": 0.6 - delta, "reference": 0.7, "delta": -0.1}
    ahead = {"delta": delta, "ci95": [low, high], "mcnemar_p": 0.5}
    return {"pass": name, "visual_tokens": 16.0, "quality": {"exact_match": match, "kl": 0.25}, "ahead": ahead}


def test_sentences_say_what_is_no_better_and_nothing_of_what_is():
    rows = [row("a.worse", 0.05, 0.01, 0.09), row("a.alike", 0.01, -0.01, 0.03), row("a.better", -0.02, -0.05, 0.01)]
    rows.append({"pass": "a.none", "skipped": "there is no pass 'a.none'"})
    told = remarks("mine", 0.6, rows)
    assert len(told) == 3 and "a.worse" not in " ".join(told)
    assert told[0].startswith(
        "mine is not shown to be better than a.alike (16 visual tokens): exact match 60.0 % and 59.0 %"
    )
    assert "+1.0 points (95 % interval −1.0 to +3.0)" in told[0]
    assert told[1].startswith("mine is no better than a.better") and "62.0 %" in told[1]
    assert told[2] == "mine was not compared with a.none: there is no pass 'a.none'"
    assert control_text(rows[0]) == (
        "a.worse (16 visual tokens): exact match 55.0 %, KL 0.25; beside it the pass has +5.0 points (+1.0 to +9.0)"
    )


def test_a_control_that_refuses_the_model_is_skipped_by_name():
    def instead(name, settings):
        if name == "a.second":
            raise Unmet("cannot do it", found="the reason")
        return SimpleNamespace(visual_tokens=lambda batch: [4, 6])

    quality = {"exact_match": {"value": 0.5}, "kl": 1.0, "agreement": 0.9, "perplexity": 3.0}
    bench = SimpleNamespace(
        measure=lambda view, progress: (quality, ["theirs"]),
        probe=lambda view: {},
        compare=lambda before, after: {"delta": 0.0, "ci95": [0.0, 0.0], "of": (before, after)},
    )
    trial = SimpleNamespace(controls=lambda: (("a.first", {"keep": 0.5}), ("a.second", {"keep": 0.5})))
    first, second = beside(trial, ["mine"], instead, bench, None)
    assert first["visual_tokens"] == 5.0 and first["ahead"]["of"] == (["theirs"], ["mine"])
    assert first["quality"] == {"exact_match": {"value": 0.5}, "kl": 1.0, "agreement": 0.9}
    assert second == {"pass": "a.second", "settings": {"keep": 0.5}, "skipped": "cannot do it: the reason"}
