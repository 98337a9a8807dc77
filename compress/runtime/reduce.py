"""Fewer visual tokens in the language model: the mechanism, whatever chooses the tokens.

The visual tokens are already merged into `inputs_embeds` when the decoder is called. `install` puts one `Reduction` on
a model; it listens at two places and changes no weight:

* before the module that merges images and text (it still sees `input_ids`): which positions are visual;
* around the decoder: the tokens that were not chosen are taken out of `inputs_embeds`, masks, position ids and every
  other per-token input, the decoder runs on the shorter sequence, and its hidden states are scattered back to full
  length (zeros where a token was taken out), so that logits, labels and all outer code are untouched.

What is computed is what the original computes when nobody attends to the tokens taken out: position ids stay the
original ones (M-RoPE included), sliding windows count original distances. The KV cache holds the shorter sequence and
knows it (`shortened`): towards generation code it answers with the full length, so decoding, beams, several turns and
cache reuse work as before.

Images are runs of consecutive image tokens (a tile between separators is one; videos are left alone). Of each,
`kept_count` tokens stay, a number that depends on its length alone, and the choice depends on its own features (and,
where asked for, on its row's prompt), never on the rest of the batch. Rows that end up shorter are filled up on the
left with masked tokens.

A method may also change what stays. Merging is part of its choice (`images.Choice.weights`). What is given as `rewrite`
sees the whole sequence and what was chosen, and returns other embeddings for it (see `prefusion`). Where the prompt
matters, labels tell it from the answer; while `generate` runs, it is what that was given (`hooks.Generating`).

A method may ask for what the vision tower knows of each token: a `tower.Watch` then listens to one of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, UsageError
from .hooks import Generating, generating, ids_of, layer_types, merger, named, owner, parameters, setting, window_of
from .images import Choice, Choose, Chosen, Images, by_grid, kept_count, mean_direction, mixed, numbered, ranks, runs
from .masks import gather, order, shorten_mask, windowed
from .shortened import Shortened, shortened, state_of
from .tower import Watch

SLOT = "visual_token_reduction"  # name of the Reduction among the decoder's children
VISUAL_MASK, VISUAL_FEATURES = "visual_pos_masks", "deepstack_visual_embeds"  # Qwen3-VL's inputs by visual token
Rewrite = Callable[[Tensor, "Call", list[Chosen]], Tensor]


def installed(model: nn.Module) -> Reduction | None:
    """The reduction that `model` carries, if any."""
    return next((m for m in model.modules() if isinstance(m, Reduction)), None)


def install(model: nn.Module, decoder_path: str, reduction: Reduction) -> None:
    """Put `reduction` on `model`. It travels with `copy.deepcopy`; `remove` takes it off again.

    Raises:
        ModelError: the model already carries one, or cannot carry one (see `obstacle`).
    """
    reason = obstacle(model, decoder_path)
    if reason:
        raise ModelError("this model cannot run with fewer visual tokens", where=decoder_path, found=reason)
    decoder, merges = model.get_submodule(decoder_path), merger(model, decoder_path)
    assert merges is not None
    decoder.register_module(SLOT, reduction)
    reduction.window = window_of(decoder)
    reduction.causal = not setting(decoder, "use_bidirectional_attention")
    if reduction.reads_labels:
        model.register_forward_pre_hook(reduction.note_labels, with_kwargs=True)
        reduction.generating = generating(model)
    merges.register_forward_pre_hook(reduction.begin, with_kwargs=True)
    merges.register_forward_hook(reduction.end, always_call=True)
    if reduction.watch is not None:
        reduction.watch.install(model)
    decoder.register_forward_pre_hook(reduction.shorten, with_kwargs=True)
    decoder.register_forward_hook(reduction.spread)


def remove(model: nn.Module) -> None:
    """Take the reduction off `model`; nothing happens where there is none."""
    reduction = installed(model)
    for module in list(model.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if reduction is not None and reduction.owns(hook)]:
                del hooks[key]
        if module._modules.get(SLOT) is reduction is not None:
            del module._modules[SLOT]
        known = vars(module).get("generate")
        if reduction is not None and known is reduction.generating and not _others(model, reduction, known):
            vars(module).pop("generate", None)


def _others(model: nn.Module, reduction: Reduction, known: Any) -> bool:
    """Whether another mechanism has to know where the prompt ends as well."""
    return any(vars(m).get("generating") is known for m in model.modules() if m is not reduction)


def obstacle(model: nn.Module, decoder_path: str) -> str:
    """Why `model` cannot carry a reduction; the empty string where it can."""
    return "its visual tokens are reduced already" if installed(model) else cannot(model, decoder_path)


def cannot(model: nn.Module, decoder_path: str) -> str:
    """Why the visual tokens of `model` cannot be told apart in its decoder; the empty string where they can."""
    from transformers import GenerationMixin

    if isinstance(model, GenerationMixin) and type(model).generate is not GenerationMixin.generate:
        return f"the generate() of {type(model).__name__} is its own and hides which of the decoder's tokens are visual"
    decoder = model.get_submodule(decoder_path)
    lacks = [
        n for n in ("inputs_embeds", "attention_mask", "position_ids") if n not in parameters(type(decoder).forward)
    ]
    if lacks:
        return f"its {type(decoder).__name__} takes no {', '.join(lacks)}, so kept tokens cannot keep their positions"
    strange = {"chunked_attention", "linear_attention"} & set(layer_types(decoder))
    if strange:
        return f"its decoder has layers of {', '.join(sorted(strange))}"
    if merger(model, decoder_path) is None:
        return "no module above the decoder takes both input_ids and pixel_values"
    return ""


@dataclass
class Call:
    """One forward call of q new tokens, as seen before images and text are merged; all [batch, q].

    Attributes:
        visual: image tokens. real: no padding. prompt: text that is not the answer (labels say so, where given).
        positions: places counted without padding.
        decoder, inputs: what is called, and its arguments by name, as they were before anything was taken out.
    """

    visual: Tensor
    real: Tensor
    prompt: Tensor
    positions: Tensor
    decoder: Any = None
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Cut:
    """Which of q tokens the decoder sees: `index` [batch, q'] ascending, False in `valid` where it only fills up."""

    index: Tensor
    valid: Tensor
    length: int
    cache: Any
    past: Shortened


class Reduction(nn.Module):
    """Runs a decoder on fewer visual tokens; `install` puts it on a model. It has no parameters.

    Args:
        choose: `choose(images, k) -> Choice` (see `images`).
        keep: fraction of each image's tokens that stay.
        image_token_id: the id that stands for a visual token in `input_ids`.
        label: whose work this is (a pass name and its settings), for promises.
        prompt: whether `choose` is given `relevance`, the mean cosine of each visual token with the embeddings of its
            row's text (without the answer, where labels are passed to the model).
        per_image: tokens of one image where all have as many (`ModelView.per_image`), to tell apart images without
            text between them; 0: each run is one image.
        count: how many tokens of each image stay, instead of `keep`.
        rewrite: `rewrite(embeds [batch, q, D], call, chosen) -> [batch, q, D]`, called with gradients for every call
            that has images, before anything is taken out (even where all stay), and in place of merging; what it
            returns at places that do not stay is dropped.
        watch: reads the tower for `images.attention` and `images.keys`.
    """

    def __init__(
        self,
        choose: Choose,
        keep: float,
        image_token_id: int,
        label: Mapping[str, Any],
        *,
        prompt: bool = False,
        per_image: int = 0,
        count: int = 0,
        rewrite: Rewrite | None = None,
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        self.choose, self.keep, self.image_token_id = choose, keep, image_token_id
        self.label, self.prompt, self.window, self.causal = dict(label), prompt, 0, True
        self.per_image, self.count, self.rewrite, self.watch = per_image, count, rewrite, watch
        self.labels: Tensor | None = None
        self.generating: Generating | None = None
        self.call: Call | None = None
        self.cut: Cut | None = None
        self.last: tuple[Tensor, Tensor] | None = None

    @property
    def reads_labels(self) -> bool:
        """Whether labels are to be passed with the input, where there are any."""
        return self.prompt or self.rewrite is not None

    def kept(self, tokens: int) -> int:
        """How many tokens stay of an image of `tokens`."""
        return kept_count(tokens, self.keep, self.count)

    def reduce_mask(self, mask: Tensor) -> Tensor:
        """A mask over the full sequence [batch, S] as the decoder saw the last prefill: [batch, S'].

        Filled-up places are False (or 0). The mask itself where nothing was taken out.
        """
        if self.last is None:
            return mask
        index, valid = (t.to(mask.device) for t in self.last)
        return mask.gather(1, index).masked_fill(~valid, 0)

    def attached_to(self, model: nn.Module, decoder_path: str) -> bool:
        """Whether this reduction still acts on the decoder of `model`: all its hooks are in place."""
        decoder, merges = model.get_submodule(decoder_path), merger(model, decoder_path)
        if merges is None:
            return False
        places = (merges._forward_pre_hooks, decoder._forward_pre_hooks, decoder._forward_hooks)
        mine = all(any(owner(hook) is self for hook in hooks.values()) for hooks in places)
        return mine and (self.watch is None or self.watch.attached_to(model))

    def owns(self, hook: Any) -> bool:
        """Whether a hook is this reduction's."""
        return owner(hook) is self or (self.watch is not None and owner(hook) is self.watch)

    # -- the hooks -----------------------------------------------------------------------------------------------------

    def note_labels(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.labels = named(module, args, kwargs).get("labels")

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Note which tokens of this call are visual; tell the outer code how long the cache really is."""
        values = named(module, args, kwargs)
        cache, mask = values.get("past_key_values"), values.get("attention_mask")
        ids = ids_of(module, values, self.image_token_id)
        rows, new = ids.shape
        past = cache.get_seq_length() if cache is not None else 0
        full = mask if isinstance(mask, Tensor) and mask.ndim == 2 else ids.new_ones(rows, past + new)
        if full.shape[1] != past + new:
            raise UsageError(
                "the attention mask does not cover the sequence",
                where=type(module).__name__,
                found=f"{full.shape[1]} tokens; {past} in the cache and {new} new ones",
            )
        positions = (full.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
        visual, real = ids == self.image_token_id, full[:, past:].bool()
        prompt = real & ~visual
        if self.labels is not None and self.labels.shape == ids.shape:
            prompt &= self.labels == -100
        if self.generating is not None and self.generating.given is not None:
            prompt &= torch.arange(past, past + new, device=ids.device) < self.generating.given
        self.call, self.labels = Call(visual, real, prompt, positions), None
        if self.watch is not None:
            self.watch.begin((values.get("mm_encoder_outputs") or {}).get("image"))
        state = state_of(cache)
        if state is not None:
            if mask is not None and full is not mask:
                raise UsageError(
                    "a reduced cache needs a two-dimensional attention mask",
                    where=type(module).__name__,
                    change="generate with the default dynamic cache",
                )
            values["attention_mask"] = state.shorten_mask(full)
            types = values.get("token_type_ids")
            if isinstance(types, Tensor) and types.shape == full.shape and past:
                values["token_type_ids"] = state.shorten_mask(types)
        return (), values

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.call = None
        if self.watch is not None:
            self.watch.end()

    def shorten(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Take the tokens that were not chosen out of everything that the decoder is given."""
        call, self.call, self.cut = self.call, None, None
        values = named(module, args, kwargs)
        embeds, cache = values.get("inputs_embeds"), values.get("past_key_values")
        if call is None or embeds is None:
            return None
        if embeds.shape[:2] != call.visual.shape:
            raise ModelError(
                "the model changes the length of the sequence between input_ids and the decoder",
                where=type(module).__name__,
                found=f"{tuple(call.visual.shape)} ids, {tuple(embeds.shape[:2])} embeddings",
            )
        rows, new = call.visual.shape
        if new > 1:
            self.last = None
        state = state_of(cache)
        chosen = self._chosen(call, embeds, values.get("position_ids")) if new > 1 else []
        if chosen and self.rewrite is None:
            values["inputs_embeds"] = mixed(embeds.flatten(0, 1), chosen).view_as(embeds)
        elif chosen and self.rewrite is not None:
            call.decoder, call.inputs = module, dict(values)
            values["inputs_embeds"] = self.rewrite(embeds, call, chosen)
        cutting = any(one.kept.shape != one.places.shape for one in chosen)
        if not cutting and state is None:
            return ((), values) if chosen else None
        past = state or Shortened.whole(rows, cache.get_seq_length() if cache is not None else 0, embeds.device)
        positions = values.get("position_ids")
        positions = call.positions if positions is None else positions
        positions = positions.expand(*positions.shape[:-2], rows, new)
        mask = values.get("attention_mask")
        if not cutting:
            past = past.grown(cache)
            index = torch.arange(new, device=embeds.device).expand(rows, new)
        else:
            if cache is not None and cache.is_compileable:
                raise UsageError("a static cache cannot hold fewer visual tokens", change="use a dynamic cache")
            past = past.grown(cache) if cache is not None else past
            kept = ~call.visual.flatten()
            for one in chosen:
                kept[one.kept] = True
            kept = kept.view(rows, new)
            index, valid = order(kept)
            self.cut, self.last = Cut(index, valid, new, cache, past), (index, valid)
            visual = values.get(VISUAL_MASK)
            for name, value in list(values.items()):
                if name in ("attention_mask", "position_ids", "past_key_values"):
                    continue
                if isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == (rows, new):
                    values[name] = gather(value, index)
            if visual is not None:
                values[VISUAL_MASK] &= valid
                stay, among = kept[visual], numbered(chosen, visual)
                values[VISUAL_FEATURES] = [mixed(f, among)[stay] for f in values[VISUAL_FEATURES] or ()]
            positions = positions.gather(-1, index.expand(positions.shape[:-1] + index.shape[-1:]))
            mask = shorten_mask(mask, call.real, index, valid, past, self.causal)
        values["position_ids"] = positions
        values["attention_mask"] = windowed(module, mask, past, index, values, self.window) if self.window else mask
        return (), values

    def spread(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Scatter the hidden states back to full length; tell the cache what it holds."""
        cut, self.cut = self.cut, None
        if cut is None:
            return None

        def full(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(full(v) for v in value)
            if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[:2] != cut.index.shape:
                return value
            index = cut.index[..., None].expand_as(value)
            blank = value.new_zeros(value.shape[0], cut.length, value.shape[2])
            return blank.scatter(1, index, value.masked_fill(~cut.valid[..., None], 0))

        cache = cut.cache
        if isinstance(output, MutableMapping):
            cache = output.get("past_key_values", cache)
            for name in list(output):
                if name != "past_key_values":
                    output[name] = full(output[name])
        else:
            output = full(output)
        if cache is not None:
            shortened(cache, cut.past.extended(cut.index, cut.valid, cut.length))
        return output

    # -- private -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _chosen(self, call: Call, embeds: Tensor, positions: Tensor | None) -> list[Chosen]:
        """What stays of each image; nothing where all of all do."""
        found: list[tuple[Tensor, Any]] = [(places, None) for places in runs(call.visual, self.per_image)]
        if self.rewrite is None and all(self.kept(places.shape[1]) == places.shape[1] for places, _ in found):
            return []
        if positions is not None and positions.ndim == 3:
            known = positions.expand(-1, *call.visual.shape).flatten(1)
            found = [pair for places, _ in found for pair in by_grid(places, known)]
        features = embeds.detach().flatten(0, 1)
        text = mean_direction(embeds, call.prompt) if self.prompt else None
        rank, seen = ranks(call.visual), self.watch.of(call.visual) if self.watch is not None else None
        chosen = []
        for places, grid in found:
            tokens = places.shape[1]
            if self.kept(tokens) == tokens:
                all_of_it = torch.arange(tokens, device=places.device).expand_as(places)
                chosen.append(Chosen(places, Choice(all_of_it)))
                continue
            images = Images(features[places], grid=grid)
            if text is not None:
                images = images.relevant_to(text[places[:, 0] // call.visual.shape[1]])
            if seen is not None:
                mine = rank[places]
                images = replace(images, attention=seen.attention[mine], keys=seen.keys[mine])
            chosen.append(Chosen(places, self.choose(images, self.kept(tokens))))
        return chosen
