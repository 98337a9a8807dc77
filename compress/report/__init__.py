"""What a run did, for people: report.html, a Markdown text and the stage table of the terminal, all from report.json.

`write` puts report.json and report.html into OUT, each in one rename; `stage_rows` is the one place that reads the
schema, so that the page, the Markdown text and the terminal cannot disagree.
"""

from __future__ import annotations

from .page import html, markdown, write
from .rows import COLUMNS, headline, stage_rows

__all__ = ["COLUMNS", "headline", "html", "markdown", "stage_rows", "write"]
