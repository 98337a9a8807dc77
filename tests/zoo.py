"""Tiny random models of the families that svlm knows, and batches with images for them. No processor, no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

VOCAB, IMAGE, VIDEO, START, END = 100, 99, 98, 97, 96  # ids of special tokens

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _llava() -> Any:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=16,
    )


def _llava_next() -> Any:
    return tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        image_seq_length=16,
    )


def _llava_onevision() -> Any:
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9",
    )


def _idefics3(kind: Any = tf.Idefics3Config, vision: Any = tf.Idefics3VisionConfig) -> Any:
    return kind(
        vision_config=vision(**VISION).to_dict(),
        text_config=tf.LlamaConfig(**TEXT).to_dict(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )


def _smolvlm() -> Any:
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    return _idefics3(tf.SmolVLMConfig, SmolVLMVisionConfig)


def _qwen2_vl() -> Any:
    return tf.Qwen2VLConfig(
        vision_config=QWEN_VISION | {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2},
        text_config=TEXT | {"rope_parameters": ROPE},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _qwen2_5_vl() -> Any:
    vision = {"hidden_size": 24, "intermediate_size": 40, "out_hidden_size": 32, "window_size": 16}
    return tf.Qwen2_5_VLConfig(
        vision_config=QWEN_VISION | vision | {"fullatt_block_indexes": [1]},
        text_config=TEXT | {"rope_parameters": ROPE},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _qwen3_vl() -> Any:
    vision = {"hidden_size": 24, "intermediate_size": 40, "out_hidden_size": 32, "num_position_embeddings": 16}
    return tf.Qwen3VLConfig(
        vision_config=QWEN_VISION | vision | {"deepstack_visual_indexes": [0, 1]},
        text_config=TEXT | {"rope_parameters": ROPE, "head_dim": 8},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _paligemma() -> Any:
    return tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, projection_dim=32, vision_use_head=False).to_dict(),
        text_config=tf.GemmaConfig(**TEXT, head_dim=8).to_dict(),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=VOCAB,
    )


def _gemma3() -> Any:
    return tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
        text_config=tf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=8, sliding_window_pattern=2).to_dict(),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=4,
    )


def _internvl() -> Any:
    vision = VISION | {"image_size": [16, 16], "patch_size": [4, 4], "use_qk_norm": True}
    return tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**vision).to_dict(),
        text_config=tf.Qwen2Config(**TEXT).to_dict(),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _blip2(text: Any = None) -> Any:
    opt = {k: v for k, v in TEXT.items() if k not in ("intermediate_size", "num_key_value_heads")}
    return tf.Blip2Config(
        vision_config=tf.Blip2VisionConfig(**VISION).to_dict(),
        qformer_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "encoder_hidden_size": 24,
            "cross_attention_frequency": 2,
        },
        text_config=text or tf.OPTConfig(**opt, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0).to_dict(),
        num_query_tokens=6,
        image_token_index=IMAGE,
    )


def _blip2_t5() -> Any:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return _blip2(tf.T5Config(**sizes, **ids, feed_forward_proj="gated-gelu", dropout_rate=0.0).to_dict())


def _florence2() -> Any:
    return tf.Florence2Config(
        vision_config={
            "embed_dim": [8, 16, 24],
            "num_heads": [2, 2, 2],
            "num_groups": [2, 2, 2],
            "depths": [1, 2, 1],
            "patch_size": [7, 3, 3],
            "patch_stride": [4, 2, 2],
            "patch_padding": [3, 1, 1],
            "patch_prenorm": [False, True, True],
            "window_size": 3,
            "projection_dim": 32,
            "drop_path_rate": 0.0,
            "max_position_embeddings": 50,
            "max_temporal_embeddings": 100,
        },
        text_config=tf.BartConfig(**BART).to_dict(),
        image_token_id=IMAGE,
    )


def _trocr() -> Any:
    decoder = {k: v for k, v in BART.items() if not k.startswith("encoder") and k != "forced_eos_token_id"}
    return tf.VisionEncoderDecoderConfig(
        encoder=tf.ViTConfig(**VISION, hidden_dropout_prob=0.0).to_dict(),
        decoder=tf.TrOCRConfig(**decoder, cross_attention_hidden_size=24, is_decoder=True, use_cache=False).to_dict(),
        decoder_start_token_id=2,
        pad_token_id=0,
    )


def _donut() -> Any:
    encoder = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
    encoder |= {"window_size": 4}
    return tf.VisionEncoderDecoderConfig(
        encoder=tf.DonutSwinConfig(**encoder).to_dict(),
        decoder=tf.MBartConfig(**BART | {"d_model": 16}, is_decoder=True, add_cross_attention=True).to_dict(),
        decoder_start_token_id=2,
        pad_token_id=0,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava-next": _llava_next,
    "llava-onevision": _llava_onevision,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "qwen2-vl": _qwen2_vl,
    "qwen2.5-vl": _qwen2_5_vl,
    "qwen3-vl": _qwen3_vl,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "internvl": _internvl,
    "blip-2": _blip2,
    "blip-2-t5": _blip2_t5,
    "florence-2": _florence2,
    "trocr": _trocr,
    "donut": _donut,
}
FAMILIES = tuple(CONFIGS)


def model(family: str, seed: int = 0) -> Any:
    """A random model of the family, float32, eval mode."""
    torch.manual_seed(seed)
    built = tf.AutoModelForImageTextToText.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():  # livelier than the initialisation: norms and biases away from 1 and 0, larger weights
        for tensor in built.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return built


def build(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The family's model and a batch for it."""
    return model(family), batch(family)


