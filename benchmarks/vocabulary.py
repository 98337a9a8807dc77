"""A random model with 262,144 tokens and a real tokenizer, cut to two languages, to one script, to its questions.

    python benchmarks/vocabulary.py --json benchmarks/results/vocabulary.json

The tokenizer is a byte-level BPE, trained on text that is on every machine: sources and documents of Python and of the
installed packages, and the message catalogues of the system (gettext, dozens of languages). The model is a LLaVA whose
weights were never trained. For each way to say what is needed: bytes of weights and of tokenizer.json before and after,
the largest difference of a logit of a token that stayed, and 1,000 texts drawn from everything, of all languages: how
many come back from their tokens as before, how many are split as before, how many more tokens they take.
"""

from __future__ import annotations

import argparse
import gettext
import json
import random
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as tf
from PIL import Image

import svlm
from svlm.compress import storage
from svlm.compress.disk import write_json
from svlm.compress.pipeline import apply_pass

CATALOGUES = Path("/usr/share/locale")
MESSAGES = 12_000  # of a language
SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:"
    "{% if m['content'] is string %} {{ m['content'] }}{% else %}"
    "{% for part in m['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def sources(megabytes: int, seed: int) -> Iterator[str]:
    """Lines of sources and documents, files in random order, up to so many bytes."""
    roots = [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib")]
    files = sorted({p for root in roots for kind in ("py", "md", "txt", "rst") for p in root.rglob(f"*.{kind}")})
    random.Random(seed).shuffle(files)
    left = megabytes * 10**6
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield from (line for line in text.splitlines() if line.strip())
        left -= len(text)
        if left < 0:
            return


def catalogues() -> dict[str, list[str]]:
    """Messages of the system's gettext catalogues by language; `en` are those that were translated."""
    found: dict[str, list[str]] = {"en": []}
    for file in sorted(CATALOGUES.glob("*/LC_MESSAGES/*.mo")):
        try:
            with file.open("rb") as handle:
                pairs = gettext.GNUTranslations(handle)._catalog  # type: ignore[attr-defined]
        except (OSError, UnicodeDecodeError, ValueError, IndexError):  # a catalogue that Python does not read
            continue
        for key, said in pairs.items():
            asked = key if isinstance(key, str) else key[0]
            if asked and said:
                found["en"] += asked.splitlines()
                found.setdefault(file.parts[-3].split("_")[0], []).extend(said.splitlines())
    return {name: [line for line in dict.fromkeys(lines) if line.strip()][:MESSAGES] for name, lines in found.items()}


def tokenizer(texts: list[str], size: int) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, max_token_length=24, show_progress=False
    )
    core.train_from_iterator(texts, trainer, len(texts))
    return core


def build(folder: Path, core: tokenizers.Tokenizer, width: int) -> None:
    """A model folder: random weights in bfloat16, head and embedding one tensor."""
    named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    spoken = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, **named, extra_special_tokens={"image_token": "<image>"}, padding_side="left"
    )
    size = {"height": 32, "width": 32}
    tf.LlavaProcessor(
        image_processor=tf.CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size),
        tokenizer=spoken,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**shape, image_size=32, patch_size=8),
        text_config=tf.LlamaConfig(
            **shape, vocab_size=len(spoken), pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True
        ),
        image_token_index=3,
        vision_feature_layer=-1,
        image_seq_length=16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    tf.LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)


