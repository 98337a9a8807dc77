"""report.json (schema 1) as rows and sentences; numbers go in raw, `COLUMNS` says how each is spelled.

Nothing here knows HTML, Markdown or terminals. A value that a stage does not have (a stage that failed before it was
measured has no quality) is None in a row and an en dash in a text, never a zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .words import NOTHING, amount, number, percent, points, settings_text, size

Row = dict[str, Any]
IN_EFFECT = ("baseline", "passed", "retried", "kept", "verified", "refused")  # the last two: of svlm verify
MORE = ("score", "yes_no", "calibration", "blank", "by_answer")
FIRST = {  # what the time to the first token consists of
    "vision": "the vision tower",
    "connector": "the connector",
    "prefill": "the language model's reading of the prompt",
}


@dataclass(frozen=True)
class Column:
    """One column of the stage table: its title, how a row spells it, and whether it is a number (aligned right)."""

    key: str
    title: str
    text: Callable[[Row], str]
    numeric: bool = True


def stage_rows(report: Mapping[str, Any]) -> list[Row]:
    """The stages of a run, one flat row each: raw numbers, None where a stage was not measured.

    Args:
        report: report.json as a mapping, schema 1.

    Returns:
        Rows with index, pass, settings, verdict, in_effect, says, max_drop, the keys of `quality_row`, bytes, ratio
        (original / this), parameters, visual_tokens, flops and latency_ms (up to the first token), decode_ms, kv_bytes,
        seconds (of the pass), measuring (seconds of its validation), remarks, controls (sentences).
    """
    stages = report["stages"]
    original = (stages[0].get("cost") or {}).get("bytes") if stages else None
    return [_stage_row(stage, original) for stage in stages]


def quality_row(quality: Mapping[str, Any]) -> Row:
    """The figures of report.json's `quality`, flat; those of `MORE` as they are, None where they were not measured."""
    match = quality.get("exact_match") or {}
    low, high = match.get("ci95") or (None, None)
    return {
        "main": main_figures(quality),
        "exact_match": match.get("value"),
        "reference": match.get("reference"),
        "delta": match.get("delta"),
        "low": low,
        "high": high,
        "p": match.get("p_images", match.get("mcnemar_p")),
        "right_to_wrong": match.get("right_to_wrong"),
        "wrong_to_right": match.get("wrong_to_right"),
        "kl": quality.get("kl"),
        "agreement": quality.get("agreement"),
        "perplexity": quality.get("perplexity"),
        **{key: quality.get(key) for key in MORE},
    }


def main_figures(quality: Mapping[str, Any]) -> Row:
    """What stands for accuracy: the data's own score where it has one, exact match otherwise.

    Returns:
        name, value, reference, delta, low, high (fractions; the last two: of the paired 95 % interval).
    """
    score = quality.get("score") or {"name": "exact match", **(quality.get("exact_match") or {})}
    low, high = score.get("ci95") or (None, None)
    name = str(score["name"]).replace("_", " ")
    return {
        "name": name.upper() if name in ("anls", "cider", "bleu", "vqa") else name,
        **{key: score.get(key) for key in ("value", "reference", "delta")},
        "low": low,
        "high": high,
    }


def _stage_row(stage: Mapping[str, Any], original: float | None) -> Row:
    cost, gate = stage.get("cost") or {}, stage.get("gate") or {}
    latency, flops = cost.get("latency_ms") or {}, cost.get("flops") or {}
    stored = cost.get("bytes")
    return {
        "index": stage["index"],
        "pass": stage["pass"] or "original",
        "settings": stage.get("settings") or {},
        "verdict": stage["verdict"],
        "in_effect": stage["verdict"] in IN_EFFECT,
        "says": stage.get("gate_says", "") if gate or stage.get("broken_promise") else "",
        "max_drop": gate.get("max_drop") if gate.get("metric") == "exact_match" else None,
        **quality_row(stage.get("quality") or {}),
        "bytes": stored,
        "bytes_by_part": cost.get("bytes_by_part"),
        "ratio": original / stored if original and stored else None,
        "parameters": cost.get("parameters"),
        "visual_tokens": cost.get("visual_tokens"),
        "flops": _sum(flops, *FIRST),
        "latency_ms": _sum(latency, *FIRST),
        "ms_by_part": {part: latency.get(part) for part in FIRST},
        "decode_ms": latency.get("decode_per_token"),
        "kv_bytes": cost.get("kv_bytes"),
        "seconds": stage.get("seconds"),
        "measuring": stage.get("seconds_measuring"),
        "remarks": list((stage.get("notes") or {}).get("remarks") or []),
        "controls": [control_text(control) for control in stage.get("controls") or [] if "skipped" not in control],
    }


def control_text(control: Mapping[str, Any]) -> str:
    """One of a pass's controls in words: what it scored in the pass's place, and how far the pass is ahead."""
    row, ahead = quality_row(control["quality"]), control["ahead"]
    low, high = ahead["ci95"]
    tokens, match = amount(control["visual_tokens"]), percent(row["exact_match"])
    return (
        f"{control['pass']} ({tokens} visual tokens): exact match {match}, KL {number(row['kl'], '.3g')}; "
        f"beside it the pass has {points(ahead['delta'])} points ({points(low)} to {points(high)})"
    )


