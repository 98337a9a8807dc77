"""Stock processors for the tiny models of `zoo`: real pictures and words in, what the models take out."""

from __future__ import annotations

from typing import Any

import tokenizers as tk
import transformers as tf
from tokenizers import models, pre_tokenizers

from tests import zoo

QUESTIONS = "what is this ? where the red bear left right yes no two three cat dog question answer en one ball blue"
IDEFICS = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "\n", "\n\n"]
TILES = [f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)]
SQUARE = {"height": 16, "width": 16}


def tokenizer() -> Any:
    """Whole words; <image> is `zoo.IMAGE`, and so are the others where `zoo` has them."""
    named = {zoo.IMAGE: "<image>", zoo.VIDEO: "<video>", zoo.START: "<start>", zoo.END: "<end>"}
    vocab = {
        token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *QUESTIONS.split(), *IDEFICS, *TILES])
    }
    vocab |= {f"w{i}": i for i in range(len(vocab), zoo.END)} | {token: i for i, token in named.items()}
    core = tk.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([*named.values(), *IDEFICS[:3], *TILES])
    extra = {"image_token": "<image>", "video_token": "<video>", "boi_token": "<start>", "eoi_token": "<end>"}
    extra |= {"start_image_token": "<start>", "end_image_token": "<end>", "context_image_token": "<image>"}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=extra,
        padding_side="left",
    )


CHAT = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }} {% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}MARK{% else %} {{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}<eos>{% else %}answer {% endif %}{% endfor %}"
)


def processor(family: str) -> Any:
    words = tokenizer()
    chat = CHAT.replace("MARK", "<image>")
    if family == "llava":
        pictures = tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE)
        options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return tf.LlavaProcessor(pictures, words, chat_template=chat, **options)
    grids = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
    if family == "llava-next":
        pictures = tf.LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE, **grids)
        options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return tf.LlavaNextProcessor(pictures, words, chat_template=chat, **options)
    if family == "llava-onevision":
        pictures = tf.LlavaOnevisionImageProcessor(size=SQUARE, **grids)
        videos = tf.LlavaOnevisionVideoProcessor(size=SQUARE)
        options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
        return tf.LlavaOnevisionProcessor(pictures, words, videos, chat_template=chat, **options)
    if family in ("idefics3", "smolvlm"):
        sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
        if family == "idefics3":
            return tf.Idefics3Processor(tf.Idefics3ImageProcessor(**sizes), words, image_seq_len=4, chat_template=chat)
        videos = tf.SmolVLMVideoProcessor(**sizes)
        pictures = tf.SmolVLMImageProcessor(**sizes)
        return tf.SmolVLMProcessor(pictures, words, videos, image_seq_len=4, chat_template=chat)
    if family.startswith("qwen"):
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
        sizes |= {"size": {"shortest_edge": 64, "longest_edge": 1024}}
        kind = tf.Qwen3VLProcessor if family == "qwen3-vl" else tf.Qwen2VLProcessor
        kind = tf.Qwen2_5_VLProcessor if family == "qwen2.5-vl" else kind
        videos = (tf.Qwen3VLVideoProcessor if family == "qwen3-vl" else tf.Qwen2VLVideoProcessor)(**sizes)
        marked = CHAT.replace("MARK", "<start><image><end>")
        return kind(tf.Qwen2VLImageProcessor(**sizes), words, videos, chat_template=marked)
    if family == "paligemma":
        pictures = tf.SiglipImageProcessor(size=SQUARE)
        pictures.image_seq_length = 16
        return tf.PaliGemmaProcessor(pictures, words)
    if family == "gemma3":
        pictures = tf.Gemma3ImageProcessor(size=SQUARE)
        return tf.Gemma3Processor(pictures, words, image_seq_length=4, chat_template=CHAT.replace("MARK", "<start>"))
    assert family == "internvl"
    pictures = tf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=3)
    videos = tf.InternVLVideoProcessor(size=SQUARE)
    return tf.InternVLProcessor(pictures, words, videos, image_seq_length=4, chat_template=chat)
