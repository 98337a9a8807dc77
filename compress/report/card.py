"""The model card: README.md of a result, written from report.json, for a Hugging Face repository or a colleague.

What the original's own README says is kept: its licence fields come first in the front matter, its whole text lies
beside as ORIGINAL_README.md, and so do its licence files. A README.md in OUT that svlm did not write stays as it is;
the card is MODEL_CARD.md then. Licence fields that somebody filled into an earlier card are carried into the next one.
svlm chooses no licence: where the original names none, the card says that it has to be filled in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import rows as r
from .page import stage_table
from .use import how_to_load
from .words import percent, points

README, SECOND, ORIGINAL = "README.md", "MODEL_CARD.md", "ORIGINAL_README.md"
MARK = "<!-- written by svlm from report.json -->"
KEPT = ("license", "license_name", "license_link", "language", "extra_gated_prompt", "extra_gated_fields")
LICENCES = re.compile(r"(?i)(licen[cs]e|notice|use_policy)(\.(md|txt|rst))?")  # whole names of files
SHOWN = ("stage", "settings", "exact_match", "change", "kl", "flips", "bytes", "visual_tokens", "latency")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def card_files(report: Mapping[str, Any], out: Path, original: Path | None) -> dict[str, str]:
    """The files that `out` is to get: the card, and what the original says of itself.

    Args:
        original: folder of the original, where it is on this disk; None otherwise.

    Returns:
        Texts by file name. Never a file of `out` that svlm did not write.
    """
    theirs = _texts(original) if original is not None and original.resolve() != out.resolve() else {}
    files = {ORIGINAL if name == README else name: text for name, text in theirs.items()}
    name = README if _ours(out / README) else SECOND
    earlier = (out / name).read_text(encoding="utf-8", errors="replace") if (out / name).is_file() else ""
    fields = _fields(theirs.get(README, "")) | _fields(earlier)
    kept = {key: fields[key] for key in KEPT if key in fields}
    known = [file for file in files if not (out / file).exists() or file == ORIGINAL or _same(out / file, files[file])]
    return {name: card(report, kept, files)} | {file: files[file] for file in known}


def card(
    report: Mapping[str, Any], kept: Mapping[str, Any] | None = None, files: Mapping[str, str] | None = None
) -> str:
    """The card as Markdown with front matter.

    Args:
        kept: fields of the front matter that are not svlm's to choose (licence, language).
        files: names of what the original says of itself, beside the card.
    """
    kept, files = kept or {}, files or {}
    sentences = r.headline(report)
    columns = [c for c in r.COLUMNS if c.key in SHOWN]
    lines = [
        "---", *_front_matter(report, kept), "---", MARK, f"# {_title(report)}", "", f"**{sentences[0]}**",
        " ".join(sentences[1:]), "", "## Stage by stage", "", *stage_table(report, columns), "",
        "Everything against the original, on questions that no pass has seen. Change: points with the paired 95 % "
        "interval; KL: nats an answer token; flips: answers that turned wrong (−) and right (+). `report.html` has the "
        "pictures, tags, plots, and what was tried and rolled back.", "", "## How to load it", "",
    ]  # fmt: skip
    for words, code in how_to_load(report):
        lines += [words, "", "```sh" if code.startswith("svlm ") else "```python", code, "```", ""]
    lines += ["## What judged it", "", *_judged(report), "", "## Limits", "", *_limits(report)]
    lines += ["", "## Licence", "", *_licence(kept, files)]
    return "\n".join(lines) + "\n"


def _title(report: Mapping[str, Any]) -> str:
    name = r.model_name(report).rstrip("/").rpartition("/")[2]
    passes = [row["pass"] for row in r.stage_rows(report) if row["in_effect"] and row["index"]]
    return f"{name}, made smaller by svlm: {', '.join(passes)}" if passes else f"{name}, unchanged"


def _front_matter(report: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """The lines between the dashes: YAML that the hub reads."""
    import yaml

    source = str((report.get("model") or {}).get("source", ""))
    passes = [row["pass"] for row in r.stage_rows(report) if row["in_effect"] and row["index"]]
    tags = ["svlm", "compressed", *dict.fromkeys(name.replace(".", "-") for name in passes)]
    fields: dict[str, Any] = dict(kept)
    if not _is_folder(source):
        quantized = any(name.startswith("quantize.") for name in passes)
        fields |= {"base_model": source, "base_model_relation": "quantized" if quantized else "finetune"}
    fields |= {"pipeline_tag": "image-text-to-text", "library_name": _library(report), "tags": tags}
    lines = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).splitlines()
    if "license" not in kept:
        lines.insert(0, "# license: fill in what the original's licence allows")
    if "base_model" not in fields:
        lines.append("# base_model: owner/name   fill in: the original was read from a folder")
    return lines


def _library(report: Mapping[str, Any]) -> str:
    stock = (report.get("reload") or {}).get("stock") or {}
    return "transformers" if stock.get("works") else "svlm"


def _is_folder(source: str) -> bool:
    return source == "demo" or not HUB_ID.fullmatch(source) or Path(source).is_dir()


def _judged(report: Mapping[str, Any]) -> list[str]:
    data, where = report.get("data") or {}, report.get("environment") or {}
    last = r.last_good(report)
    lines = [f"- data: {data.get('source') or data.get('name') or 'unknown'}. {data.get('description') or ''}".rstrip()]
    lines.append(
        f"- {data.get('check', '?')} questions judged every stage; passes looked at {data.get('fit', '?')} others"
    )
    if data.get("answers_from_original"):
        lines.append(f"- {data['answers_from_original']} questions had no answer: the original's own served")
    if last["low"] is not None and last["index"]:
        lines.append(f"- exact match {percent(last['exact_match'])}, of the original {percent(last['reference'])}")
    lines.append(f"- fingerprint of the data: `{data.get('fingerprint', 'unknown')}`")
    versions = [f"{key} {where[key]}" for key in ("svlm", "torch", "transformers", "cpu", "threads") if key in where]
    return [*lines, f"- made with {', '.join(versions) or 'unknown versions'}"]


def _limits(report: Mapping[str, Any]) -> list[str]:
    """What the figures do not say; all of it follows from the report."""
    last, stages = r.last_good(report), report["stages"]
    quality = next(stage for stage in stages if stage["index"] == last["index"]).get("quality") or {}
    lines = ["- The figures hold for questions like those that judged it; ask your own before you rely on it."]
    if quality.get("detectable") is not None:
        shown = f"{100 * quality['detectable']:.1f} points"
        lines.append(f"- With so many questions, a difference below {shown} of exact match would likely go unseen.")
    worst = min((row for row in r.tag_rows(report)), key=lambda row: row["delta"], default=None)
    if worst is not None and worst["delta"] < 0:
        name = f"{worst['tag']}: {worst['name']}"
        lines.append(f"- Hit hardest: {name}, {points(worst['delta'])} points on {worst['n']} questions.")
    lines.append(
        "- Whatever the original gets wrong or prefers unfairly, this model inherits, and may do so more often."
    )
    return lines


def _licence(kept: Mapping[str, Any], files: Mapping[str, str]) -> list[str]:
    said = str(kept.get("license_name") or kept.get("license") or "")
    beside = ", ".join(f"`{name}`" for name in files)
    lines = [
        f"The original's: {said}." if said else "The original named none that svlm found: look it up, and fill it in."
    ]
    if beside:
        lines.append(f"What the original says of itself lies beside this card: {beside}.")
    return lines


# -------------------------------------------------------------------------------------------------------------- on disk


def _ours(path: Path) -> bool:
    """Whether a card may be written there: nothing is there yet, or one of ours."""
    return not path.is_file() or MARK in path.read_text(encoding="utf-8", errors="replace")


def _same(path: Path, text: str) -> bool:
    return path.read_text(encoding="utf-8", errors="replace") == text


def _texts(folder: Path) -> dict[str, str]:
    """README and licence files of the original, as texts by name."""
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and (p.name == README or LICENCES.fullmatch(p.name))]
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in found}


def _fields(text: str) -> dict[str, Any]:
    """The front matter of a README; nothing where it has none that can be read."""
    import yaml

    block = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, flags=re.S)
    try:
        fields = yaml.safe_load(block.group(1)) if block else None
    except yaml.YAMLError:
        return {}
    return fields if isinstance(fields, dict) else {}
