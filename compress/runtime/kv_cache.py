"""A KV cache whose older tokens are small integers: the mechanism of `quantize.kv_cache`.

`install` lets a model's own `generate` use it. Of the cache that `generate` prepares, every layer that holds all tokens
becomes a `PackedLayer`; layers with a sliding window or without keys keep what they have, and so does a cache that the
caller gave (`past_key_values`) or asked for by name (`cache_implementation`). In a `PackedLayer`, the first `sink`
tokens and the last `residual` to `residual + group - 1` are exact; the tokens between are packed, `group` at a time as
they grow old (KIVI, arXiv 2402.02750), and never rounded again: not by later tokens, beams, turns or a crop. Attention
sees exact states of all tokens that arrive together and of those not yet packed, dequantized ones of the rest.

Padding counts as tokens: a row's groups, and its sink, begin where the batch begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.generation import GenerationMixin

from .kv_grid import dequantize, pack, quantize, unpack, value_group

FORM = "kv_cache_form"  # attribute of a model whose `generate` packs its cache
HOOK = "_prepare_cache_for_generation"  # transformers' method that makes the cache of one `generate`
CACHE = "past_key_values"


@dataclass(frozen=True)
class CacheForm:
    """How keys and values are held.

    Attributes:
        bits: 2, 4 or 8. group: tokens that share a scale in each channel of a key; at most so many channels of a value.
        residual: newest tokens that stay exact. sink: first tokens that stay exact.
        whole: all tokens are packed at once, the last group shorter (cross-attention, whose states never grow).
    """

    bits: int = 4
    group: int = 32
    residual: int = 32
    sink: int = 4
    whole: bool = False

    def for_cross(self) -> CacheForm:
        return replace(self, residual=0, sink=0, whole=True)

    def packable(self, tokens: int) -> int:
        """How many of `tokens` tokens behind the sink are packed."""
        old = max(0, tokens - self.residual)
        return old if self.whole else old - old % self.group

    def bytes(self, tokens: int, heads: int, width: int, itemsize: int) -> int:
        """Of one layer that holds `tokens` tokens of one row: keys and values of `heads` heads of `width` channels.

        Args:
            itemsize: bytes of an exact number; scales and minima are of that size too.
        """
        packed = self.packable(max(0, tokens - self.sink))
        codes = -(-width * self.bits // 8)
        grids = -(-packed // self.group) * width + packed * width // value_group(width, self.group)
        return heads * (2 * (tokens - packed) * width * itemsize + 2 * packed * codes + 2 * grids * itemsize)


class States:
    """Keys or values of one layer, [batch, heads, tokens, channels]: sink, packed, recent, in this order.

    Attributes:
        sizes: tokens of each group of keys (`group`, but where a crop or the end of a cross-attention cut one short).
        codes: packed integers. scale, low: of keys [batch, heads, groups, channels], of values [batch, heads, tokens,
            groups of channels].
    """

    TENSORS = ("sink", "codes", "scale", "low", "recent")

    def __init__(self, form: CacheForm, like: Tensor, keys: bool) -> None:
        batch, heads, _, self.width = like.shape
        self.form, self.keys, self.sizes = form, keys, list[int]()
        self.value_group = value_group(self.width, form.group)
        empty = like.new_empty(batch, heads, 0, self.width)
        self.sink, self.recent = empty, empty
        self.codes = pack(empty.to(torch.uint8), form.bits)
        self.scale = self.low = empty if keys else empty[..., : self.width // self.value_group]

    def __len__(self) -> int:
        return self.sink.shape[2] + self.codes.shape[2] + self.recent.shape[2]

    def tensors(self) -> Iterator[Tensor]:
        return (getattr(self, name) for name in self.TENSORS)

    def all(self, *new: Tensor) -> Tensor:
        """Every token held, and `new` ones behind them."""
        return torch.cat([self.sink, self._dequantized(), self.recent, *new], dim=2)

    def append(self, new: Tensor) -> None:
        """Take in tokens; pack those that are now old."""
        free = self.form.sink - self.sink.shape[2]
        if free > 0:
            self.sink = torch.cat([self.sink, new[:, :, :free]], dim=2)
            new = new[:, :, free:]
        self.recent = torch.cat([self.recent, new], dim=2)
        old = self.form.packable(self.recent.shape[2])
        if old:
            whole = old - old % self.form.group
            self._pack(self.recent[:, :, :whole])
            self._pack(self.recent[:, :, whole:old])
            self.recent = self.recent[:, :, old:].clone()

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens`. What is packed stays so."""
        stay = max(0, len(self) - tokens)
        first, packed = self.sink.shape[2], self.codes.shape[2]
        self.recent = self.recent[:, :, : max(0, stay - first - packed)].clone()
        if stay < first + packed:
            left = max(0, stay - first)
            sizes, self.sizes = self.sizes, []
            for size in sizes:
                if left > sum(self.sizes):
                    self.sizes.append(min(size, left - sum(self.sizes)))
            grids = len(self.sizes) if self.keys else left
            self.codes = self.codes[:, :, :left].clone()
            self.scale, self.low = self.scale[:, :, :grids].clone(), self.low[:, :, :grids].clone()
        self.sink = self.sink[:, :, :stay].clone()

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Select or repeat rows."""
        for name in self.TENSORS:
            setattr(self, name, change(getattr(self, name)))

    def _pack(self, x: Tensor) -> None:
        if not x.shape[2]:
            return
        if self.keys:
            size = min(self.form.group, x.shape[2])
            self.sizes += [size] * (x.shape[2] // size)
            codes, scale, low = (t.flatten(2, 3) for t in quantize(x.unflatten(2, (-1, size)), self.form.bits, dim=3))
        else:
            codes, scale, low = (
                t.flatten(3) for t in quantize(x.unflatten(3, (-1, self.value_group)), self.form.bits, dim=4)
            )
        new = {"codes": pack(codes, self.form.bits), "scale": scale, "low": low}
        for name, tensor in new.items():
            setattr(self, name, torch.cat([getattr(self, name), tensor], dim=2))

    def _dequantized(self) -> Tensor:
        codes = unpack(self.codes, self.form.bits, self.width)
        if not self.keys:
            codes = codes.unflatten(3, (-1, self.value_group))
            return dequantize(codes, self.scale[..., None], self.low[..., None]).flatten(3)
        sizes = torch.tensor(self.sizes, dtype=torch.long, device=codes.device)
        spread = (t.repeat_interleave(sizes, dim=2, output_size=codes.shape[2]) for t in (self.scale, self.low))
        return dequantize(codes, *spread)


class PackedLayer(DynamicLayer):
    """One layer of a transformers cache, its older tokens packed. `keys` and `values` read all of them, dequantized."""

    is_croppable = False  # `crop` works, but what was packed meanwhile stays packed: not as it was

    def __init__(self, form: CacheForm) -> None:
        self.form = form
        self.sides: tuple[States, ...] = ()
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        return self.sides[0].all() if self.sides else None

    @keys.setter
    def keys(self, value: None) -> None:
        self._forget(value)

    @property
    def values(self) -> Tensor | None:
        return self.sides[1].all() if self.sides else None

    @values.setter
    def values(self, value: None) -> None:
        self._forget(value)

    def _forget(self, value: None) -> None:
        if value is not None:
            raise TypeError("keys and values of a packed layer are read only; give new tokens to `update`")
        self.sides = ()

    @property
    def bytes(self) -> int:
        """Of all tensors held."""
        return sum(t.numel() * t.element_size() for side in self.sides for t in side.tensors())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.sides = (States(self.form, key_states, keys=True), States(self.form, value_states, keys=False))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens [batch, heads, new, channels]; returns all keys and values as attention is to see them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = (side.all(new) for side, new in zip(self.sides, (key_states, value_states)))
        for side, new in zip(self.sides, (key_states, value_states)):
            side.append(new)
        return keys, values

    def get_seq_length(self) -> int:
        return len(self.sides[0]) if self.sides else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (negative, as transformers counts them)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}")
        for side in self.sides:
            side.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices.to(t.device)])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for side in self.sides:
            side.rows(change)


def pack_cache(cache: Cache, form: CacheForm) -> None:
    """Let an empty cache, in place, pack what it takes in, in every layer that holds all tokens."""
    if isinstance(cache, EncoderDecoderCache):
        pack_cache(cache.self_attention_cache, form)
        pack_cache(cache.cross_attention_cache, form.for_cross())
    elif isinstance(cache, DynamicCache):
        cache.layers[:] = [PackedLayer(form) if type(layer) is DynamicLayer else layer for layer in cache.layers]


def install(model: nn.Module, form: CacheForm) -> None:
    """Let `generate` of `model`, and of every model inside it that can generate, pack its cache. Copies keep it."""
    for module in _generators(model):
        setattr(module, FORM, form)
        setattr(module, HOOK, MethodType(_prepare, module))


def installed(model: nn.Module) -> CacheForm | None:
    """The form in which `generate` of `model` holds its cache; None where it is exact or hooks are missing."""
    forms = {vars(module).get(FORM) for module in _generators(model) if _hooked(module)}
    return forms.pop() if len(forms) == 1 and all(map(_hooked, _generators(model))) else None


def remove(model: nn.Module) -> None:
    """Give `generate` its exact cache back."""
    for module in _generators(model):
        for name in (FORM, HOOK):
            vars(module).pop(name, None)


def _generators(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


def _hooked(module: Any) -> bool:
    hook = vars(module).get(HOOK)
    return isinstance(hook, MethodType) and hook.__func__ is _prepare and hook.__self__ is module


def _prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """What transformers does before the first token, then its own dynamic cache made one that packs."""
    given = model_kwargs.get(CACHE)
    made = getattr(type(self), HOOK)(self, generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get(CACHE)
    if given is None and cache is not None and generation_config.cache_implementation in (None, "dynamic"):
        pack_cache(cache, getattr(self, FORM))
    return made
