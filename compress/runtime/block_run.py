"""Running one decoder block for some of its tokens, by the block's own code.

Three things a transformers block lets its caller do make this possible without knowing its family: it takes position
embeddings and masks from outside, it hands its rotated keys and values to the cache that it is given, and it looks up
the function that computes attention by name. So

* keys and values of tokens that do not ask come from running the block on them with a cache that takes keys and values
  and ends the run there; the query projection is blank meanwhile (`keys_and_values`);
* tokens that ask run through the block with a cache that puts those keys and values between their own (`run_block`);
* the attention that one token pays comes from a run of that token alone that ends in the attention (`attention_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .held import hold
from .masks import gather
from .rules import rule_of
from .shortened import Shortened

PLAN, CACHE, MASK = "visual_plan", "past_key_values", "attention_mask"
ROW = "svlm_attention_of_a_row"  # name of an attention function


class Plan(NamedTuple):
    """Which of a call's q tokens a block works on; a pytree, so that batches can be cut by row. Places are ascending.

    Attributes:
        asking: places [batch, a] of the tokens that get queries, outputs and the MLP. asked: False where one only
            fills its row up. beside, attended_beside: the same of tokens that are attended to without asking, [batch,
            o]; both are empty where there are none.
        order: [batch, h], where in [beside, asking] the keys and values of the block lie, in order of the sequence.
        left: [batch, q], False where a token is gone for good and leaves zeros behind; None: none is.
        state: what the block's cache holds afterwards; None where there is no cache.
    """

    asking: Tensor
    asked: Tensor
    beside: Tensor
    attended_beside: Tensor
    order: Tensor
    left: Tensor | None
    state: Shortened | None


def run_block(block: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a block: its class's own, or where a `Plan` is among the arguments, that for some tokens."""
    plan: Plan | None = kwargs.pop(PLAN, None)
    if plan is None:
        return type(block).forward(block, *args, **kwargs)
    hidden = args[0] if args else kwargs.pop("hidden_states")
    cache = kwargs.get(CACHE)
    others = keys_and_values(block, hidden, kwargs, plan.beside) if plan.beside.shape[1] else None
    mine, given = some(hidden, kwargs, plan.asking)
    if cache is not None or others is not None:
        if block.training and getattr(block, "gradient_checkpointing", False):
            raise UsageError(
                "transformers' gradient checkpointing takes the cache away that frozen visual tokens need",
                where=type(block).__name__,
                change="train without gradient checkpointing",
            )
        given[CACHE] = _Joined(cache, others, plan)
    out = type(block).forward(block, mine, **given)
    states = out[0] if isinstance(out, tuple) else out
    index = plan.asking[..., None].expand_as(states)
    before = hidden if plan.left is None else hidden.masked_fill(~plan.left[..., None], 0)
    states = torch.where(plan.asked[..., None], states, before.gather(1, index))
    full = before.scatter(1, index, states)
    return (full, *out[1:]) if isinstance(out, tuple) else full


def keys_and_values(
    block: Any, hidden: Tensor, kwargs: Mapping[str, Any], index: Tensor, values: bool = True
) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, heads, o, width] that the block makes of the tokens at `index` [batch, o].

    Nothing but its norm and these projections runs. Without `values`, the second one means nothing.
    """
    mine, given = some(hidden, kwargs, index)
    rule = rule_of(block)
    blank = [path for path in (rule.q, None if values else rule.v) if path is not None]
    with _blank(block, blank):
        try:
            type(block).forward(block, mine, **{**given, MASK: None, CACHE: _Taking()})
        except _Found as found:
            return found.value
    raise UsageError("a block does not give its keys to a cache", where=type(block).__name__)


def attention_of(
    block: Any, hidden: Tensor, kwargs: Mapping[str, Any], row: Tensor, keys: Tensor, mask: Tensor | None
) -> Tensor:
    """The attention that one token of each row pays to `keys`, mean over heads.

    Args:
        row: its place, [batch, 1]. keys: [batch, key heads, k, width], rotated. mask: [batch, heads, 1, k] or None.

    Returns:
        [batch, k], float32; it adds up to 1.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ROW not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(ROW, _row_alone)
    mine, given = some(hidden, kwargs, row)
    rule = rule_of(block)
    config = block.get_submodule(rule.attention).config
    before = config._attn_implementation
    try:
        config._attn_implementation = ROW
        with _blank(block, [rule.v] if rule.v else []):
            type(block).forward(block, mine, **{**given, MASK: mask, CACHE: _Giving(keys)})
    except _Found as found:
        return found.value
    finally:
        config._attn_implementation = before
    raise UsageError("a block computes attention in its own way", where=type(block).__name__)


