"""What the tests of token reduction share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.runtime.reduce import installed
from svlm.passes.tokens.dpp import DPP
from tests import zoo

IN_SEQUENCE = (  # families whose visual tokens lie in the decoder's own sequence
    "llava",
    "llava-next",
    "llava-onevision",
    "idefics3",
    "smolvlm",
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "paligemma",
    "gemma3",
    "internvl",
)
ELSEWHERE = ("blip-2", "blip-2-t5", "florence-2", "trocr", "donut")


def reduced(model: Any, step: Any = None) -> ModelView:
    """A copy of `model` with `step` (default: half of the tokens by DPP) on it."""
    view = view_of(copy.deepcopy(model))
    step = step or DPP(keep=0.5)
    step.rebuild(view, {})
    view.ledger.add(step, {})
    return view


def prompts(family: str, samples: int = 3) -> dict[str, Tensor]:
    """A batch without answers, with the token types that the processors of the Gemma families add."""
    batch = {k: v for k, v in zoo.batch(family, samples).items() if k != "labels"}
    return typed(family, batch)


def typed(family: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    visual = (batch["input_ids"] == zoo.IMAGE).long()
    types = {"gemma3": visual, "paligemma": torch.zeros_like(visual)}
    return batch | ({"token_type_ids": types[family]} if family in types else {})


def shapes(family: str) -> dict[str, Tensor]:
    """Two rows with equally many visual tokens, their pictures of different shapes where the family takes any."""
    if not family.startswith("qwen"):
        return prompts(family, 2)
    g = torch.Generator().manual_seed(3)
    grid = torch.tensor([[1, 4, 12], [1, 8, 6]])
    batch = zoo.text_batch(12, 2, g, around=(zoo.START, zoo.END))
    del batch["labels"]
    kinds = (batch["input_ids"] == zoo.IMAGE).int()
    return batch | {
        "pixel_values": torch.randn(96, 96, generator=g),
        "image_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }


def single(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Row `row` of a batch alone, without its padding."""
    rows = len(batch["input_ids"])
    real = batch["attention_mask"][row].bool()
    alone = {}
    for name, value in batch.items():
        mine = value.chunk(rows)[row]
        alone[name] = mine[:, real] if value.shape == batch["input_ids"].shape else mine
    return alone


def two_images(first: int = 5, family: str = "llava") -> dict[str, Tensor]:
    """A row with two images, with text in between up to its place `first`, and a row with one; equally long."""
    g = torch.Generator().manual_seed(5)
    qwen = family.startswith("qwen")
    image = torch.full((4 if qwen else 16,), zoo.IMAGE)
    if qwen:
        image = torch.cat([torch.tensor([zoo.START]), image, torch.tensor([zoo.END])])
    text = torch.randint(3, zoo.END - 1, (60,), generator=g)
    row = torch.cat([text[:2], image, text[2:first], image, text[first : first + 3]])
    other = torch.cat([text[9:11], image, text[11 : 11 + len(row) - len(image) - 2]])
    ids = torch.stack([row, other])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if qwen:
        kinds = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 3), "mm_token_type_ids": (ids == zoo.IMAGE).int()}
        return batch | kinds | {"pixel_values": torch.randn(48, 96, generator=g)}
    return batch | {"pixel_values": torch.randn(3, 3, 16, 16, generator=g)}


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def generate(model: Any, batch: dict[str, Tensor], tokens: int = 5, **options: Any) -> Tensor:
    """Greedy tokens after the prompt; neither padding nor placeholders among them."""
    settings = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [0, zoo.IMAGE, zoo.VIDEO]}
    return model.generate(**batch, max_new_tokens=tokens, **settings, **options)[:, -tokens:]


def kept_of(view: ModelView, batch: dict[str, Tensor]) -> Tensor:
    """Bool [batch, tokens]: what the decoder saw in the last prefill."""
    reduction = installed(view.model)
    assert reduction is not None and reduction.last is not None
    index, valid = reduction.last
    return torch.zeros(batch["input_ids"].shape, dtype=torch.bool).scatter(1, index, valid)


def masked_original(model: Any, batch: dict[str, Tensor], kept: Tensor) -> Tensor:
    """Logits of the original when no token attends to those that are not kept: what reduction must compute."""
    path = view_of(model).decoder_path
    both_ways = model.get_submodule(path).config.to_dict().get("use_bidirectional_attention")

    def hide(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        length = kwargs["inputs_embeds"].shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril(length if both_ways else 0)[None, None]

        def closed(mask: Any) -> Any:
            if isinstance(mask, dict):
                return {name: closed(entry) for name, entry in mask.items()}
            if mask is None:
                mask = causal
            if mask.ndim == 2:
                mask = causal & mask[:, None, None, :].bool()
            assert mask.dtype == torch.bool
            return mask & kept[:, None, None, :]

        return args, kwargs | {"attention_mask": closed(kwargs.get("attention_mask"))}

    handle = model.get_submodule(path).register_forward_pre_hook(hide, with_kwargs=True)
    try:
        return logits(model, batch)
    finally:
        handle.remove()


def moved_together(view: ModelView, batch: dict[str, Tensor], cache: Any, close: dict[str, float]) -> None:
    """Rows of a prompt's cache swapped, repeated and selected: the next token is that of the row it came from."""
    length, mask = cache.get_seq_length(), torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)

    def step(rows: list[int]) -> Tensor:
        cells = {"input_ids": torch.full((len(rows), 1), 7), "attention_mask": mask[rows], "past_key_values": cache}
        out = view.model(**cells).logits
        cache.crop(-1)
        return out

    expected = step([0, 1])
    assert cache.get_seq_length() == length
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(step([1, 0]), expected[[1, 0]], **close)
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(step([1, 1, 0, 0]), expected[[1, 1, 0, 0]], **close)
    cache.batch_select_indices(torch.tensor([2, 1]))
    torch.testing.assert_close(step([0, 1]), expected, **close)