def _sum(values: Mapping[str, float], *keys: str) -> float | None:
    there = [values[k] for k in keys if values.get(k) is not None]
    return sum(there) if there else None


def time_split(stage: Mapping[str, Any]) -> str:
    """Where the time of a pass that walks the blocks went: ``forward 12 s, statistics 3 s, solve 40 s``, or nothing."""
    split = (stage.get("notes") or {}).get("seconds") or {}
    return ", ".join(f"{what} {number(spent, '.1f')} s" for what, spent in split.items())


def last_good(report: Mapping[str, Any]) -> Row:
    """The stage that OUT holds: the last one that was not rolled back."""
    return [row for row in stage_rows(report) if row["in_effect"]][-1]


def stopped_at(report: Mapping[str, Any]) -> Row | None:
    """The stage at which the run ended early, or None."""
    rows = stage_rows(report)
    return rows[-1] if rows and rows[-1]["verdict"] == "failed" and not rows[-1]["in_effect"] else None


def headline(report: Mapping[str, Any]) -> list[str]:
    """The verdict in sentences: how many times smaller, exact match before and after with its interval, flips."""
    rows = stage_rows(report)
    first, last, stop = rows[0], last_good(report), stopped_at(report)
    name = model_name(report)
    sentences = []
    if last["index"] == 0:
        sentences.append(f"Nothing of {name} was changed.")
    elif last["ratio"] and last["ratio"] >= 1.005:
        times = f"{last['ratio']:.2f} times smaller"
        sentences.append(f"{name} is now {times}: {size(first['bytes'])} before, {size(last['bytes'])} after.")
    elif last["ratio"]:
        sentences.append(f"{name} takes {size(last['bytes'])} now, {size(first['bytes'])} before.")
    if last["visual_tokens"] != first["visual_tokens"]:
        now, before = amount(last["visual_tokens"]), amount(first["visual_tokens"])
        sentences.append(f"An image is {now} visual tokens now, {before} before.")
    sentences += first_token(report)
    if last["kv_bytes"] is not None and last["kv_bytes"] != first["kv_bytes"]:
        now, before = size(last["kv_bytes"]), size(first["kv_bytes"])
        sentences.append(f"After a question is read, the cache holds {now} now, {before} before.")
    if last["index"] and last["exact_match"] is not None:
        questions = (report.get("data") or {}).get("check")
        asked = f" on {questions:,} questions" if questions else ""
        sentences.append(
            f"Exact match{asked}: {percent(last['reference'])} before, {percent(last['exact_match'])} after, "
            f"a change of {points(last['delta'])} points "
            f"(paired 95 % interval {points(last['low'])} to {points(last['high'])})."
        )
        worse, better = _answers(last["right_to_wrong"]), last["wrong_to_right"]
        sentences.append(f"{worse} went from right to wrong, {better} from wrong to right.")
    sentences += validation(report)
    sentences += [_retried(stage) for stage in report["stages"] if stage.get("tries")]
    sentences += [f"Stage {row['index']}, {row['pass']}: {remark}" for row in rows for remark in row["remarks"]]
    if stop is not None:
        because = f": {stop['says']}" if stop["says"] else ""
        held = "the original" if last["index"] == 0 else f"the result of stage {last['index']} ({last['pass']})"
        place = f"stage {stop['index']}, {stop['pass']}"
        sentences.append(f"The run stopped at {place}{because}. What lies here is {held}.")
    return sentences


def first_token(report: Mapping[str, Any]) -> list[str]:
    """Where the original's time to the first token goes, and what that means for visual tokens."""
    took = ((report["stages"][0].get("cost") or {}).get("latency_ms")) or {}
    total = _sum(took, *FIRST)
    if not total or took.get("vision") is None:
        return []
    shares = ", ".join(f"{100 * took[part] / total:.0f} % {name}" for part, name in FIRST.items() if took.get(part))
    if took["vision"] > took["prefill"]:
        advice = "cutting visual tokens can pay inside the tower, or by smaller pictures"
    else:
        advice = "cutting visual tokens can pay before the language model"
    return [f"The original's time to the first token, {total:.1f} ms, is {shares}: {advice}."]


def validation(report: Mapping[str, Any]) -> list[str]:
    """What share of the stages' time was validation, rungs that were rolled back included, and what came after them."""
    every = [entry for stage in report["stages"] for entry in (*(stage.get("tries") or []), stage)]
    if any(entry.get("seconds_measuring") is None for entry in every):
        return []
    measuring = sum(entry["seconds_measuring"] for entry in every)
    total = measuring + sum(entry.get("seconds") or 0.0 for entry in every)
    if not total:
        return []
    said = f"Validation took {100 * measuring / total:.0f} % of the stages' time, {measuring:.0f} s"
    if (after := report.get("seconds_finishing")) is not None:
        said += f"; loading the result in a fresh process and comparing hidden states, {after:.0f} s more"
    return [said + "."]


