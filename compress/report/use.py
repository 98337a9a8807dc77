"""How to load a result: svlm always, stock transformers where the run has tried it and it answered alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WITH_SVLM = """\
import svlm

model = svlm.load("OUT")                        # rebuilt from svlm.json, ready to generate
model = svlm.load("OUT", runtime="torch")       # the same in the fastest form that this machine has"""

ON_THE_SHELL = """\
svlm ask OUT picture.png "how many dogs are there?\""""

WITH_STOCK = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("OUT")
processor = AutoProcessor.from_pretrained("OUT")"""


def how_to_load(report: Mapping[str, Any], out: str = "OUT") -> list[tuple[str, str]]:
    """Sentences, each with the lines of code that it is about. `out`: the folder's name in them."""
    if "reload" not in report:  # nothing was published: what `svlm verify` compares, or a run that ended early
        return []
    found = [("From Python:", WITH_SVLM), ("From a shell:", ON_THE_SHELL)]
    stock = (report["reload"] or {}).get("stock")
    if stock is None:
        found.append(("What stock transformers can express loads without svlm as well:", WITH_STOCK))
    elif stock["works"]:
        found.append(("Stock transformers loads it, too, and answers alike (tried when the run ended):", WITH_STOCK))
    else:
        found[0] = (f"Only svlm loads it as it was measured; stock transformers does not: {stock['says']}.", WITH_SVLM)
    return [(words, code.replace("OUT", out)) for words, code in found]
