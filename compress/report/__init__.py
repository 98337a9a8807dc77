"""What a run did, for people: report.html, a Markdown text and the stage table of the terminal, all from report.json.

`write` puts report.json and report.html into OUT, each in one rename; `stage_rows` is the one place that reads the
schema, so that the page, the Markdown text and the terminal cannot disagree.
"""

from __future__ import annotations

from .gallery import gallery_rows
from .page import html, markdown, read, write
from .rows import COLUMNS, headline, stage_rows

__all__ = ["COLUMNS", "gallery_rows", "headline", "html", "markdown", "read", "stage_rows", "write"]