def questions(folder: Path, lines: list[str]) -> svlm.CalibrationSet:
    rows = []
    for i, (asked, answer) in enumerate(zip(lines[::2], lines[1::2])):
        Image.new("RGB", (32, 32), (i * 7 % 256, 255 - i * 11 % 256, i * 3 % 256)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": asked, "answer": answer})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return svlm.CalibrationSet.load(str(folder / "questions.jsonl"), fit=len(rows) // 2, check=len(rows) // 2)


def measured(folder: Path, data: svlm.CalibrationSet, settings: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    original, small = svlm.load_view(folder), svlm.load_view(folder)
    bench = svlm.Workbench(original, data, batch_size=4, latency=False)
    numbers = apply_pass(svlm.find("prune.vocabulary").from_settings(settings), small, bench.context(small)).numbers
    kept = list(small.vocabulary or ())
    difference = 0.0
    speech = bench.speaking(small)
    samples = data.check
    for start in range(0, len(samples), 4):
        chunk = samples[start : start + 4]
        # the same tokens for both, in the ids of each: those of the smaller tokenizer
        new = speech.encoder.encode(chunk)
        old = new | {"input_ids": torch.tensor(kept)[new["input_ids"]]}
        del new["labels"], old["labels"]
        with torch.no_grad():
            apart = original.model(**old).logits[..., kept] - small.model(**new).logits
        difference = max(difference, float(apart.abs().max()))
    before, after = (view.processor.tokenizer.backend_tokenizer for view in (original, small))
    back = same = longer = shorter = 0
    for text in texts:
        old_ids, new_ids = before.encode(text).ids, after.encode(text).ids
        same += old_ids == [kept[i] for i in new_ids]
        back += before.decode(old_ids) == text == after.decode(new_ids)
        longer, shorter = longer + len(new_ids), shorter + len(old_ids)
    with tempfile.TemporaryDirectory() as place:
        found = {name: Path(place) / name for name in ("original", "small")}
        sizes = {name: storage.save(view, found[name]) for name, view in (("original", original), ("small", small))}
        spelled = {name: (path / "tokenizer.json").stat().st_size for name, path in found.items()}
        again = tf.AutoModelForImageTextToText.from_pretrained(found["small"], dtype=torch.float32)
        with torch.no_grad():
            reload = float((again(**new).logits - small.model(**new).logits).abs().max())
    return {
        "tokens": [numbers["tokens_before"], numbers["tokens"]],
        "parameters": [numbers["parameters_before"], numbers["parameters"]],
        "bytes": [sizes["original"], sizes["small"]],
        "tokenizer_bytes": [spelled["original"], spelled["small"]],
        "largest_logit_difference": difference,
        "largest_difference_after_stock_reload": reload,
        "texts": len(texts),
        "come_back": back,
        "split_as_before": same,
        "tokens_of_the_texts": longer / shorter,
        "corpus_tokens": [numbers["corpus_tokens_before"], numbers["corpus_tokens"]],
        "lost_mass": numbers["lost_mass"],
        "texts_read_by_both": numbers["texts_read_by_both"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=262_144, help="tokens of the original")
    parser.add_argument("--width", type=int, default=256, help="of the embedding")
    parser.add_argument("--megabytes", type=int, default=20, help="of sources to train the tokenizer on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    o = parser.parse_args()
    spoken = catalogues()
    every = [*sources(o.megabytes, o.seed), *(line for lines in spoken.values() for line in lines)]
    rng = random.Random(o.seed)
    with tempfile.TemporaryDirectory(prefix="vocabulary-") as name:
        folder = Path(name)
        core = tokenizer(every, o.size)
        print(f"{core.get_vocab_size()} tokens from {len(every)} lines", file=sys.stderr, flush=True)
        build(folder, core, o.width)
        pair = [line for language in ("en", "de") for line in spoken.get(language, [])] or every[:5000]
        data = questions(folder, rng.sample([line for line in pair if len(line) < 200], 32))
        (folder / "corpus.txt").write_text("\n".join(pair), encoding="utf-8")
        texts = rng.sample(every, 500) + rng.sample([line for lines in spoken.values() for line in lines] or every, 500)
        ways = {
            "English and German catalogues": {"corpus": ["fit", str(folder / "corpus.txt")]},
            "the same, tokens seen 4 times": {"corpus": ["fit", str(folder / "corpus.txt")], "least": 4},
            "latin script and marks": {"scripts": ["latin", "common"]},
            "the 16 fit questions": {},
        }
        rows = {"languages": len(spoken), "width": o.width, "ways": {}}
        for way, settings in ways.items():
            rows["ways"][way] = measured(folder, data, settings, texts)
            write_json(o.json, rows)
            print(way, rows["ways"][way], file=sys.stderr, flush=True)
    print(table(rows["ways"]))


def table(ways: dict[str, Any]) -> str:
    """Markdown: a line for each way."""
    lines = [
        "| needed | tokens | weights | tokenizer.json | largest logit difference | texts that come back "
        "| split as before | tokens of the texts |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for way, row in ways.items():
        (many, few), (large, small), (long, short) = row["tokens"], row["bytes"], row["tokenizer_bytes"]
        lines.append(
            f"| {way} | {many:,} → {few:,} | {large / 1e6:.1f} → {small / 1e6:.1f} MB (÷{large / small:.2f}) "
            f"| {long / 1e6:.1f} → {short / 1e6:.1f} MB | {row['largest_logit_difference']:.1e} "
            f"| {row['come_back']} of {row['texts']} | {row['split_as_before']} | ×{row['tokens_of_the_texts']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