def batch(family: str, samples: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of prompts with one image each, left-padded where the family's prompts are, with labels."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randn(samples, 3, 16, 16, generator=g)
    if family in ("llava", "paligemma"):
        return text_batch(16, samples, g) | {"pixel_values": pixels}
    if family in ("llava-next", "llava-onevision"):
        tiles = torch.randn(samples, 3, 3, 16, 16, generator=g)  # the whole image and two tiles of it
        sizes = torch.tensor([[16, 32]] * samples)
        return text_batch(16 + 36, samples, g) | {"pixel_values": tiles, "image_sizes": sizes}
    if family in ("idefics3", "smolvlm"):
        return text_batch(4, samples, g) | {"pixel_values": pixels[:, None]}
    if family.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4]] * samples)
        patches = torch.randn(samples * 16, 3 * 2 * 4 * 4, generator=g)
        tokens = text_batch(4, samples, g, around=(START, END))
        kinds = (tokens["input_ids"] == IMAGE).int()
        return tokens | {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    if family in ("gemma3", "internvl"):
        return text_batch(4, samples, g) | {"pixel_values": pixels}
    if family == "blip-2":
        return text_batch(6, samples, g) | {"pixel_values": pixels}
    answers = torch.randint(3, END - 1, (samples, 4), generator=g)
    answers[0, -1] = -100
    if family in ("trocr", "donut"):
        size = 16 if family == "trocr" else 32
        return {"pixel_values": torch.randn(samples, 3, size, size, generator=g), "labels": answers}
    prompts = text_batch(6 if family == "blip-2-t5" else 5, samples, g)
    if family == "florence-2":
        pixels = torch.randn(samples, 3, 32, 32, generator=g)
    return prompts | {"pixel_values": pixels, "labels": answers}


def text_batch(
    image_tokens: int, samples: int, g: torch.Generator, around: tuple[int, ...] = ()
) -> dict[str, torch.Tensor]:
    """Sample i has i tokens of padding on the left, 2 of text, the image, some question, 3 tokens of answer."""
    rows, masks, labels = [], [], []
    for padding in range(samples):
        text = torch.randint(3, END - 1, (2 + 3 + 3 + samples - 1 - padding,), generator=g)
        image = torch.full((image_tokens,), IMAGE)
        if around:
            image = torch.cat([torch.tensor(around[:1]), image, torch.tensor(around[1:])])
        row = torch.cat([torch.zeros(padding, dtype=torch.long), text[:2], image, text[2:]])
        label = torch.full_like(row, -100)
        label[-3:] = row[-3:]
        rows.append(row)
        labels.append(label)
        masks.append((torch.arange(len(row)) >= padding).long())
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks), "labels": torch.stack(labels)}