def row_probabilities(
    query: Tensor, keys: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """Mean over heads of softmax(scale q k^T), [batch, k], float32.

    Args:
        query: [batch, heads, 1, width]. keys: [batch, key heads, k, width]; head i reads key head i // (heads / key
            heads). mask: bool or added, [batch, 1 or heads, 1, k].
    """
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    scores = (query.float() @ keys.float().transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).mean(1).squeeze(1)


def some(hidden: Tensor, kwargs: Mapping[str, Any], index: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The tokens at `index` [batch, n] of a block's hidden states [batch, q, width], and of what it is given for each.

    The mask and the cache are passed on as they are.
    """
    rows, tokens = hidden.shape[:2]
    given: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name == "position_embeddings" and value is not None:
            value = tuple(_along(t, index, tokens, t.ndim - 2) for t in value)
        elif name == "position_ids" and value is not None:
            value = _along(value, index, tokens, value.ndim - 1)
        elif name not in (MASK, CACHE) and isinstance(value, Tensor) and value.shape[:2] == (rows, tokens):
            value = gather(value, index)
        given[name] = value
    return gather(hidden, index), given


def _along(value: Tensor, index: Tensor, tokens: int, dim: int) -> Tensor:
    """Values [..., batch or 1, q, ...], the tokens in dimension `dim`, at the places `index` [batch, n]."""
    if value.shape[dim] != tokens:
        return value
    shape = list(value.shape)
    shape[dim - 1], shape[dim] = index.shape
    place = index.view((1,) * (dim - 1) + tuple(index.shape) + (1,) * (value.ndim - dim - 1)).expand(shape)
    return value.expand(*shape[:dim], tokens, *shape[dim + 1 :]).gather(dim, place)


# ------------------------------------------------------------------------------------------------------ cache stand-ins


class _Found(BaseException):
    """Ends a block's run when what was wanted is there. No Exception: nothing on the way may swallow it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Taking:
    """A cache that ends the run with the keys and values that it is given."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _Found((keys, values))


class _Giving:
    """A cache that holds these keys and takes no others."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.keys, values[:, :, :1].expand(-1, -1, self.keys.shape[2], -1)


class _Joined:
    """The block's cache (or none), given the keys and values of other tokens together with those that come."""

    def __init__(self, cache: Any, others: tuple[Tensor, Tensor] | None, plan: Plan) -> None:
        self.cache, self.others, self.plan = cache, others, plan

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.others is not None:
            keys, values = (self._sorted(*pair) for pair in zip(self.others, (keys, values)))
        if self.cache is None:
            return keys, values
        found = self.cache.update(keys, values, layer, *args, **kwargs)
        if self.plan.state is not None:
            hold(self.cache.layers[layer], self.plan.state)
        return found

    def _sorted(self, others: Tensor, own: Tensor) -> Tensor:
        """States [batch, heads, tokens, width] of both, in order of the sequence."""
        both = torch.cat([others, own], dim=2)
        index = self.plan.order[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3])
        return both.gather(2, index)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["cache"], name)


def _row_alone(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> Any:
    raise _Found(row_probabilities(query, key, mask, scaling, kwargs.get("softcap")))


class _Blank(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.width)


@contextmanager
def _blank(block: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """These linears of the block return zeros and compute nothing inside."""
    places = [(block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths]
    before = [owner._modules[name] for owner, name in places]
    try:
        for (owner, name), linear in zip(places, before):
            owner._modules[name] = _Blank(linear.out_features)  # type: ignore[union-attr, arg-type]
        yield
    finally:
        for (owner, name), linear in zip(places, before):
            owner._modules[name] = linear