def _retried(stage: Mapping[str, Any]) -> str:
    """Which settings of a stage were tried in turn, and what each lost: only those settings that changed."""
    tries = [*stage["tries"], stage]
    changed = {k for t in tries for k, v in t["settings"].items() if v != stage["tries"][0]["settings"].get(k)}
    told = []
    for attempt in tries:
        row = quality_row(attempt.get("quality") or {})
        settings = settings_text({k: v for k, v in attempt["settings"].items() if k in changed})
        told.append(f"{settings} ({points(row['delta'])} points)")
    outcome = "the last was taken" if stage["verdict"] in IN_EFFECT else "none held the gate"
    return f"Stage {stage['index']}, {stage['pass']}, was tried with {', then '.join(told)}; {outcome}."


def _answers(count: int | None) -> str:
    return f"{count} answer" if count == 1 else f"{count} answers"


def model_name(report: Mapping[str, Any]) -> str:
    """What the original is called in sentences."""
    model = report.get("model") or {}
    return str(model.get("name") or model.get("source") or "the model")


def try_rows(report: Mapping[str, Any]) -> list[Row]:
    """What was tried and rolled back: the rungs of `on_fail: retry`, and the stages that failed or were skipped."""
    rows = []
    for stage in report["stages"]:
        tries = list(stage.get("tries") or [])
        for count, attempt in enumerate(tries, 1):
            row = _stage_row(
                {**attempt, "index": stage["index"], "pass": stage["pass"], "gate": stage.get("gate")}, None
            )
            rows.append(row | {"number": count})
        row = _stage_row(stage, None)
        if not row["in_effect"] and not tries:
            rows.append(row | {"number": 1})
    return rows


def tag_rows(report: Mapping[str, Any]) -> list[Row]:
    """Exact match by tag of the stage that OUT holds: tag, name, n, reference, value, delta (fractions)."""
    index = last_good(report)["index"]
    quality = next(s for s in report["stages"] if s["index"] == index).get("quality") or {}
    rows = []
    for tag, values in (quality.get("by_tag") or {}).items():
        for value, numbers in values.items():
            rows.append({"tag": tag, "name": value, **numbers})
    return rows


def part_rows(report: Mapping[str, Any]) -> list[Row]:
    """Where the bytes are: part, before, after (bytes on disk) of each part of the model, biggest first."""
    first, index = report["stages"][0], last_good(report)["index"]
    last = next(s for s in report["stages"] if s["index"] == index)
    before = (first.get("cost") or {}).get("bytes_by_part") or {}
    after = (last.get("cost") or {}).get("bytes_by_part") or {}
    rows = [{"part": p, "before": before.get(p, 0), "after": after.get(p, 0)} for p in {**before, **after}]
    return sorted(rows, key=lambda row: -row["before"])


def change(row: Row) -> str:
    """The paired change of exact match with its 95 % interval, in points."""
    if row["delta"] is None or row.get("index") == 0:
        return NOTHING
    return f"{points(row['delta'])} [{points(row['low'])}, {points(row['high'])}]"


def flips(row: Row) -> str:
    """Answers that turned wrong and right: ``−12 +6``."""
    return NOTHING if row["right_to_wrong"] is None else f"−{row['right_to_wrong']} +{row['wrong_to_right']}"


def latency(row: Row) -> str:
    """Milliseconds to the first token, and for each one after it."""
    if row["latency_ms"] is None:
        return NOTHING
    return f"{row['latency_ms']:.1f}" + ("" if row["decode_ms"] is None else f" + {row['decode_ms']:.1f}")


def size_and_ratio(row: Row) -> str:
    """``1.74 MB (÷4.49)``."""
    return size(row["bytes"]) + (f" (÷{row['ratio']:.2f})" if row["ratio"] and row["index"] else "")


COLUMNS: tuple[Column, ...] = (
    Column("stage", "stage", lambda r: f"{r['index']} {r['pass']}", numeric=False),
    Column("settings", "settings", lambda r: settings_text(r["settings"]), numeric=False),
    Column("verdict", "verdict", lambda r: str(r["verdict"]), numeric=False),
    Column("exact_match", "exact match", lambda r: percent(r["exact_match"])),
    Column("change", "change, points [95\u00a0%]", change),
    Column("kl", "KL", lambda r: number(r["kl"], ".4f")),
    Column("agreement", "agree", lambda r: percent(r["agreement"])),
    Column("flips", "flips", flips),
    Column("bytes", "bytes", size_and_ratio),
    Column("parameters", "parameters", lambda r: amount(r["parameters"])),
    Column("visual_tokens", "visual tokens", lambda r: amount(r["visual_tokens"])),
    Column("flops", "FLOPs", lambda r: amount(r["flops"])),
    Column("latency", "ms, first + next", latency),
    Column("seconds", "seconds", lambda r: number(r["seconds"], ".0f")),
    Column("measuring", "validation, s", lambda r: number(r["measuring"], ".0f")),
)
