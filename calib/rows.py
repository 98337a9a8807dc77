"""Rows of JSON files as samples: svlm's own rows, chat messages, and the LLaVA format.

::

    {"image": "a.png" | ["a.png", ...], "question": "...", "answer": "..." | ["...", ...], "tags": {"kind": "count"}}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": "..."}]}
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}

Paths are relative to the folder of the file. A chat is one sample: its last user turn, answered by the assistant turn
after it. A LLaVA conversation is one sample for every human turn, with the turns before it as the conversation so far;
LLaVA rows without an image are left out and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..compress.errors import DataError, did_you_mean
from .sample import ImageSource, Sample

ROW_KEYS = ("id", "image", "question", "answer", "tags", "messages")
CAPTION_KEYS = ("id", "image", "file_name", "caption", "text", "question", "tags")
CAPTION_QUESTION = "Describe the image."
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_MARK = "<image>"
EXAMPLE = '{"image": "a.png", "question": "what is this?", "answer": "a cat"}'


class Folder:
    """Pictures by path relative to one folder, each with a single ImageSource, so that it is decoded once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, ImageSource] = {}

    def image(self, name: str, where: str) -> ImageSource:
        """The picture `name`, not opened yet."""
        if name not in self.known:
            self.known[name] = ImageSource(self.folder / name, where=where)
        return self.known[name]


def file_samples(file: Path) -> tuple[list[Sample], int]:
    """All samples of a .jsonl or .json file, and how many rows without an image were left out.

    Raises:
        DataError: not JSON, empty, or a row that is not as described above; with file and line or row.
    """
    folder = Folder(file.parent)
    samples: list[Sample] = []
    without_image = 0
    for where, row in _json_rows(file):
        if "conversations" in row:
            found = list(_conversation(row, folder, where))
            without_image += not found
            samples += found
        else:
            samples.append(_row(row, folder, where))
    if not samples:
        what = "every row lacks an image" if without_image else "the file is empty"
        raise DataError(f"{file.name}: {what}", where=str(file), change=f"give rows like {EXAMPLE}")
    return samples, without_image


def caption_samples(file: Path) -> list[Sample]:
    """Samples of a captions.jsonl: rows with `image` (or `file_name`) and `caption` (or `text`)."""
    folder = Folder(file.parent)
    samples = []
    for where, row in _json_rows(file):
        _check_keys(row, CAPTION_KEYS, where)
        plain: dict[str, Any] = {k: row[k] for k in ("id", "tags") if k in row}
        plain["image"] = row.get("image", row.get("file_name"))
        plain["answer"] = row.get("caption", row.get("text"))
        plain["question"] = row.get("question", CAPTION_QUESTION)
        samples.append(_row(plain, folder, where))
    if not samples:
        raise DataError("captions.jsonl is empty", where=str(file), change='rows: {"image": ..., "caption": ...}')
    return samples


def answers_of(value: Any, where: str) -> tuple[str, ...]:
    """Accepted answers from what stands in a row: nothing, a text, a number, or a list of these.

    An answer that several people gave stands there as often; the one that most of them gave comes first.
    """
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, bool) or not isinstance(v, (str, int, float)) for v in values):
        raise DataError("an answer is a text or a list of texts", where=where, found=repr(value)[:200])
    if any(isinstance(v, str) and not v.strip() for v in values):
        raise DataError(
            "an accepted answer is empty", where=where, found=repr(value)[:200],
            change="give the answer, or leave it out: then the original's own serves",
        )  # fmt: skip
    given = Counter(str(v) for v in values)
    return tuple(text for text, _ in given.most_common() for _ in range(given[text]))


def read_text(file: Path) -> str:
    """The file's text, UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not UTF-8 text", where=str(file), found=str(error)) from error
    except OSError as error:
        raise DataError(f"cannot read {file.name}", where=str(file), found=str(error)) from error


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a file with one object a line (.jsonl) or one list of objects (.json)."""
    text = read_text(file)
    if file.suffix == ".json":
        rows = _parse(text, file, 1) if text.strip() else []
        if not isinstance(rows, list):
            raise DataError(
                "a .json file holds a list of rows",
                where=str(file),
                found=f"a JSON {type(rows).__name__}",
                change="put the rows into [ ... ], or write one row a line into a .jsonl file",
            )
        numbered = ((f"{file}, row {n}", row) for n, row in enumerate(rows, 1))
    else:
        lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        numbered = ((f"{file}, line {n}", _parse(line, file, n)) for n, line in lines)
    for where, row in numbered:
        if not isinstance(row, dict):
            raise DataError("a row is a JSON object", where=where, found=repr(row)[:80], change=f"like {EXAMPLE}")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # half a pair: JSON can say it, no tokenizer and no file takes it
            found = f"a lone surrogate, {error.object[error.start]!a}"
            raise DataError("a row is not valid Unicode", where=where, found=found, change="write it anew") from error
        yield where, row


