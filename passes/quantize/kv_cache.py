"""quantize.kv_cache: keys and values of older tokens as small integers while the model generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import PromiseBroken, Unmet

if TYPE_CHECKING:
    from ...compress.anatomy import AttentionGeometry, ModelView, Unit
    from ...compress.runtime.kv_cache import CacheForm


@dataclass(frozen=True)
class KVCache(Pass):
    """Hold the KV cache of `generate` in a few bits (KIVI, arXiv 2402.02750): keys per channel, values per token.

    No weight changes. A prompt attends to exact states of its own tokens; old tokens are packed once, in groups, and
    dequantized for attention. The judge's answers are generated with this cache, so exact match measures it; the KL is
    teacher-forced, runs without a cache and does not see it: gate this pass by exact match. The first token of every
    answer comes from the exact prompt, so data with one-word answers hardly sees it either. Layers with a sliding
    window keep their cache, which does not grow. Of encoder-decoder models the cross-attention's cache is packed too,
    whole, as soon as it is made. Stock loaders of the saved model keep an exact cache; so does the openvino runtime.

    Settings:
        bits: of each code, 8, 4 or 2; a scale and a minimum in the model's dtype come to them (in 16 bits and groups of
            32: one more bit).
        group: tokens that share a scale in each channel of a key; also, at most, channels that share one in each token
            of a value (the largest divisor of the head's width that is not above it).
        residual: newest tokens that stay exact; up to group - 1 more wait until their group is full.
        sink: first tokens of the sequence that stay exact (all later ones attend to them strongly); in a batch, the
            padding on the left of a shorter row takes their places.
    """

    name: ClassVar[str] = "quantize.kv_cache"
    summary: ClassVar[str] = "the KV cache of generation in 8, 4 or 2 bits"
    paper: ClassVar[str] = "KIVI, arXiv 2402.02750"
    needs_data: ClassVar[bool] = False

    bits: Literal[8, 4, 2] = 4
    group: int = 32
    residual: int = 32
    sink: int = 4

    def __post_init__(self) -> None:
        for setting, least in (("group", 1), ("residual", 0), ("sink", 0)):
            if getattr(self, setting) < least:
                raise ValueError(f"{setting} is at least {least}, not {getattr(self, setting)}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ...compress.runtime.kv_cache import installed

        packed = installed(model.model)
        if packed is not None:
            raise Unmet(
                f"{self.name}: the cache is packed already",
                found=f"{packed.bits} bits",
                change="leave out one of the two passes",
            )
        config = getattr(model.model, "generation_config", None)
        if config is None:
            reason = f"a {type(model.model).__name__} has no generate()"
        elif config.use_cache is False:
            reason = "its generation_config says use_cache: false"
        elif config.cache_implementation not in (None, "dynamic"):
            reason = f"its generation_config asks for a {config.cache_implementation} cache"
        elif not any(packed for packed, _ in _layers(model, self._form())):
            reason = f"its cache has none that holds all tokens, but {', '.join(_kinds(model, self._form()))}"
        else:
            return
        raise Unmet(
            f"{self.name} finds no cache to pack in this model",
            where=f"family {model.family.name}",
            found=reason,
            change="leave the pass out for this model",
        )

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ...compress.runtime.kv_grid import value_group

        self.rebuild(model, {})
        form, size = self._form(), model.storage_dtype.itemsize
        rows = [unit for packed, unit in _layers(model, form) if packed]
        own = [unit.attention for unit in rows if unit.attention]
        cross = [unit.cross_attention for unit in rows if unit.cross_attention]
        start = self.sink + self.residual  # from here on, tokens are packed
        more = [_bytes(own, form, n, size) for n in (start, start + self.group)]
        numbers: dict[str, Json] = {
            "layers": len(rows),
            "cross_layers": len(cross),
            "other_layers": _kinds(model, form),
            "value_groups": sorted({value_group(g.head_dim, self.group) for g in own + cross}),
            "bytes_per_token": _bytes(own, None, 1, size),
            "bytes_per_packed_token": (more[1] - more[0]) / self.group,
        }
        prompts = sorted(length for batch in ctx.fit for length in _prompts(model, batch))
        packed = [bool(cross) or form.packable(n - self.sink) > 0 for n, _ in prompts]
        numbers |= {"prompts": len(prompts), "prompts_with_packed_tokens": sum(packed)}
        for word, at in (("median", len(prompts) // 2), ("longest", -1)):
            if prompts:
                n, seen = prompts[at]
                exact = _bytes(own, None, n, size) + _bytes(cross, None, seen, size)
                held = _bytes(own, form, n, size) + _bytes(cross, form.for_cross(), seen, size)
                numbers[f"{word}_prompt"] = {"tokens": n + seen, "bytes": exact, "bytes_packed": held}
        return Notes(numbers)

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        from ...compress.runtime.kv_cache import install

        install(model.model, self._form())

    def ensures(self, model: ModelView) -> None:
        from ...compress.runtime.kv_cache import installed

        found = installed(model.model)
        if found != self._form():
            raise PromiseBroken(
                f"{self.name} promised that generation holds its cache in {self.bits} bits",
                found="an exact cache" if found is None else str(found),
            )

    def weaker(self) -> Self | None:
        milder: dict[int, Literal[8, 4]] = {2: 4, 4: 8}
        return replace(self, bits=milder[self.bits]) if self.bits in milder else None

    def _form(self) -> CacheForm:
        from ...compress.runtime.kv_cache import CacheForm

        return CacheForm(self.bits, self.group, self.residual, self.sink)


def _bytes(heads: Sequence[AttentionGeometry], form: CacheForm | None, tokens: int, itemsize: int) -> int:
    """Of a cache of `tokens` tokens of one row in layers of such heads; exact where `form` is None."""
    if form is None:
        return sum(2 * tokens * g.n_kv_heads * g.head_dim * itemsize for g in heads)
    return sum(form.bytes(tokens, g.n_kv_heads, g.head_dim, itemsize) for g in heads)


def _layers(model: ModelView, form: CacheForm) -> list[tuple[bool, Unit]]:
    """The decoder's blocks, each with whether its layer of the cache is one that packs.

    Raises:
        Unmet: the cache has not one layer for each block with self-attention.
    """
    blocks = [
        unit
        for unit in model.parts["language"]
        if unit.index is not None and unit.tokens == "sequence" and unit.attention is not None
    ]
    layers = _cache(model, form)
    if len(layers) != len(blocks):
        raise Unmet(
            "quantize.kv_cache: the cache has not one layer for each block of the decoder",
            where=f"family {model.family.name}",
            found=f"{len(layers)} layers, {len(blocks)} blocks",
            change="leave the pass out for this model",
        )
    return [(_packs(layer), unit) for layer, unit in zip(layers, blocks)]


def _kinds(model: ModelView, form: CacheForm) -> dict[str, int]:
    """transformers' class of each layer that keeps the cache it has -> how many."""
    kinds = [type(layer).__name__ for layer in _cache(model, form) if not _packs(layer)]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _cache(model: ModelView, form: CacheForm) -> list[object]:
    """The layers of an empty cache as `generate` would make it."""
    from transformers.cache_utils import DynamicCache

    from ...compress.runtime.kv_cache import pack_cache

    cache = DynamicCache(config=model.model.config.get_text_config(decoder=True))
    pack_cache(cache, form)
    return list(cache.layers)


def _packs(layer: object) -> bool:
    from ...compress.runtime.kv_cache import PackedLayer

    return isinstance(layer, PackedLayer)


def _prompts(model: ModelView, batch: Mapping[str, object]) -> list[tuple[int, int]]:
    """Of each row, the tokens of its prompt in the decoder's own cache, and in that of the cross-attention."""
    visual = [round(n) for n in model.visual_tokens(batch)]
    if "input_ids" not in batch:
        return [(1, n) for n in visual]
    masks = model.token_masks(batch, "prompt")
    text = (masks.text & ~masks.answer).sum(1).tolist()
    if model.family.seq2seq:
        return [(1, t + v) for t, v in zip(text, visual)]
    return [(t + v, 0) for t, v in zip(text, visual)]
