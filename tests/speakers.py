"""Tiny real tokenizers of every kind, trained on made-up text in several scripts, and models that speak with them."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers as tk
import torch
import transformers as tf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
WORDS = {
    "latin": "haus baum katze wasser licht what colour left right three under größe straße house water",
    "cyrillic": "дом вода кошка дерево свет сколько слева справа цвет большой",
    "greek": "σπίτι νερό γάτα δέντρο φως πόσα αριστερά δεξιά χρώμα",
    "han": "房子 水 猫 树 光 多少 左边 右边 颜色 大的 三个",
}
ROOTS = {script: words.split() for script, words in WORDS.items()}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:"
    "{% if m['content'] is string %} {{ m['content'] }}{% else %}"
    "{% for part in m['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %} {{ part['text'] }}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def text(rng: random.Random, *scripts: str) -> str:
    """A line of words of these scripts (default: all), some glued together, with digits, marks and emoji."""
    roots = [word for script in scripts or ROOTS for word in ROOTS[script]]
    words = []
    for _ in range(rng.randint(1, 9)):
        word = "".join(rng.choice(roots) for _ in range(rng.choice((1, 1, 1, 2))))
        words.append(word.capitalize() if rng.random() < 0.2 else word)
        if rng.random() < 0.15:
            words.append(rng.choice(("12", "3,5", "?", "!", "(a)", "🙂", "é", "—", "ﬁ")))
    return rng.choice((" ", " ", "  ")).join(words)


@cache
def lines(count: int = 1500) -> tuple[str, ...]:
    rng = random.Random(1)
    return tuple([text(rng, name) if i % 3 else text(rng) for i in range(count) for name in [rng.choice(list(ROOTS))]])


def byte_level(ignore_merges: bool = False) -> tk.Tokenizer:
    core = tk.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(lines(), trainer)
    return core


def byte_fallback() -> tk.Tokenizer:
    """As Gemma's: spaces are a mark, unknown characters are bytes."""
    core = tk.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, limit_alphabet=60, show_progress=False)
    core.train_from_iterator(lines(), trainer)
    return _bytes_are_no_added_tokens(core)


def unigram(fallback: bool = False) -> tk.Tokenizer:
    core = tk.Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256) if fallback)]
    trainer = trainers.UnigramTrainer(
        vocab_size=800 if fallback else 600, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(lines(), trainer)
    return _bytes_are_no_added_tokens(core) if fallback else core


def _bytes_are_no_added_tokens(core: tk.Tokenizer) -> tk.Tokenizer:
    spec = json.loads(core.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    spec["model"]["byte_fallback"] = True
    return tk.Tokenizer.from_str(json.dumps(spec))


def word_piece() -> tk.Tokenizer:
    core = tk.Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(
        lines(), trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return core


def suffixed() -> tk.Tokenizer:
    """As CLIP's: the last symbol of a word carries a mark."""
    core = tk.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    core.train_from_iterator(lines(), trainer)
    return core


def word_level() -> tk.Tokenizer:
    core = tk.Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(lines(), trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return core


KINDS = {
    "byte-level BPE": byte_level,
    "byte-level BPE that ignores merges": lambda: byte_level(True),
    "BPE with byte fallback": byte_fallback,
    "BPE with a suffix": suffixed,
    "Unigram": unigram,
    "Unigram with byte fallback": lambda: unigram(True),
    "WordPiece": word_piece,
}


def processor(core: tk.Tokenizer, image: int = 16, patch: int = 8) -> tf.LlavaProcessor:
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    size = {"height": image, "width": image}
    pictures = tf.CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size)
    return tf.LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def llava(rows: int, tied: bool = True, seed: int = 0, image_token: int = 4) -> Any:
    """A random LLaVA with pictures of 16 x 16 and 4 visual tokens; its table has `rows` rows."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=32),
        text_config=tf.LlamaConfig(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = tf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.generation_config = tf.GenerationConfig(
        do_sample=False, max_new_tokens=8, pad_token_id=0, bos_token_id=1, eos_token_id=[2], suppress_tokens=[3]
    )
    return model


def save(folder: Path, core: tk.Tokenizer, spare: int = 27) -> Path:
    """A model folder: a random LLaVA with `spare` rows more than tokens, and its processor."""
    made = processor(core)
    model = llava(len(made.tokenizer) + spare)
    model.to(torch.bfloat16).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
