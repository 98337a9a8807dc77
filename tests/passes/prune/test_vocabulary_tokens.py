"""Trimming of real tokenizers of every kind: the same split for tokens that stay, everything comes back."""

from __future__ import annotations

import json
import random

import pytest
import tokenizers as tk

from svlm.compress.vocabulary import Numbering
from svlm.passes.prune._vocabulary import (
    added,
    closed,
    everything,
    misread,
    obstacle,
    scripts,
    spelled,
    trimmed,
    vocabulary,
)
from tests import speakers


def cut(core: tk.Tokenizer, wanted: set[int]) -> tuple[tk.Tokenizer, dict[int, int]]:
    spec = json.loads(core.to_str())
    stay = closed(spec, wanted)
    numbering = Numbering(tuple(sorted(stay)), max(everything(spec).values()) + 1)
    return tk.Tokenizer.from_str(json.dumps(trimmed(spec, stay, numbering))), {i: numbering(i) for i in stay}


@pytest.mark.parametrize("kind", speakers.KINDS)
def test_texts_of_kept_tokens_are_split_as_before_and_all_come_back(kind: str) -> None:
    core = speakers.KINDS[kind]()
    rng = random.Random(7)
    german = [speakers.text(rng, "latin") for _ in range(300)]
    wanted = {i for line in german for i in core.encode(line, add_special_tokens=False).ids}
    small, number = cut(core, wanted)
    assert core.get_vocab_size() - small.get_vocab_size() > 80, "the other scripts' tokens go"
    assert [small.id_to_token(new) for new in number.values()] == [core.id_to_token(old) for old in number]
    texts = german + [speakers.text(rng) for _ in range(1000)] + ["", " ", "\n\tx", "a\u0301", "𝔘𝔫𝔦 🙂🙂", "zzz ▁ ##a"]
    shorter = same = 0
    for line in texts:
        old, new = core.encode(line, add_special_tokens=False).ids, small.encode(line, add_special_tokens=False).ids
        unknown = core.token_to_id("<unk>")
        if all(i in number for i in old) and unknown not in old:
            assert [number[i] for i in old] == new, line
            same += 1
        elif unknown not in old:
            shorter += len(new) > len(old)
            assert number[unknown] not in new, line
            assert small.decode(new) == core.decode(old), line
    assert same > 290 and shorter > 100, "both cases are there"


@pytest.mark.parametrize("kind", speakers.KINDS)
def test_any_subset_of_tokens_will_do(kind: str) -> None:
    core = speakers.KINDS[kind]()
    rng = random.Random(3)
    spec = json.loads(core.to_str())
    texts = [speakers.text(rng) for _ in range(200)]
    unknown = core.token_to_id("<unk>")
    for share in (0.0, 0.3, 0.7):
        wanted = {i for i in everything(spec).values() if rng.random() < share}
        small, number = cut(core, wanted)
        assert misread(core, small, texts, number, unknown) == {}
        if share:
            assert wanted <= number.keys()


def test_parts_of_kept_merges_stay_and_lost_results_take_their_merges_along() -> None:
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(["a", "b", "c", "ab", "bc", "abc", "ca"])}}
    model["merges"] = [["a", "b"], "b c", ["ab", "c"], ["a", "bc"], ["c", "a"]]
    spec = {"model": model, "added_tokens": []}
    assert closed(spec, [5]) == {0, 1, 2, 3, 4, 5}, "both ways to make abc"
    made = trimmed(spec, {0, 1, 2, 3}, Numbering((0, 1, 2, 3), 7))
    assert made["model"]["merges"] == [["a", "b"]] and made["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "ab": 3}
    assert closed(spec, []) == {0, 1, 2}, "characters alone"


def test_what_is_unknown_to_unigram_goes_on_costing_the_same() -> None:
    """Z is no piece. Were the least score a higher one, Z as an unknown would be cheaper than the two rare pieces."""
    pieces = [("bbb", 0.0), ("x", -14.0), ("xa", -0.1), ("aZ", -14.0), ("b", -0.1), ("bb", -30.0)]
    core = tk.Tokenizer(tk.models.Unigram(pieces, unk_id=0))
    assert core.encode("xaZb").tokens == ["x", "aZ", "b"]
    small, number = cut(core, {1, 2, 3, 4})
    assert small.encode("xaZb").tokens == ["x", "aZ", "b"] and {0, 5} <= number.keys()
    spec = json.loads(core.to_str())
    alone = tk.Tokenizer.from_str(json.dumps(trimmed(spec, {0, 1, 2, 3, 4}, lambda i: i)))
    assert alone.encode("xaZb").tokens == ["xa", "Z", "b"], "without the rarest piece"


def test_a_token_that_smaller_ones_cannot_spell_stays() -> None:
    vocab = {t: i for i, t in enumerate(["[UNK]", "a", "##a", "b", "ab", "aa", "##ba"])}
    spec = {"model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocab}}
    assert spelled("##ba", spec) == ["##b", "##a"] and spelled(
        "ab</w>", spec | {"model": {"end_of_word_suffix": "</w>"}}
    )
    stay = closed(spec, [])
    assert vocab["ab"] in stay and vocab["##ba"] in stay, "there is no ##b"
    assert vocab["aa"] not in stay


def test_ids_of_templates_and_padding_follow() -> None:
    core = speakers.word_piece()
    core.enable_padding(pad_id=0, pad_token="<pad>")
    spec = json.loads(core.to_str())
    spec["post_processor"]["special_tokens"]["<eos>"]["ids"] = [9]
    made = trimmed(spec, {0, 1, 9}, lambda i: {0: 0, 1: 1, 9: 2, 2: 5, 3: 6, 4: 7}[i])
    assert made["post_processor"]["special_tokens"]["<eos>"]["ids"] == [2] and made["padding"]["pad_id"] == 0
    roberta = spec | {"post_processor": {"type": "RobertaProcessing", "sep": ["</s>", 9], "cls": ["<s>", 0]}}
    made = trimmed(roberta, {0, 1, 9}, lambda i: {0: 0, 1: 1, 9: 2, 2: 5, 3: 6, 4: 7}[i])
    assert made["post_processor"] == {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}


def test_what_is_misread_is_found() -> None:
    core = speakers.byte_level()
    spec = json.loads(core.to_str())
    stay = closed(spec, range(600))
    numbering = Numbering(tuple(sorted(stay)), core.get_vocab_size())
    made = trimmed(spec, stay, numbering)
    made["model"]["merges"] = made["model"]["merges"][1:]
    small = tk.Tokenizer.from_str(json.dumps(made))
    assert misread(core, small, speakers.lines(), {i: numbering(i) for i in stay}, None)


def test_refusals() -> None:
    assert "no smaller parts" in obstacle(json.loads(speakers.word_level().to_str()))
    assert "random" in obstacle({"model": {"type": "BPE", "dropout": 0.1}})
    assert "Other" in obstacle({"model": {"type": "Other"}})
    assert all(obstacle(json.loads(make().to_str())) == "" for make in speakers.KINDS.values())


def test_scripts_of_texts() -> None:
    assert scripts("größe, 3 cats!") == {"latin"} and scripts("12 ?! 🙂") == set()
    assert scripts("дом 水") == {"cyrillic", "han"} and scripts("ﾊＡ") == {"katakana", "latin"}


def test_added_tokens_are_told_apart() -> None:
    spec = json.loads(speakers.byte_level().to_str())
    assert list(added(spec)) == speakers.SPECIAL and set(added(spec)) <= set(vocabulary(spec))
