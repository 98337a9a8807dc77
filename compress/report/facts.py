"""What a measurement says besides exact match, one sentence a fact: score, yes and no, confidence, blank pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..gate import SCORES
from .rows import last_good
from .words import percent, points


def facts(quality: Mapping[str, Any]) -> list[str]:
    """Sentences about report.json's `quality`; a fact that it does not have (an old report) is left out."""
    told = (_score, _yes_no, _confidence, _blank)
    return [sentence for tell in told if (sentence := tell(quality))]


def last_facts(report: Mapping[str, Any]) -> list[str]:
    """`facts` of the stage that OUT holds; none where nothing was changed."""
    index = last_good(report)["index"]
    return facts(next(s for s in report["stages"] if s["index"] == index).get("quality") or {}) if index else []


def score_title(score: Mapping[str, Any]) -> str:
    """How the data's own score is called."""
    return SCORES.get(score["name"], score["name"])


def _score(quality: Mapping[str, Any]) -> str:
    score = quality.get("score")
    if not score:
        return ""
    low, high = score["ci95"]
    return (
        f"{score_title(score)}: {percent(score['reference'])} before, {percent(score['value'])} after, a change of "
        f"{points(score['delta'])} points (paired 95 % interval {points(low)} to {points(high)})."
    )


def _yes_no(quality: Mapping[str, Any]) -> str:
    now = quality.get("yes_no")
    if not now:
        return ""
    was = now["reference"]
    shown = {
        "yes_rate": "says yes to",
        "accuracy": "accuracy",
        "precision": "precision",
        "recall": "recall",
        "f1": "F1",
    }
    told = [key for key in shown if now[key] is not None]
    rates = ", ".join(f"{shown[key]} {percent(now[key])} ({percent(was[key])} before)" for key in told)
    unclear = f"; {now['neither']} answers are neither ({was['neither']} before)" if now["neither"] else ""
    return f"{now['n']} yes/no questions: {rates}{unclear}."


def _confidence(quality: Mapping[str, Any]) -> str:
    found = quality.get("calibration")
    if not found:
        return ""
    error, before = percent(found["ece"]), percent(found["reference_ece"])
    return f"Confidence is off by {error} on average, {before} before (expected calibration error)."


def _blank(quality: Mapping[str, Any]) -> str:
    found = quality.get("blank")
    if not found:
        return ""
    blind, seeing = (f"{found[key]:.3g}" for key in ("perplexity", "seeing_perplexity"))
    was_blind, was_seeing = (f"{found[key]:.3g}" for key in ("reference_perplexity", "reference_seeing_perplexity"))
    return (
        f"Perplexity of {found['n']} right answers with a blank picture {blind}, with the real one {seeing}; "
        f"before {was_blind} and {was_seeing}."
    )
