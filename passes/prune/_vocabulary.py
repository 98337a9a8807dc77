"""Which tokens a tokenizer needs besides those that are wanted, and its tokenizer.json without the others.

Pure functions on the JSON of Hugging Face `tokenizers`. What they guarantee: **a text whose tokens all stay is split
exactly as before**, and what could be encoded still can.

* BPE (Sennrich et al., arXiv 1508.07909). `closed` keeps, with every token, all merges that yield it and their parts,
  recursively. Every symbol that appears while a text is merged ends up inside one of its final tokens as a part in that
  token's tree of merges, so where the final tokens stay, so do all these symbols and merges. By induction over the
  steps: both tokenizers hold the same symbols; the old one picks the lowest-ranked merge that applies, the new one has
  that merge, no other that the old one lacks, and the same order; so it picks the same.
* Unigram (Kudo, arXiv 1804.10959). The best path is the best of all; among fewer paths that still contain it, it stays
  the best, and of equals the first. The score of what is unknown follows the least score of all pieces, so one piece
  with that score stays.
* WordPiece takes the longest piece that matches. Where that one stays, it is the longest of the fewer pieces, too.

A removed token is spelled by smaller ones: by the 256 byte tokens where the tokenizer falls back to bytes, else by
single characters (the 256 letters of a byte-level alphabet are such), which all stay, together with tokens that they
cannot spell.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Spec = dict[str, Any]  # a parsed tokenizer.json
KINDS = ("BPE", "Unigram", "WordPiece")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SCRIPTS = {
    "cjk": "han",
    "ideographic": "han",
    "katakana-hiragana": "katakana",
}  # first words of Unicode names that are not the script's


def obstacle(spec: Spec) -> str:
    """Why no token can be taken out; the empty string where some can."""
    model = spec["model"]
    if model.get("type") == "WordLevel":
        return "a WordLevel vocabulary has no smaller parts, so a removed word could not be written any more"
    if model.get("type") not in KINDS:
        return f"a tokenizer of type {model.get('type')}; known are {', '.join(KINDS)}"
    if model.get("dropout"):
        return "BPE with dropout splits a text at random"
    return ""


def vocabulary(spec: Spec) -> dict[str, int]:
    """Token -> id, without added tokens that the model does not hold."""
    vocab = spec["model"]["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def added(spec: Spec) -> dict[str, int]:
    """Special and other added tokens -> id."""
    return {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}


def everything(spec: Spec) -> dict[str, int]:
    return vocabulary(spec) | added(spec)


# ------------------------------------------------------------------------------------------------------- what must stay


def fallback(spec: Spec) -> set[int]:
    """Ids of what spells the texts that no other token spells, and of what the tokenizer itself puts into texts."""
    vocab = vocabulary(spec)
    model = spec["model"]
    found = {vocab[c] for c in _own_characters(spec) if c in vocab}
    unknown = model.get("unk_token")
    found |= {vocab[unknown]} if unknown in vocab else set()
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        found.add(scores.index(min(scores)))
        found |= set() if model.get("unk_id") is None else {model["unk_id"]}
    if model.get("byte_fallback") and all(token in vocab for token in BYTES):
        return found | {vocab[token] for token in BYTES}
    for token, i in vocab.items():
        parts = spelled(token, spec)
        if parts == [token] or any(part not in vocab for part in parts):
            found.add(i)
    return found


def spelled(token: str, spec: Spec) -> list[str]:
    """`token` in the smallest symbols that the model starts from: ``##ab`` is ``##a``, ``##b``."""
    model = spec["model"]
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    inside = bool(prefix) and token.startswith(prefix) and token != prefix
    ends = bool(suffix) and token.endswith(suffix) and token != suffix
    letters = list(token.removeprefix(prefix) if inside else token)
    if ends:
        letters = list("".join(letters).removesuffix(suffix))
    parts = [letter if i == 0 and not inside else prefix + letter for i, letter in enumerate(letters)]
    return [*parts[:-1], parts[-1] + suffix] if ends and parts else parts