def _parse(text: str, file: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        at = error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0
        raise DataError(
            "not valid JSON",
            where=f"{file}, line {line + at}",
            found=str(error),
            change=".jsonl holds one JSON object a line, .json one list of objects",
        ) from error


def _check_keys(row: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in row:
        if key not in known:
            raise DataError(f"unknown key '{key}'", where=where, change=did_you_mean(key, known))


def _row(row: Mapping[str, Any], folder: Folder, where: str) -> Sample:
    """A row of svlm's own, with a question or with messages."""
    _check_keys(row, ROW_KEYS, where)
    names = _names(row.get("image"), where)
    tags = row.get("tags") or {}
    if not isinstance(tags, dict):
        raise DataError("tags are an object of texts", where=where, found=repr(tags)[:80], change='{"kind": "count"}')
    answers = answers_of(row.get("answer"), where)
    question, messages = row.get("question"), None
    if "messages" in row:
        if question is not None:
            raise DataError("a row has either 'question' or 'messages'", where=where, change="remove one of them")
        question, messages, names, said = _chat(row["messages"], names, where)
        answers = answers or said
    if not isinstance(question, str) or not question.strip():
        raise DataError(
            "a row without a question", where=where, found=repr(question), change=f"give rows like {EXAMPLE}"
        )
    if not names:
        raise DataError("a row without an image", where=where, change=f"give rows like {EXAMPLE}")
    name = str(row.get("id", f"{folder.folder.name}/{where.rsplit(' ', 1)[-1]}"))
    return _sample(name, names, folder, question, answers, {str(k): str(v) for k, v in tags.items()}, messages, where)


def _sample(
    name: str,
    names: list[str],
    folder: Folder,
    question: str,
    answers: tuple[str, ...],
    tags: dict[str, str],
    messages: list[dict[str, Any]] | None,
    where: str,
) -> Sample:
    images = tuple(folder.image(n, where) for n in names)
    sample = Sample(name, "+".join(names), images, question.strip(), answers, tags, None, where)
    if messages is None or messages == sample.conversation:
        return sample
    return Sample(name, sample.image_id, images, sample.question, answers, tags, messages, where)


def _names(value: Any, where: str) -> list[str]:
    names = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(n, str) or not n for n in names):
        raise DataError("an image is a path or a list of paths", where=where, found=repr(value)[:80])
    return names


def _chat(messages: Any, names: list[str], where: str) -> tuple[str, list[dict[str, Any]], list[str], tuple[str, ...]]:
    """(question, conversation up to it, image paths, answers) of chat messages; `names` fill images without a path."""
    if not isinstance(messages, list) or not messages:
        raise DataError("messages are a list of turns", where=where, found=repr(messages)[:80])
    waiting, found = list(names), []
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise DataError("a turn has the role system, user or assistant", where=where, found=repr(message)[:120])
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise DataError("content is a text or a list of parts", where=where, found=repr(content)[:80])
        kept: list[dict[str, str]] = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                kept.append({"type": "text", "text": part["text"]})
            elif kind == "image":
                path = part.get("image", part.get("path"))
                if path is None and not waiting:
                    raise DataError(
                        "an image part without a path", where=where, change='{"type": "image", "image": ..}'
                    )
                found += _names(path if path is not None else waiting.pop(0), where)
                kept.append({"type": "image"})
            else:
                raise DataError("a part is a text or an image", where=where, found=repr(part)[:120])
        turns.append({"role": role, "content": kept})
    answers = (_text(turns.pop()),) if turns[-1]["role"] == "assistant" else ()
    users = [turn for turn in turns if turn["role"] == "user"]
    if not users or turns[-1]["role"] != "user":
        raise DataError("a row without a question", where=where, change="end with a user turn and perhaps its answer")
    if waiting and not found:
        users[0]["content"][:0] = [{"type": "image"} for _ in waiting]
        found, waiting = waiting, []
    if waiting:
        raise DataError("more images than places for them", where=where, found=", ".join(waiting))
    return _text(turns[-1]), turns, found, answers


def _text(turn: Mapping[str, Any]) -> str:
    return " ".join(part["text"].strip() for part in turn["content"] if part["type"] == "text")


def _conversation(row: Mapping[str, Any], folder: Folder, where: str) -> Iterator[Sample]:
    """One sample for every human turn of a LLaVA row; none where the row has no image."""
    names = _names(row.get("image"), where)
    if not names:
        return
    turns: list[dict[str, Any]] = []
    spoken = row["conversations"]
    if not isinstance(spoken, list):
        raise DataError("conversations are a list of turns", where=where, found=repr(spoken)[:80])
    for said in spoken:
        speaker = said.get("from") if isinstance(said, dict) else None
        if speaker not in SPEAKERS or not isinstance(said.get("value"), str):
            raise DataError("a turn has 'from' (human or gpt) and 'value'", where=where, found=repr(said)[:120])
        turns.append({"role": SPEAKERS[speaker], "content": _marked(said["value"])})
    users = [turn for turn in turns if turn["role"] == "user"]
    if not users or not all(map(_text, users)):
        raise DataError("a row without a question", where=where, change="give every human turn a text")
    places = sum(part["type"] == "image" for turn in turns for part in turn["content"])
    if not places:
        users[0]["content"][:0] = [{"type": "image"} for _ in names]
    elif places != len(names):
        raise DataError(f"{places} times {IMAGE_MARK} for {len(names)} images", where=where)
    name = str(row.get("id", where.rsplit(" ", 1)[-1]))
    for i, turn in enumerate(turns):
        if turn["role"] != "user":
            continue
        seen = sum(part["type"] == "image" for t in turns[: i + 1] for part in t["content"])
        answered = i + 1 < len(turns) and turns[i + 1]["role"] == "assistant"
        answers = (_text(turns[i + 1]),) if answered else ()
        label = name if len(users) == 1 else f"{name}/{users.index(turn) + 1}"
        if seen:
            yield _sample(label, names[:seen], folder, _text(turn), answers, {}, turns[: i + 1], where)


def _marked(value: str) -> list[dict[str, str]]:
    """Text with ``<image>`` marks as parts."""
    parts: list[dict[str, str]] = []
    for i, text in enumerate(value.split(IMAGE_MARK)):
        parts += [{"type": "image"}] * (i > 0)
        parts += [{"type": "text", "text": text.strip()}] * bool(text.strip())
    return parts
