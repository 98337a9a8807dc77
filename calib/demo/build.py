"""The demo model and its processor, made of stock transformers classes; weights random, trained by `train.py`.

A conversation is rendered as token ids without any text between the roles:

    <bos> <user> <image> x 64  what is in the top left ?  <assistant>  bear <eos>  <user> ...

so the ids of a question do not depend on what comes before it, which is what lets `layout.py` train many questions of
one picture in one sequence.
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from . import scenes

IMAGE, PATCH = 96, 12
VISUAL_TOKENS = (IMAGE // PATCH) ** 2
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>", "<system>")
EASY_VQA_WORDS = """? a black blue brown circle color contain does gray green image in is no not of present rectangle
red shape teal the there triangle what yellow yes"""
SPARE_WORDS = """0 5 6 7 8 , : ; ! - ' and or are any it this that picture photo scene see show shows you i me tell
describe please with on at to next side corner thing things object objects how many much which where who when why do can
one two three four none answer question short word single using"""
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] | trim }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ ' ' + part['text'] | trim }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def words() -> list[str]:
    """The vocabulary in the order of its ids: special tokens first, then every word that the data can hold."""
    _, names, _ = scenes.atlas()
    texts = [*names, *scenes.COLOURS, *scenes.PLACES, "1 2 3 4 a an yes no", EASY_VQA_WORDS]
    for wordings in (
        scenes.NAME_WORDINGS,
        scenes.PLACE_WORDINGS,
        scenes.COUNT_WORDINGS,
        scenes.COLOUR_WORDINGS,
        scenes.EXISTS_WORDINGS,
        scenes.RELATION_WORDINGS,
        *scenes.SIDES,
    ):
        texts += [text.replace("?", " ?").replace(".", " .") for text in wordings]
    found = " ".join([*texts, SPARE_WORDS]).split()
    return [*SPECIAL, *dict.fromkeys(word for word in found if "{" not in word)]


def build_processor() -> LlavaProcessor:
    """96 x 96 pictures, 64 visual tokens each, and a word-level tokenizer that lower-cases."""
    vocabulary = {word: i for i, word in enumerate(words())}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w]"), behavior="isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    size = {"height": IMAGE, "width": IMAGE}
    pictures = CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size)
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """A LLaVA of 3.9 million random parameters: CLIP vision tower, two-layer projector, Llama."""
    vocabulary = words()
    ids = {name: SPECIAL.index(f"<{name}>") for name in ("pad", "bos", "eos", "image")}
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=IMAGE,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["image"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
    )
    return model
