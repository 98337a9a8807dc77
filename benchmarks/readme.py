"""Regenerate the results of README.md from a finished run: `python benchmarks/readme.py runs/demo`.

The run's report.json is kept as benchmarks/results/demo.json, the block between the two comments is rendered from it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from svlm.compress.report import COLUMNS, headline, read, stage_rows

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "demo.json"
BEGIN = "<!-- results: written by benchmarks/readme.py from runs/demo, do not edit -->\n"
END = "<!-- end of results -->"
SHOWN = ("stage", "settings", "exact_match", "change", "kl", "flips", "bytes", "visual_tokens")


def block(report: dict[str, Any]) -> str:
    """The verdict and a narrow stage table, as Markdown."""
    columns = [c for c in COLUMNS if c.key in SHOWN]
    lines = [" ".join(headline(report)), ""]
    lines.append("| " + " | ".join(c.title for c in columns) + " |")
    lines.append("|" + "|".join("---:" if c.numeric else "---" for c in columns) + "|")
    lines += ["| " + " | ".join(c.text(row) for c in columns) + " |" for row in stage_rows(report)]
    where = report["environment"]
    lines += ["", f"`svlm compress demo -r default`, {where['threads']} threads, torch {where['torch']}."]
    return "\n".join(lines) + "\n"


def main(out: str) -> None:
    report = read(out)
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    readme.write_text(head + BEGIN + block(report) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
