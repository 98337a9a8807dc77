"""The state of a training on disk, so that a killed one goes on where it was, bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...compress.base import Json
from ...compress.disk import whole_file

SECONDS = 60.0  # between two checkpoints
SHARE = 10.0  # and so many times as long as writing one takes


class Checkpoint:
    """One safetensors file in a pass's scratch folder, there whole or not at all; never part of a model.

    Args:
        folder: of the pass. claim: what the training depends on; a file of another training is not used.
    """

    def __init__(self, folder: Path, claim: Json) -> None:
        self.path, self._claim = folder / "training.safetensors", json.loads(json.dumps(claim))
        self._next = time.monotonic() + SECONDS

    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() >= self._next

    def save(self, tensors: Mapping[str, Tensor], state: Json) -> None:
        """Replace what was written before. Floats in `state` come back as the same bits."""
        from safetensors.torch import save_file

        began = time.monotonic()
        head = json.dumps({"claim": self._claim, "state": state})
        with whole_file(self.path) as temporary:
            save_file({k: t.detach().contiguous() for k, t in tensors.items()}, temporary, metadata={"svlm": head})
        now = time.monotonic()
        self._next = now + max(SECONDS, SHARE * (now - began))

    def load(self) -> tuple[dict[str, Tensor], Json] | None:
        """(tensors, state) of what was written last; None where there is nothing of this training."""
        from safetensors import safe_open

        if not self.path.is_file():
            return None
        with safe_open(str(self.path), "pt") as file:
            head = json.loads(file.metadata()["svlm"])
            if head["claim"] != self._claim:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, head["state"]  # noqa: SIM118 (not a mapping)
