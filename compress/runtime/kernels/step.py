"""One token more, traced: what most of a greedy answer in torch is made of.

Of a step in transformers' own loop, products take the smaller part; the rest is Python: modules, masks, a cache that
is copied to grow by one token. `Steps` stands in for `generate`. The prompt, and everything that is asked for besides a
greedy answer to one prompt, goes through transformers; the tokens after the first then come from the decoder as a
traced function of token, position and cache, whose tensors have room for the whole answer from the start.

A trace is not trusted: the first answer is begun by transformers, and the step has to come to the same logits.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import ModelView
from ..activations import Activation
from ..greedy import answer, plain_wish
from ..hooks import owner, parameters
from ..kv_cache import installed as kv_form

PROOF = 3  # tokens that transformers makes of a first answer; all but the first are compared
MASKLESS = "svlm_one_token"  # an attention of transformers that is given no mask
GIVEN = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache")
LAYER = "DynamicLayer"  # of transformers' cache: holds all tokens, as they are


class Step(nn.Module):
    """The model as a function of one token: the token embedding, the decoder, the head."""

    def __init__(self, view: ModelView) -> None:
        super().__init__()
        self.embedding, self.head = view.model.get_input_embeddings(), view.model.get_output_embeddings()
        self.decoder = view.decoder

    def forward(self, token: Tensor, position: Tensor, places: Tensor, *held: Tensor) -> Tensor:
        """Logits [1, 1, vocabulary].

        Args:
            token: [1, 1]. position: its position ids, [..., 1, 1]. places: 0 to its own, [n]. held: keys and values of
                every layer, [1, heads, room, channels]; the token's own are written into them.
        """
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        cache.layers = [_room(keys, values, places) for keys, values in zip(held[::2], held[1::2])]
        out = self.decoder(
            inputs_embeds=self.embedding(token), attention_mask=None, position_ids=position, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        return self.head(out.last_hidden_state)


def _room(keys: Tensor, values: Tensor, places: Tensor) -> Any:
    """A layer of transformers' cache within tensors that have room for more."""
    from transformers.cache_utils import DynamicLayer

    class Room(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            count = places.shape[0]
            return tuple(  # type: ignore[return-value]
                held.index_copy_(2, places[-1:], new)[:, :, :count]
                for held, new in ((keys, key_states), (values, value_states))
            )

        def get_seq_length(self) -> int:
            return places.shape[0] - 1

    layer = Room()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer


def obstacle(view: ModelView) -> str:
    """Why `generate` of this model stays transformers' own; empty where greedy answers may take traced steps."""
    model: Any = view.model
    decoder: Any = view.decoder
    if view.family.seq2seq:
        return "its language model is an encoder-decoder"
    if "generate" in vars(model) or kv_form(model) is not None:
        return "a pass works on how it generates"
    if model.get_output_embeddings() is None or set(GIVEN[:4]) - set(parameters(type(decoder).forward)):
        return "its decoder is not called as others are"
    if getattr(decoder.config, "_attn_implementation", None) != "sdpa":
        return "its attention is not torch's"
    if rope := growing(decoder.config.to_dict().get("rope_parameters")):
        return f"the frequencies of its positions change with their number ({rope})"
    if next(model.parameters()).device.type != "cpu":
        return "it does not run on the CPU"
    hooks = [h for m in decoder.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return "a pass works on its blocks" if not all(isinstance(owner(h), Activation) for h in hooks) else ""


def growing(rope: Any) -> str:
    """The kind of rotary embedding, of those that look at how long the sequence is; empty where there is none.

    A trace would hold what they did for the length that was traced.

    Args:
        rope: a config's `rope_parameters`, which may be apart by kind of layer.
    """
    parts = rope.values() if isinstance(rope, dict) else ()
    found = rope.get("rope_type", "") if isinstance(rope, dict) else ""
    kind = found if "dynamic" in str(found) or found == "longrope" else ""
    return kind or next(filter(None, map(growing, parts)), "")


class Steps:
    """Stands in for the `generate` of a model that only runs: the same answers.

    Modules run, and call their hooks, for the prompt; not for the tokens after it, unless transformers makes these.

    Attributes:
        refused: why transformers makes all tokens; empty as long as it need not.
    """

    def __init__(self, view: ModelView) -> None:
        self.model, self.decoder, self.step = view.model, view.decoder, Step(view).eval()
        self.traced: dict[tuple[int, ...], Callable[..., Tensor]] = {}  # by the leading sizes of position ids
        self.proven: set[tuple[str, ...]] = set()  # by what was given with a prompt
        self.refused, self.turn = "", threading.RLock()

    def __call__(self, *args: Any, **asked: Any) -> Any:
        """`generate` of transformers. Threads take turns: a trace sets the attention of the whole model aside."""
        with self.turn, torch.no_grad():
            return self._generate(*args, **asked)

    def _generate(self, *args: Any, **asked: Any) -> Any:
        own = type(self.model).generate
        outside = bool(args or self.refused) or torch.is_autocast_enabled("cpu")  # dtypes would not be those traced
        wish = None if outside else plain_wish(self.model, asked)
        if wish is None:
            return own(self.model, *args, **asked)
        given = tuple(sorted(name for name, value in asked.items() if isinstance(value, Tensor)))
        proven = given in self.proven
        made = min(1 if proven else PROOF, wish.limit)
        with self._positions() as positions:
            begun = own(
                self.model,
                **asked | {"max_new_tokens": made, "return_dict_in_generate": True, "output_logits": not proven},
            )
        prompt = asked["input_ids"].shape[1]
        new = begun.sequences[:, prompt:]
        if new.shape[1] == wish.limit or int(new[0, -1]) in wish.ends:
            return begun.sequences
        where = positions[0] if positions and positions[0] is not None else torch.arange(prompt)[None]
        if not goes_on(where, prompt):
            return own(self.model, **asked)
        held = room(begun.past_key_values, prompt, made - 1, wish.limit)
        if not held:
            self.refused = "its cache does not hold every token as it is"
            return own(self.model, **asked)
        state = Rolling(held, where, wish.limit)
        self._trace(state, new[:, :1])
        if self.refused:
            return own(self.model, **asked)
        if not proven:
            step = state.over(self.traced[state.lead])
            found = [step(token[None, None]) for token in new[0, :-1]]
            self.refused = differs(found, begun.logits[1:])
            if self.refused:
                return own(self.model, **asked)
            self.proven.add(given)
            state = Rolling(held, where, wish.limit)
        step = state.over(self.traced[state.lead])
        tokens = answer(
            new[:, 0].numpy(), lambda last: step(torch.from_numpy(last)[None])[:, -1].argmax(-1).numpy(), wish
        )
        return torch.cat([begun.sequences[:, :prompt], torch.from_numpy(tokens)], 1)

    @contextmanager
    def _positions(self) -> Iterator[list[Any]]:
        """The position ids that the decoder is given in its first call; None where it is given none."""
        seen: list[Any] = []

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append(kwargs.get("position_ids"))

        handle = self.decoder.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()

    def _trace(self, state: Rolling, token: Tensor) -> None:
        """Trace the step for positions of this kind, where that is not done yet; or say in `refused` why it fails."""
        if state.lead in self.traced:
            return
        with unmasked(self.decoder.config), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constants of one token are as they should be; tracing is "deprecated"
            try:
                self.traced[state.lead] = torch.jit.trace(
                    self.step, state.arguments(token), check_trace=False, strict=False
                )
            except Exception as error:  # whatever the model's own code raises under a trace
                said = str(error).strip().splitlines() or [type(error).__name__]
                self.refused = f"a step cannot be traced: {said[0][:200]}"


class Rolling:
    """What a step needs to know besides the token: its position, its place, the cache.

    Args:
        held: see `room`. positions: of the prompt, [..., 1, prompt]. limit: of new tokens.
    """

    def __init__(self, held: list[Tensor], positions: Tensor, limit: int) -> None:
        self.held, self.lead, self.count = held, tuple(positions.shape[:-2]), positions.shape[-1]
        self.places = torch.arange(self.count + limit)
        self.position = positions[..., -1:] + 1

    def arguments(self, token: Tensor) -> tuple[Tensor, ...]:
        return (token, self.position, self.places[: self.count + 1], *self.held)

    def over(self, traced: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        """Logits [1, 1, vocabulary] of a token [1, 1], which becomes part of what was before."""

        def step(token: Tensor) -> Tensor:
            logits = traced(*self.arguments(token))
            self.count += 1
            self.position += 1
            return logits

        return step


def goes_on(positions: Tensor, prompt: int) -> bool:
    """Whether positions [..., 1, prompt] end as text does: every one of the last token is one more than before it.

    Where a prompt ends with a picture, the tokens after it may go on from elsewhere.
    """
    known = positions.shape[-1] == prompt > 1
    return known and bool((positions[..., -1] - positions[..., -2] == 1).all())


def room(cache: Any, prompt: int, more: int, limit: int) -> list[Tensor]:
    """Keys and values of every layer [1, heads, prompt + limit, channels], those of the prompt filled in.

    Args:
        cache: of transformers. more: tokens that it holds besides the prompt.

    Returns:
        Nothing where the cache is of another kind than a plain one, or holds other than these tokens.
    """
    made: list[Tensor] = []
    if type(cache).__name__ != "DynamicCache":
        return made
    for layer in cache.layers:
        if type(layer).__name__ != LAYER or layer.keys.shape[2] != prompt + more:
            return []
        for states in (layer.keys, layer.values):
            wide = states.new_zeros(*states.shape[:2], prompt + limit, states.shape[3])
            wide[:, :, :prompt] = states[:, :, :prompt]
            made.append(wide)
    return made


def differs(found: list[Tensor], wanted: Any) -> str:
    """How far the logits of steps are from transformers' own; empty where they are the same but for rounding."""
    for number, (a, b) in enumerate(zip(found, wanted)):
        allowed = max(1e-4, 4 * torch.finfo(a.dtype).eps)
        off = float((a[:, -1].float() - b.float()).norm() / b.float().norm().clamp_min(1e-30))
        if not off <= allowed:
            return f"token {number + 2} was off by {off:.1e} of transformers' logits, {allowed:.1e} is allowed"
    return ""


@contextmanager
def unmasked(config: Any) -> Iterator[None]:
    """Let a decoder of this config attend without a mask: one token sees all before it."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(MASKLESS, sdpa_attention_forward)
    before = config._attn_implementation
    config._attn_implementation = MASKLESS
    try:
        yield
    finally:
        config._attn_implementation = before
