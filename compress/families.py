"""One row a VLM family: where its vision tower, connector, language model and head live.

A row is data. It names places by dotted module paths; ``@image`` stands for ``model.get_encoder(modality="image")`` and
``@decoder`` for ``model.get_decoder()``, transformers' uniform ways in, so one row serves any tower or language model
that the family can be built with. A user adds a row for a family that svlm does not know, either in YAML
(`Family.from_yaml`) or as an entry point of the group ``svlm.families`` whose object is a `Family`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .blocks import Layout
from .errors import ModelError, did_you_mean

PARTS = ("vision", "connector", "language", "head")
TOKENS = ("image", "prompt", "sequence", "all")


@dataclass(frozen=True)
class Place:
    """Where units live.

    Attributes:
        part: vision, connector, language or head.
        path: dotted path. For a stack it may hold ``*`` (one name each) and then matches the blocks themselves;
            ``@image`` or ``@decoder`` alone mean the first list of transformer layers below that module. Patterns may
            be joined by ``|``; what they match comes in the order in which the model registers it.
        stack: whether `path` leads to a stack of blocks or to one loose module.
        optional: no error where the model has no such module.
        tokens: what the rows of the unit's input are: ``image`` (patches or visual tokens), ``sequence`` (the tokens
            that the logits belong to), ``prompt`` (the encoder's tokens in an encoder-decoder language model), or
            ``all`` (the tokens of the sequence before a token pass took any out).
        cross: the same for the keys and values of cross-attention.
        entry: dotted path of a norm outside, the last one where a pattern matches several, whose output the linears of
            the unit's first step alone read, as it is or with the channels of several positions side by side (see
            `blocks.Layout`).
    """

    part: str
    path: str
    stack: bool = False
    optional: bool = False
    tokens: str = "image"
    cross: str = "image"
    entry: str = ""


@dataclass(frozen=True)
class Family:
    """The anatomy of one family.

    Attributes:
        name: as users write it.
        model_types: values of ``config.model_type`` that this row serves.
        text_types: where given, only these values of ``config.get_text_config().model_type``.
        places: in forward order. Together with `ignored` they cover every nn.Linear.
        tower: the vision tower. decoder: the module whose forward receives `inputs_embeds` for prefill.
        ignored: fnmatch pattern of module paths -> why no unit holds these linears.
        image_tokens: config attributes with the ids of the placeholder tokens that visual tokens replace.
        seq2seq: logits belong to decoder tokens of their own (`labels`), not to `input_ids`.
        per_image: formula for the visual tokens of one image, a key of `anatomy.PER_IMAGE`; "" where that depends on
            the image.
        cells: which patches of the tower become one visual token, a key of `anatomy.CELLS`; "" where that depends on
            more than the model's config.
        blocks: layouts by block class, before those of compress/blocks.py.
        widths: part -> dotted config keys that say how wide its residual stream is: its own first, then those of
            whatever writes into it or reads from it. Of the others those count that have the same value as the first.
        own: the row is a user's (saved with the model).
    """

    name: str
    model_types: tuple[str, ...]
    places: tuple[Place, ...]
    text_types: tuple[str, ...] = ()
    tower: str = "@image"
    decoder: str = "@decoder"
    ignored: Mapping[str, str] = field(default_factory=dict)
    image_tokens: tuple[str, ...] = ("image_token_id",)
    seq2seq: bool = False
    per_image: str = ""
    cells: str = ""
    blocks: Mapping[str, Layout] = field(default_factory=dict)
    widths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own: bool = False

    def serves(self, config: Any) -> bool:
        """Whether this row is for a model of `config` (a transformers PretrainedConfig)."""
        if config.model_type not in self.model_types:
            return False
        return not self.text_types or config.get_text_config().model_type in self.text_types

    @classmethod
    def from_yaml(cls, path: str | Path) -> Family:
        """Read a user's row.

        Raises:
            ModelError: unreadable, an unknown key, or a value of the wrong kind.
        """
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ModelError("cannot read the anatomy row", where=str(path), found=str(error)) from error
        return cls.from_json(data, where=str(path))

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "anatomy row") -> Family:
        """A user's row from plain values. ``extends: llava`` takes over what the row does not say itself.

        Raises:
            ModelError: an unknown key, or a value of the wrong kind.
        """
        if not isinstance(data, Mapping):
            raise ModelError("an anatomy row is a mapping", where=where, found=type(data).__name__)
        known = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {"own": True}
        base = None
        for key, value in data.items():
            if key == "extends":
                named = {row.name: row for row in FAMILIES}
                if value not in named:
                    raise ModelError(f"no family '{value}' to extend", where=where, change=did_you_mean(value, named))
                base = named[value]
            elif key not in known:
                change = did_you_mean(key, [*known, "extends"])
                raise ModelError(f"no such key in an anatomy row: '{key}'", where=where, change=change)
            elif key == "places":
                values[key] = tuple(_place(row, where) for row in value)
            elif key == "blocks":
                values[key] = {name: Layout.from_json(row, f"{where}, {name}") for name, row in value.items()}
            elif key == "widths":
                values[key] = {part: tuple(keys) for part, keys in value.items()}
            else:
                values[key] = tuple(value) if isinstance(value, list) else value
        if base is not None:
            return dataclasses.replace(base, **values)
        missing = {"name", "model_types", "places"} - set(values)
        if missing:
            raise ModelError(f"the anatomy row lacks: {', '.join(sorted(missing))}", where=where)
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "own"}
        data["places"] = [dataclasses.asdict(place) for place in self.places]
        data["blocks"] = {name: layout.to_json() for name, layout in self.blocks.items()}
        data["ignored"] = dict(self.ignored)
        data["widths"] = {part: list(keys) for part, keys in self.widths.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


def _place(row: Mapping[str, Any], where: str) -> Place:
    known = {f.name for f in dataclasses.fields(Place)}
    for key in row:
        if key not in known:
            raise ModelError(f"no such key in a place: '{key}'", where=where, change=did_you_mean(key, known))
    place = Place(**row)
    for value, choices in ((place.part, PARTS), (place.tokens, TOKENS), (place.cross, TOKENS)):
        if value not in choices:
            raise ModelError(f"unknown value '{value}' in a place", where=where, change=did_you_mean(value, choices))
    return place


# ---------------------------------------------------------------------------------------------------------- the rows

_VISION = Place("vision", "@image", stack=True)
_PROJECTOR = Place("connector", "model.multi_modal_projector")
_LANGUAGE = Place("language", "@decoder", stack=True, tokens="sequence")
_HEAD = Place("head", "lm_head", tokens="sequence", entry="@decoder.norm")
_POOLING = {"*.head.*": "the pooling head of SigLIP: the language model never sees its output"}


def _widths(*more: str, vision: tuple[str, ...] = ("vision_config.hidden_size",)) -> dict[str, tuple[str, ...]]:
    return {"vision": vision, "language": ("text_config.hidden_size", *more)}


def _llava(name: str, model_type: str, per_image: str = "", more: tuple[str, ...] = (), entry: str = "") -> Family:
    places = (_VISION, dataclasses.replace(_PROJECTOR, entry=entry), _LANGUAGE, _HEAD)
    cells = "square" if per_image else ""
    widths = _widths(*more)
    return Family(name, (model_type,), places, ignored=_POOLING, per_image=per_image, cells=cells, widths=widths)


def _qwen(
    name: str, model_type: str, widths: dict[str, tuple[str, ...]], *more: Place, cells: str = "merged"
) -> Family:
    places = (_VISION, Place("connector", "@image.merger"), *more, _LANGUAGE, _HEAD)
    ids = ("image_token_id", "video_token_id")
    return Family(name, (model_type,), places, image_tokens=ids, cells=cells, widths=widths)


_QFORMER = (
    Place("connector", "qformer.encoder.layer.*", stack=True),
    Place("connector", "language_projection", entry="qformer.encoder.layer.*.output_query.LayerNorm"),
)

_SWIN = "encoder.encoder.layers.*.blocks.*|encoder.encoder.layers.*.downsample"

FAMILIES: tuple[Family, ...] = (
    _llava("llava", "llava", "patches"),
    _llava("llava-next", "llava_next"),
    _llava("llava-onevision", "llava_onevision"),
    Family(
        "idefics3",
        ("smolvlm", "idefics3"),
        (_VISION, Place("connector", "model.connector", entry="@image.post_layernorm"), _LANGUAGE, _HEAD),
        per_image="pixel_shuffle",
        cells="square",
        widths=_widths(),
    ),
    _qwen("qwen2-vl", "qwen2_vl", _widths("vision_config.hidden_size", vision=("vision_config.embed_dim",))),
    _qwen("qwen2.5-vl", "qwen2_5_vl", _widths("vision_config.out_hidden_size"), cells="windows"),
    _qwen(
        "qwen3-vl",
        "qwen3_vl",
        _widths("vision_config.out_hidden_size"),
        Place("connector", "@image.deepstack_merger_list.*", stack=True),
    ),
    _llava(
        "paligemma",
        "paligemma",
        "patches",
        ("projection_dim", "hidden_size", "vision_config.projection_dim"),
        entry="@image.post_layernorm",
    ),
    _llava("gemma3", "gemma3", "mm_tokens_per_image"),
    _llava("internvl", "internvl", "downsampled_patches"),
    Family(
        "blip-2-t5",
        ("blip-2",),
        (
            _VISION,
            *_QFORMER,
            Place("language", "language_model.encoder.block.*", stack=True, tokens="prompt"),
            Place("language", "language_model.decoder.block.*", stack=True, tokens="sequence", cross="prompt"),
            Place("head", "language_model.lm_head", tokens="sequence", entry="@decoder.decoder.final_layer_norm"),
        ),
        text_types=("t5",),
        tower="vision_model",
        decoder="language_model",
        seq2seq=True,
        per_image="num_query_tokens",
        widths=_widths(vision=("vision_config.hidden_size", "qformer_config.encoder_hidden_size")),
    ),
    Family(
        "blip-2",
        ("blip-2",),
        (
            _VISION,
            *_QFORMER,
            Place("language", "language_model.model.decoder.project_in", optional=True, tokens="sequence"),
            Place("language", "language_model.model.decoder.layers.*", stack=True, tokens="sequence"),
            Place("language", "language_model.model.decoder.project_out", optional=True, tokens="sequence"),
            Place("head", "language_model.lm_head", tokens="sequence", entry="@decoder.final_layer_norm"),
        ),
        tower="vision_model",
        decoder="language_model.model.decoder",
        per_image="num_query_tokens",
        widths=_widths(
            "text_config.word_embed_proj_dim",
            vision=("vision_config.hidden_size", "qformer_config.encoder_hidden_size"),
        ),
    ),
    Family(
        "florence-2",
        ("florence2",),
        (
            Place("vision", "model.vision_tower.blocks.*.*.*_block", stack=True),
            _PROJECTOR,
            Place("language", "model.language_model.encoder.layers.*", stack=True, tokens="prompt"),
            Place("language", "model.language_model.decoder.layers.*", stack=True, tokens="sequence", cross="prompt"),
            _HEAD,
        ),
        tower="model.vision_tower",
        decoder="model.language_model",
        seq2seq=True,
        widths={"language": ("text_config.hidden_size", "vision_config.projection_dim")},
    ),
    Family(
        "vision-encoder-decoder",
        ("vision-encoder-decoder",),
        (
            Place("vision", _SWIN, stack=True, optional=True),
            Place("vision", "encoder.layers.*", stack=True, optional=True),
            Place("connector", "enc_to_dec_proj", optional=True),
            Place("language", "decoder.model.decoder.layers.*", stack=True, tokens="sequence"),
            Place("head", "decoder.output_projection", optional=True, tokens="sequence"),
            Place("head", "decoder.lm_head", optional=True, tokens="sequence", entry="@decoder.layer_norm"),
        ),
        tower="encoder",
        decoder="decoder.model.decoder",
        ignored={"encoder.pooler.*": "the tower's pooler: the decoder attends to the states before it"},
        image_tokens=(),
        seq2seq=True,
        widths={
            "vision": ("encoder.hidden_size", "decoder.cross_attention_hidden_size"),
            "language": ("decoder.hidden_size",),
        },
    ),
)


# what passes put onto a model, whatever its family (runtime/prefusion.py)
ADDED = (
    Place("connector", "prefusion.fuse*", optional=True, tokens="all"),
    Place("connector", "prefusion.compress", optional=True),
)


def known_rows(rows: tuple[Family, ...] = ()) -> list[Family]:
    """The user's `rows`, then those of the entry-point group ``svlm.families``, then those that ship."""
    plugged = [dataclasses.replace(entry.load(), own=True) for entry in entry_points(group="svlm.families")]
    return [*rows, *plugged, *FAMILIES]
