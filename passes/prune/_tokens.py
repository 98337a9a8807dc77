"""Which tokens a corpus, a list or a script needs, and a processor without the others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...calib.rows import file_samples, read_text
from ...compress import processors
from ...compress.errors import DataError, Unmet, did_you_mean
from ...compress.vocabulary import Numbering, each_id, is_id_key
from ._vocabulary import Spec, closed, everything, misread, obstacle, scripts, trimmed

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView

FIT, COMMON = "fit", "common"
ROUNDS = 4  # of keeping what would be misread


@dataclass(frozen=True)
class Trim:
    """What is to happen to the tokens.

    Attributes:
        kept: ids of the rows of the table that stay, ascending. processor: without the other tokens.
        texts: how many were read by both tokenizers. spared: tokens that stay because texts would be misread otherwise.
    """

    kept: tuple[int, ...]
    processor: Any
    texts: int
    spared: tuple[str, ...]


def backend(processor: Any) -> Any:
    """A copy of the processor's `tokenizers.Tokenizer`, without padding and truncation.

    Raises:
        Unmet: there is none, or one that cannot be trimmed.
    """
    import tokenizers

    tokenizer = getattr(processor, "tokenizer", None)
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise Unmet(
            "the model has no tokenizer.json, so its tokens cannot be taken out",
            found="no processor with a tokenizer" if tokenizer is None else type(tokenizer).__name__,
            change="put tokenizer.json beside the weights (a tokenizer of the `tokenizers` library)",
        )
    copied = tokenizers.Tokenizer.from_str(core.to_str())
    copied.no_padding()
    copied.no_truncation()
    reason = obstacle(spec_of(copied))
    if reason:
        raise Unmet("the tokenizer cannot do without any of its tokens", where=type(tokenizer).__name__, found=reason)
    return copied


def spec_of(core: Any) -> Spec:
    """The tokenizer.json of a `tokenizers.Tokenizer`."""
    return json.loads(core.to_str())


# ---------------------------------------------------------------------------------------------------- what is asked for


def corpus_texts(file: Path) -> list[str]:
    """The lines of a text file; questions, answers and conversations of a .jsonl or .json file of samples.

    Raises:
        DataError: the file cannot be read or holds nothing.
    """
    if file.suffix in (".jsonl", ".json"):
        found: list[str] = []
        for sample in file_samples(file)[0]:
            for turn in sample.conversation:
                content = turn["content"]
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                found += [part["text"] for part in parts if part["type"] == "text"]
            found += sample.answers
    else:
        found = [line for line in read_text(file).splitlines() if line.strip()]
    if not found:
        raise DataError("the corpus file is empty", where=str(file), change="give a file with a text a line")
    return list(dict.fromkeys(found))


def _encoded(core: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), 4096):
        for encoding in core.encode_batch(list(texts[start : start + 4096]), add_special_tokens=False):
            yield encoding.ids


def counted(core: Any, texts: Sequence[str]) -> Counter[int]:
    """How often each token occurs in `texts`, where a word may start a text or follow a space."""
    bare, spaced = (Counter(chain.from_iterable(_encoded(core, [lead + t for t in texts]))) for lead in ("", " "))
    return bare | spaced


def length(core: Any, texts: Sequence[str]) -> int:
    """Tokens of all texts."""
    return sum(map(len, _encoded(core, texts)))


def fit_rows(view: ModelView, batches: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Tokens of every question and answer of the fit split, padding left out."""
    rows = []
    for batch in batches:
        ids = batch.get("input_ids")
        if ids is not None:
            real = ids >= 0 if batch.get("attention_mask") is None else batch["attention_mask"] != 0
            rows += [row[mask].tolist() for row, mask in zip(ids, real)]
        if view.family.seq2seq and "labels" in batch:
            rows += [row[row >= 0].tolist() for row in batch["labels"]]
    return rows


def of_scripts(core: Any, names: Sequence[str]) -> set[int]:
    """Ids of the tokens whose letters are all of the scripts `names`; ``common`` are those without a letter.

    Raises:
        Unmet: no token is of one of the scripts.
    """
    size = max(core.get_vocab(with_added_tokens=True).values()) + 1
    texts = core.decode_batch([[i] for i in range(size)], skip_special_tokens=False)
    wanted, seen, found = set(names), set(), set()
    for i, text in enumerate(texts):
        if "\ufffd" in text or not text:  # part of a character: it stays as a part of tokens that stay
            continue
        mine = scripts(text) or {COMMON}
        seen |= mine
        if mine <= wanted:
            found.add(i)
    for name in names:
        if name not in seen:
            raise Unmet(f"no token is of the script '{name}'", change=did_you_mean(name, seen))
    return found


