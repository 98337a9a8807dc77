"""Whether an answer is right: exact match of normalised text."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans({c: " " for c in string.punctuation if c not in "-'%$."})


def normalise(answer: str) -> str:
    """Lower case, without articles, outer full stops, other punctuation and double spaces (the rule of VQA scorers)."""
    text = answer.lower().translate(_PUNCTUATION)
    text = _ARTICLES.sub(" ", text)
    return " ".join(word.strip(".") if not word.strip(".").isdigit() else word.rstrip(".") for word in text.split())


def exact_match(answer: str, references: Iterable[str]) -> bool:
    """Whether `answer` equals any of the references after `normalise`."""
    said = normalise(answer)
    return any(said == normalise(reference) for reference in references)