def _own_characters(spec: Spec) -> set[str]:
    """Characters of every text in normalizer, pre-tokenizer and decoder: such as the mark that stands for a space.

    Spelled in bytes they would come back as themselves.
    """

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            value = [entry for key, entry in value.items() if key != "precompiled_charsmap"]
        if isinstance(value, list):
            for entry in value:
                yield from texts(entry)
        elif isinstance(value, str):
            yield value

    parts = [spec.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    return {c for text in texts(parts) for c in text}


def closed(spec: Spec, wanted: Iterable[int]) -> set[int]:
    """Ids of all tokens that stay where those of `wanted` do: added ones, the fallback, and parts of merges."""
    vocab = vocabulary(spec)
    stay = {*wanted, *added(spec).values(), *fallback(spec)}
    if spec["model"]["type"] != "BPE":
        return stay
    parts: dict[int, list[int]] = {}
    for left, right, whole in _merges(spec):
        parts.setdefault(vocab[whole], []).extend((vocab[left], vocab[right]))
    open_ends = list(stay)
    while open_ends:
        new = {part for part in parts.get(open_ends.pop(), ()) if part not in stay}
        stay |= new
        open_ends += new
    return stay


def _merges(spec: Spec) -> Iterator[tuple[str, str, str]]:
    """(left, right, what they become) in the order of their ranks."""
    prefix = spec["model"].get("continuing_subword_prefix") or ""
    for merge in spec["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right, left + right.removeprefix(prefix)


# ----------------------------------------------------------------------------------------------------- without the rest


def trimmed(spec: Spec, stay: set[int], number: Callable[[int], int]) -> Spec:
    """The tokenizer.json with the tokens `stay` alone (as `closed` gives them), under the ids that `number` gives."""
    model = dict(spec["model"])
    vocab = {token: i for token, i in vocabulary(spec).items() if i in stay}
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in stay]
        if model.get("unk_id") is not None:
            model["unk_id"] = number(model["unk_id"])
    else:
        model["vocab"] = {token: number(i) for token, i in vocab.items()}
    if model["type"] == "BPE":
        triples = zip(spec["model"]["merges"], _merges(spec))
        model["merges"] = [merge for merge, (_, _, whole) in triples if whole in vocab]
    made = spec | {
        "model": model,
        "added_tokens": [token | {"id": number(token["id"])} for token in spec.get("added_tokens") or ()],
        "post_processor": _renumbered(spec.get("post_processor"), number),
    }
    if spec.get("padding"):
        made["padding"] = spec["padding"] | {"pad_id": number(spec["padding"]["pad_id"])}
    return made


def _renumbered(processor: Any, number: Callable[[int], int]) -> Any:
    """A post-processor's own ids: `ids` of templates, (token, id) of BERT's and RoBERTa's."""
    if isinstance(processor, list):
        return [_renumbered(entry, number) for entry in processor]
    if not isinstance(processor, Mapping):
        return processor
    made = {}
    for key, value in processor.items():
        if key == "ids":
            made[key] = [number(i) for i in value]
        elif key in ("sep", "cls") and isinstance(value, list):
            made[key] = [value[0], number(value[1])]
        else:
            made[key] = _renumbered(value, number)
    return made


def misread(
    before: Any, after: Any, texts: Iterable[str], number: Mapping[int, int], unknown: int | None
) -> dict[str, list[int]]:
    """Texts that two tokenizers do not both read: text -> its tokens in the first one.

    Where all tokens of a text stay it has to be split in the same way; any other has to come back from its tokens as it
    did, with nothing unknown in it. What was unknown before may become known.

    Args:
        before, after: `tokenizers.Tokenizer` without padding and truncation.
        number: ids of the tokens that stay -> new ones.
        unknown: the id in `before` that stands for what cannot be encoded.
    """
    wrong: dict[str, list[int]] = {}
    every = list(dict.fromkeys(texts))
    for start in range(0, len(every), 4096):
        chunk = every[start : start + 4096]
        olds = [e.ids for e in before.encode_batch(chunk, add_special_tokens=False)]
        news = [e.ids for e in after.encode_batch(chunk, add_special_tokens=False)]
        was = before.decode_batch(olds, skip_special_tokens=False)
        now = after.decode_batch(news, skip_special_tokens=False)
        for text, old, new, said, says in zip(chunk, olds, news, was, now):
            lost = 0 if unknown is None else new.count(number[unknown]) - old.count(unknown)
            if unknown is not None and unknown in old:
                same = lost <= 0
            elif all(i in number for i in old):
                same = [number[i] for i in old] == new
            else:
                same = said == says and lost == 0
            if not same:
                wrong[text] = old
    return wrong


# -------------------------------------------------------------------------------------------------------------- scripts


def scripts(text: str) -> set[str]:
    """Unicode scripts of the letters in `text` (latin, cyrillic, han, ...), by the first word of their names."""
    found = set()
    for character in text:
        if character.isalpha():
            name = unicodedata.name(character, "unknown").split()
            word = name[1] if name[0] in ("FULLWIDTH", "HALFWIDTH") and len(name) > 1 else name[0]
            found.add(SCRIPTS.get(word.lower(), word.lower()))
    return found
