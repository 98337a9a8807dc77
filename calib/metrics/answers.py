"""Whether an answer is right: exact match of normalised text."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_PUNCTUATION = str.maketrans({c: " " for c in string.punctuation if c not in "-'%$."})
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(n)
    for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}


def normalise(answer: str) -> str:
    """Lower case; no articles, punctuation or double spaces; numbers up to ten as digits (the rule of VQA scorers).

    Decimal points, inner hyphens and apostrophes, per cent and dollar signs stay. An answer that is nothing but an
    article or punctuation (the option "A") stays as it is, so that it does not equal an empty one.
    """
    plain = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    words = [_bare(word) for word in _THOUSANDS.sub("", plain).translate(_PUNCTUATION).split()]
    words = [_NUMBERS.get(word, word) for word in words if word]
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(kept or words) or plain


def _bare(word: str) -> str:
    """Without full stops and quotes around it; the point of ``.5`` is no full stop."""
    inner = word.strip(".'")
    return "." + inner if inner.isdigit() and word.startswith(".") else inner


def exact_match(answer: str, references: Iterable[str]) -> bool:
    """Whether `answer` equals any of the references after `normalise`."""
    said = normalise(answer)
    return any(said == normalise(reference) for reference in references)
