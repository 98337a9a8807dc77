"""CIDEr and BLEU of captions, by the package pycocoevalcap (extra ``[captions]``): COCO's own evaluation.

A caption is its words in lower case without punctuation. COCO's scripts use a tokenizer in Java instead, which also
splits contractions (``don't`` into ``do n't``); figures may differ in the third digit.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence

from ...compress.errors import UsageError

_WORD = re.compile(r"[\w'-]+")


def require() -> None:
    """Raises:
    UsageError: pycocoevalcap is not installed.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UsageError(
            "the scores cider and bleu need the package pycocoevalcap",
            found="it is not installed",
            change="pip install 'svlm[captions]'; or another score",
        )


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each answer, from 0 to 10; usually told times 100 (1.1 is "110").

    How rare a phrase is follows from the references of all questions, so a score belongs to its set of questions.
    Source: Vedantam et al. (arXiv 1411.5726), equations 1 to 3 and the variant D of section 5.
    """
    require()
    from pycocoevalcap.cider.cider import Cider

    _, scores = Cider().compute_score(*_prepared(answers, references))
    return [float(score) for score in scores]


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-4 of each answer, from 0 to 1. The mean over answers is not the BLEU of the corpus, but it has pairs.

    Source: Papineni et al., "BLEU" (ACL 2002); brevity against the reference that is closest in length.
    """
    require()
    from pycocoevalcap.bleu.bleu import Bleu

    _, by_order = Bleu(4).compute_score(*_prepared(answers, references), verbose=0)
    return [float(score) for score in by_order[-1]]


def words(text: str) -> str:
    """The words of `text` in lower case, one space between them."""
    return " ".join(_WORD.findall(text.lower()))


def _prepared(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and answers by the number of the question."""
    return (
        {i: [words(text) for text in texts] for i, texts in enumerate(references)},
        {i: [words(text)] for i, text in enumerate(answers)},
    )
