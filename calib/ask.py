"""One question about one picture: what `svlm ask` does."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from ..compress.anatomy import ModelView
from ..compress.base import evaluating
from .encode import Encoder
from .sample import ImageSource, Sample


def ask(view: ModelView, image: str | Path, question: str, *, max_new_tokens: int = 64) -> str:
    """The model's own greedy answer, in its own chat format.

    Raises:
        DataError: the image is missing or broken, or the model folder has no processor.
    """
    source = ImageSource(Path(image))
    source.open()
    sample = Sample("ask", str(image), (source,), question, (), {}, None)
    encoder = Encoder(view.processor, seq2seq=view.family.seq2seq)
    inputs = encoder.prompts([sample])
    with evaluating(view.model):
        tokens = view.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    prompt = 0 if view.family.seq2seq else inputs["input_ids"].shape[1]
    return encoder.decode(torch.as_tensor(tokens)[:, prompt:])[0]


def example_prompt(view: ModelView) -> dict[str, torch.Tensor]:
    """An encoded question about a grey picture, for what needs a prompt of the right shape.

    Raises:
        DataError: the model has no processor.
    """
    picture = ImageSource(picture=Image.new("RGB", (96, 96), (128, 128, 128)))
    sample = Sample("example", "example", (picture,), "what is this ?", (), {}, None)
    return Encoder(view.processor, seq2seq=view.family.seq2seq).prompts([sample])
