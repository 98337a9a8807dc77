"""What a run did, for people: report.html, a model card, a Markdown text and the stage table of the terminal, all from
report.json.

`write` puts report.json and report.html into OUT, each in one rename; `stage_rows` is the one place that reads the
stages, so that the page, the card, the Markdown text and the terminal cannot disagree.
"""

from __future__ import annotations

from .files import read, write, write_run
from .gallery import gallery_rows
from .page import html, markdown
from .rows import COLUMNS, headline, stage_rows

__all__ = ["COLUMNS", "gallery_rows", "headline", "html", "markdown", "read", "stage_rows", "write", "write_run"]