def of_words(core: Any, keep: Sequence[str] | str) -> set[int]:
    """Ids of the tokens and words in `keep`, a list or a file with one a line."""
    words = corpus_texts(Path(keep)) if isinstance(keep, str) else list(keep)
    known = core.get_vocab(with_added_tokens=True)
    return {known[word] for word in words if word in known} | set(counted(core, words))


# ------------------------------------------------------------------------------------------------ a processor with less


def trim(view: ModelView, wanted: Iterable[int], rows: int, texts: Sequence[str]) -> Trim:
    """The tokens that stay, and a processor that has no others; tried on `texts` and on the text of every token.

    Args:
        wanted: ids that have to stay. rows: of the token embedding.

    Raises:
        Unmet: a smaller tokenizer cannot be made of this one, or reads texts otherwise.
    """
    before = backend(view.processor)
    spec = spec_of(view.processor.tokenizer.backend_tokenizer)  # with its padding and truncation
    names = {i: token for token, i in everything(spec).items()}
    own = before.decode_batch([[i] for i in names], skip_special_tokens=False)
    tried = list(dict.fromkeys(text for text in (*texts, *own) if text))
    unknown = _unknown(spec)
    asked = {*wanted, *(i for key, i in vars(view.processor).items() if is_id_key(key) and type(i) is int)}
    spared: list[int] = []
    wrong: dict[str, list[int]] = {}
    for _ in range(ROUNDS):
        stay = closed(spec, asked) | {i for i in names if i >= rows}
        numbering = Numbering(tuple(sorted(i for i in stay | asked if i < rows)), rows)
        number = {i: numbering(i) for i in stay}
        processor = remade(view, trimmed(spec, stay, numbering), numbering)
        after = backend(processor)
        _same_ids(after, names, number)
        wrong = misread(before, after, tried, number, unknown)
        if not wrong:
            return Trim(numbering.kept, processor, len(tried), tuple(names.get(i, str(i)) for i in spared))
        more = {i for ids in wrong.values() for i in ids} - stay
        if not more:
            break
        asked |= more
        spared += sorted(more)
    text, ids = next(iter(wrong.items()))
    raise Unmet(
        "a smaller tokenizer reads some texts otherwise",
        found=f"{len(wrong)} texts, first {text[:80]!r}, which was {[names.get(i) for i in ids][:12]}",
        change="give these tokens to 'keep'",
    )


def _unknown(spec: Spec) -> int | None:
    """The id of what cannot be encoded, where the tokenizer has one."""
    model = spec["model"]
    return model.get("unk_id") if model["type"] == "Unigram" else everything(spec).get(model.get("unk_token"))


def _same_ids(after: Any, names: Mapping[int, str], number: Mapping[int, int]) -> None:
    """The loaded tokenizer has exactly the tokens that stay, under their new ids."""
    found = after.get_vocab(with_added_tokens=True)
    wanted = {names[old]: new for old, new in number.items() if old in names}
    for token in sorted(found.keys() | wanted.keys()):
        if found.get(token) != wanted.get(token):
            raise Unmet(
                "transformers numbers the smaller tokenizer in another way",
                where=f"token {token!r}",
                found=f"{found.get(token)}, wanted {wanted.get(token)}",
                change="leave prune.vocabulary out for this model",
            )


def remade(view: ModelView, spec: Spec, numbering: Numbering) -> Any:
    """The processor with another tokenizer.json, saved and loaded as transformers does it.

    Raises:
        Unmet: stock transformers do not load it.
    """

    def edit(folder: Path) -> None:
        for other in set(view.processor.tokenizer.vocab_files_names.values()) - {"tokenizer.json"}:
            (folder / other).unlink(missing_ok=True)
        for file in folder.glob("*.json"):
            if file.name not in ("tokenizer.json", "config.json"):
                told = json.loads(file.read_text(encoding="utf-8"))
                file.write_text(json.dumps(_told_anew(told, numbering), ensure_ascii=False), encoding="utf-8")
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")

    return processors.remade(view.processor, view.model.config, edit)


def _told_anew(value: Any, numbering: Numbering) -> Any:
    """A processor's settings with new ids; a token that went is forgotten by `added_tokens_decoder`."""
    if isinstance(value, list):
        return [_told_anew(entry, numbering) for entry in value]
    if not isinstance(value, dict):
        return value
    made = {}
    for key, entry in value.items():
        if key == "added_tokens_decoder":
            made[key] = {str(numbering(int(i))): token for i, token in entry.items()}
        else:
            made[key] = each_id(entry, numbering) if is_id_key(key) else _told_anew(entry, numbering)
    return made


def texts_of(core: Any, rows: Iterable[list[int]]) -> Iterator[str]:
    """Texts of rows of tokens, without special ones."""
    yield from core.decode_batch(list(rows), skip_special_tokens=True)
