"""VQA soft accuracy: an answer is as right as the people who were asked agree with it.

Source: Antol et al., "VQA: Visual Question Answering" (arXiv 1505.00468), section 3, as VQA v2's evaluation carries it
out: of ten people's answers each is left out in turn, and the answer scores ``min(matches among the nine / 3, 1)``;
the mean of the ten is the score. Before that, answers are spelled alike, by the rules published with that evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PEOPLE = 10  # whose answers make the leave-one-out rule the official one
ENOUGH = 3  # as many who agree make an answer right

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED = re.compile(r"\d,+\d")  # 100,978
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"} | {
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _lacking(word: str) -> list[str]:
    """`word` with one of its apostrophes gone, each in turn."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_WHOLE = {lacking: word for word in _CONTRACTIONS.split() for lacking in _lacking(word)}


def spelled_alike(answer: str) -> str:
    """`answer` as VQA's evaluation compares it.

    Punctuation but apostrophes and colons becomes a space; it vanishes where the answer has it beside a space, or has a
    number with a thousands comma. Full stops go, decimal points stay. Then lower case, numbers up to ten as digits, no
    articles, and the apostrophe that a contraction lacks.
    """
    text = " ".join(answer.split())
    grouped = _GROUPED.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        loose = grouped or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if loose else " ")
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", plain).lower().split())
    return " ".join(_WHOLE.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The soft accuracy of `answer` in [0, 1].

    Args:
        references: what people answered, an answer as often as it was given. Of ten, each is left out in turn; of
            another number, ``min(matches / 3, 1)``, and of fewer than three all have to agree.
    """
    said = spelled_alike(answer)
    matches = sum(spelled_alike(reference) == said for reference in references)
    if len(references) != PEOPLE:
        return min(matches / max(1, min(ENOUGH, len(references))), 1.0)
    left = matches * min((matches - 1) / ENOUGH, 1.0) + (PEOPLE - matches) * min(matches / ENOUGH, 1.0)
    return left / PEOPLE
