"""The anatomy of a vision-language model: vision tower -> connector -> language model -> head.

`view_of(model)` finds the model's `Family` row and gives a `ModelView`: its units (blocks and loose modules) in forward
order, their linears by stage, the norms that feed them, attention and MLP geometry, token masks. Every nn.Linear of the
model lies in exactly one unit, or the row says why it is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .base import Json
from .errors import ModelError, SelectorError
from .families import PARTS, Family, known_rows
from .ledger import Ledger
from .runtime.activations import Activation
from .runtime.activations import installed as rounding_of
from .runtime.images import image_lengths, kept_count
from .runtime.reduce import installed
from .runtime.rules import held_shares, split_blocks
from .runtime.tower import Cells
from .selectors import Where, select_linears
from .units import AttentionGeometry, LinearRef, MlpGeometry, Stack, Unit, find_anchors, find_units
from .unknown import unknown_family

if TYPE_CHECKING:
    from .runtime.codebook import Codebook
    from .runtime.grid import Grid

__all__ = [
    "AttentionGeometry",
    "LinearRef",
    "MlpGeometry",
    "ModelView",
    "Stack",
    "Table",
    "TokenMasks",
    "Unit",
    "view_of",
]


@dataclass(frozen=True, eq=False)
class Table:
    """The token embedding.

    Attributes:
        path: dotted name in the model. head: the linear that shares its weight, or None.
    """

    path: str
    module: nn.Embedding = field(repr=False)
    head: LinearRef | None


@dataclass(frozen=True)
class TokenMasks:
    """BoolTensors [batch, tokens]. `text`: real tokens that are not visual; `answer` (labels != -100) lies in it."""

    vision: torch.Tensor
    text: torch.Tensor
    answer: torch.Tensor
    padding: torch.Tensor


def _sides(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, (list, tuple)) else (value, value)
    return height, width


def _patch_grid(config: Any) -> tuple[int, int]:
    image, patch = _sides(config.vision_config.image_size), _sides(config.vision_config.patch_size)
    return image[0] // patch[0], image[1] // patch[1]


def _patches(config: Any) -> int:
    return math.prod(_patch_grid(config))


PER_IMAGE: dict[str, Callable[[Any], int]] = {
    "patches": _patches,
    "pixel_shuffle": lambda config: _patches(config) // config.scale_factor**2,
    "downsampled_patches": lambda config: int(_patches(config) * config.downsample_ratio**2),
    "mm_tokens_per_image": lambda config: config.mm_tokens_per_image,
    "num_query_tokens": lambda config: config.num_query_tokens,
}


def _square_cells(config: Any, tokens: int | None) -> Cells | None:
    grid = _patch_grid(config)
    side = math.isqrt(math.prod(grid) // (tokens or 1))
    whole = side > 0 and all(n % side == 0 for n in grid) and math.prod(grid) == (tokens or 1) * side**2
    return Cells(grid, side) if whole else None


CELLS: dict[str, Callable[[Any, int | None], Cells | None]] = {  # (config, visual tokens of an image)
    "square": _square_cells,
    "merged": lambda config, _: Cells(side=config.vision_config.spatial_merge_size),
    "windows": lambda config, _: Cells(
        side=config.vision_config.spatial_merge_size,
        windows=(config.vision_config.window_size, config.vision_config.patch_size),
        whole=tuple(config.vision_config.fullatt_block_indexes),
    ),
}


class ModelView:
    """A model and its anatomy. Passes change `model` in place; `refresh` after changing shapes or modules.

    Attributes:
        processor: the Hugging Face processor, or None (a folder with weights alone).
        ledger: the passes applied so far. grids: path of a linear, or of the token
            embedding -> the grid or codebook that its weight lies on; a tied head has no entry of its own.
        vocabulary: where tokens were taken out, the ids that those which stayed have in the original, ascending; None:
            all are there.
        sight: how pictures are shown to it otherwise than to the original, one entry for each pass that changed that.
        activations: path of a linear -> how it rounds its input. It is a fact of the module (`runtime/activations.py`).
        source: where the model came from. storage_dtype: what its floating weights are saved in.
    """

    def __init__(self, model: nn.Module, processor: Any, family: Family, source: str = "") -> None:
        self.model: Any = model
        self.processor = processor
        self.family = family
        self.source = source
        self.ledger = Ledger()
        self.grids: dict[str, Grid | Codebook] = {}
        self.vocabulary: tuple[int, ...] | None = None
        self.sight: tuple[Json, ...] = ()
        self.storage_dtype: torch.dtype = next(model.parameters()).dtype
        self.refresh()

    def refresh(self) -> None:
        """Find the units anew. References taken before then point at the old modules."""
        paths = dict(self.model.named_modules())
        anchors = find_anchors(self.model, self.family, paths)
        self.tower_path, self.decoder_path = anchors["@image"], anchors["@decoder"]
        self.units = find_units(self.model, self.family, paths, anchors, split_blocks(self.model))
        self._linears = {ref.path: ref for unit in self.units for ref in unit.linears}

    @property
    def parts(self) -> dict[str, tuple[Unit, ...]]:
        """The units of each part that the model has, parts in forward order."""
        found = {part: tuple(unit for unit in self.units if unit.part == part) for part in PARTS}
        return {part: units for part, units in found.items() if units}

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.model.get_submodule(self.tower_path)

    @property
    def decoder(self) -> nn.Module:
        """The module whose forward receives `inputs_embeds` for prefill."""
        return self.model.get_submodule(self.decoder_path)

    def linears(self, where: Where = None) -> tuple[LinearRef, ...]:
        """The linears that `where` selects (see selectors.py), in forward order. SelectorError where there are none."""
        return select_linears(self.units, where)

    def select(self, where: Where = None) -> tuple[Unit, ...]:
        """The units of which `where` selects at least one linear. SelectorError where there are none."""
        chosen = {ref.unit for ref in self.linears(where)}
        return tuple(unit for unit in self.units if unit in chosen)

    def linear(self, path: str) -> LinearRef:
        """The linear at a dotted path. SelectorError where there is none."""
        if path not in self._linears:
            raise SelectorError(f"no linear layer at '{path}'", where=self.source, found=f"{len(self._linears)} others")
        return self._linears[path]

    @property
    def activations(self) -> dict[str, Activation]:
        """How inputs are rounded: path of a linear -> its `Activation`, for those that round theirs."""
        found = {path: rounding_of(ref.module) for path, ref in self._linears.items()}
        return {path: activation for path, activation in found.items() if activation is not None}

    @property
    def image_token_id(self) -> int | None:
        """The placeholder that visual tokens replace; None where the language model attends to the image instead."""
        ids = self._image_token_ids()
        return ids[0] if ids else None

    def _image_token_ids(self) -> list[int]:
        values = [attrgetter(name)(self.model.config) for name in self.family.image_tokens]
        return [value for value in values if value is not None]

    @property
    def tied_embeddings(self) -> bool:
        """Whether the head shares its weight with an embedding: changing one changes the other."""
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        return any(id(ref.module.weight) in embeddings for unit in self.parts.get("head", ()) for ref in unit.linears)

    @property
    def table(self) -> Table:
        """The token embedding, under the first of its names where several modules share the weight."""
        weight = self.model.get_input_embeddings().weight
        path = next(name for name, p in self.model.named_parameters() if p is weight).removesuffix(".weight")
        heads = [ref for unit in self.parts.get("head", ()) for ref in unit.linears if ref.module.weight is weight]
        return Table(path, self.model.get_submodule(path), heads[0] if heads else None)

    def weight(self, path: str) -> nn.Parameter:
        """The weight of the linear or the embedding at a dotted path."""
        return self.model.get_submodule(path).weight

    def promised_zeros(self, *paths: str) -> torch.Tensor | None:
        """Which weights of these linears, one below the other, are zero as an earlier pass promised: bool [outs, in].

        None where no such promise was given. Ask before the weights change.
        """
        promised = self.ledger.promised_zeros
        if not any(path in promised for path in paths):
            return None
        return torch.cat([(self.weight(path).detach() == 0) & (path in promised) for path in paths])

    def smoothing_pairs(self, unit: Unit) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Between what a per-channel scale can be moved without changing the unit's function.

        Each pair is (path of a norm or linear whose output channels are divided, paths of the linears whose input
        channels are multiplied): a norm that feeds one stage alone, values before the output projection (only where
        every query head has its own value head), and `up` before `down` in a gated MLP.
        """
        pairs = []
        for stage in unit.stages:
            if stage[0].norm is not None:
                pairs.append((stage[0].norm, tuple(ref.path for ref in stage)))
        for kind, geometry in (("attn", unit.attention), ("cross", unit.cross_attention)):
            if geometry and geometry.v and geometry.n_heads == geometry.n_kv_heads and self._plain(unit, kind):
                pairs.append((geometry.v, (geometry.o,)))
        if unit.mlp and unit.mlp.gate and not unit.mlp.fused:
            pairs.append((unit.mlp.up, (unit.mlp.down,)))
        return tuple(pairs)

    def _plain(self, unit: Unit, kind: str) -> bool:
        """Values meet the output projection channel by channel: equal widths."""
        by_role = {ref.role: ref.module for ref in unit.linears}
        return by_role[f"{kind}.v"].out_features == by_role[f"{kind}.o"].in_features

    def token_masks(self, batch: Mapping[str, Any], tokens: str = "sequence") -> TokenMasks:
        """Which tokens of `batch` are visual, text, answer, padding.

        Args:
            batch: model-ready tensors: `input_ids` and `attention_mask` [batch, tokens], `labels` (-100 outside the
                answer).
            tokens: ``sequence``: the tokens that the logits belong to. ``prompt``: the encoder's tokens of an
                encoder-decoder language model.

        Raises:
            ModelError: the batch has none of the tensors that tell.
        """
        if self.family.seq2seq and tokens == "sequence":
            return self._decoder_masks(batch)
        if "input_ids" not in batch:
            raise ModelError("the batch has no input_ids", found=", ".join(batch))
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        if mask is None:
            padding = torch.zeros_like(ids, dtype=torch.bool)
        elif mask.ndim == 4:  # questions packed into one sequence (calib/packing.py): nobody else sees padding
            padding = (mask.sum(2) <= 1)[:, 0] & (mask.sum(3) <= 1)[:, 0]
        else:
            padding = mask == 0
        vision = torch.isin(ids, torch.tensor(self._image_token_ids(), dtype=ids.dtype, device=ids.device)) & ~padding
        text = ~vision & ~padding
        labels = None if self.family.seq2seq else batch.get("labels")
        answer = torch.zeros_like(text) if labels is None else (labels != -100) & text
        return TokenMasks(vision, text, answer, padding)

    def _decoder_masks(self, batch: Mapping[str, Any]) -> TokenMasks:
        ids, labels = batch.get("decoder_input_ids"), batch.get("labels")
        if ids is None and labels is None:
            raise ModelError("the batch has neither labels nor decoder_input_ids", found=", ".join(batch))
        mask = batch.get("decoder_attention_mask")
        if mask is not None:
            padding = mask == 0
        elif ids is not None:
            padding = torch.zeros_like(ids, dtype=torch.bool)
        else:
            padding = labels == -100
        answer = torch.zeros_like(padding) if labels is None else (labels != -100) & ~padding
        return TokenMasks(torch.zeros_like(padding), ~padding, answer, padding)

    def visual_tokens(self, batch: Mapping[str, Any]) -> list[Any]:
        """Visual tokens of each sample that the language model works on.

        Placeholders in its prompt (what token passes leave of them; where that differs by block, the mean over blocks
        of those that a block can attend to), or the states that the decoder attends to.
        """
        if self._image_token_ids() and "input_ids" in batch:
            vision = self.token_masks(batch, "prompt").vision
            if installed(self.model) is None and held_shares(self.model) is None:
                return vision.sum(1).tolist()
            return [self.left_of(row) for row in image_lengths(vision, self.per_image() or 0)]
        if "pixel_values" not in batch:
            return [0] * len(next(iter(batch.values())))
        with torch.no_grad():
            states = self.tower(batch["pixel_values"]).last_hidden_state
        return [states.shape[1]] * states.shape[0]

    def left_of(self, lengths: Sequence[int]) -> int | float:
        """What token passes leave of images with so many placeholders each; the mean over blocks where these differ."""
        reduction, shares = installed(self.model), held_shares(self.model)
        if reduction is not None:
            lengths = [reduction.kept(n) for n in lengths]
        if shares is None:
            return sum(lengths)
        held = sum(kept_count(n, share) for share in shares if share for n in lengths)
        return _whole(held / len(shares))

    def per_image(self) -> int | None:
        """Visual tokens of one image by the config alone, before any pass; None where they depend on the image."""
        formula = self.family.per_image
        return PER_IMAGE[formula](self.model.config) if formula else None

    def cells(self) -> Cells | None:
        """Which patches of the vision tower become one visual token; None where the config alone does not say it."""
        formula = self.family.cells
        return CELLS[formula](self.model.config, self.per_image()) if formula else None


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def view_of(model: nn.Module, processor: Any = None, *, source: str = "", rows: Sequence[Family] = ()) -> ModelView:
    """The anatomy of `model`; loads nothing.

    Args:
        model: a transformers vision-language model with its language-model head.
        rows: the user's own rows, tried before those that ship.

    Raises:
        ModelError: no row serves this kind of model, a block class is unknown, or the row does not cover every linear.
            The message says what was seen and holds a row to start from.
    """
    config: Any = model.config
    for family in known_rows(tuple(rows)):
        if family.serves(config):
            return ModelView(model, processor, family, source)
    raise unknown_family(model, source)
