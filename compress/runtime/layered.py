"""Visual tokens that are treated differently from block to block inside the decoder: one mechanism for several passes.

For each block a `Rule` says which tokens ask (get queries, the output projection, the MLP) and which are held (can be
attended to; their keys and values go into the cache). Text always does both. Visual tokens may be frozen in a block
(held, not asking), hidden from it (neither), or taken out of it and all later ones, a share of each image's tokens
staying: those to which the last token of the prompt pays the most attention in some block.

Between blocks the sequence has its full length. Before a block runs, `Layered` looks up its rule and hands the block a
`Plan` and a mask that is cut from the decoder's own; `block_run` does the rest. So a block that is run alone on what
was caught (calibration) computes what it computes here. Position ids are the original ones, sliding windows count
original distances. The cache holds in each layer what its block holds (`held`).

Which tokens stay is decided image by image and depends on the image's own row alone. The row of attention is that of
the last token before the answer: where labels are given, before the first of them; inside `generate`, the last one of
what it was given. Images of earlier turns keep the choice that was made when they came, as long as the cache is kept.

A reduction before the decoder (`reduce`) may be on the model as well; this mechanism then sees its shorter sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, UsageError
from .block_run import CACHE, MASK, PLAN, Plan, attention_of, keys_and_values, run_block
from .held import held_by, window_of
from .hooks import Generating, generating, ids_of, merger, named, setting
from .masks import block_mask, order
from .reduce import SLOT as REDUCTION
from .reduce import cannot, kept_count
from .rules import RULE, Rule, blocks_of, rule_of
from .shortened import Shortened

SLOT = "visual_tokens_by_block"  # name of the Layered among the decoder's children
Rows = tuple[Tensor, Tensor]  # places [batch, n] among the tokens that the decoder is given, False where one fills up


@dataclass(frozen=True)
class Worked:
    """Tokens of a prefill. `asking`: those that a block worked on. `beside`: others that it attends to."""

    asking: Rows
    beside: Rows


@dataclass
class Last:
    """Of the last prefill: block -> what it worked on, where that is not all; and what came through, [batch, q]."""

    blocks: dict[nn.Module, Worked] = field(default_factory=dict)
    through: Tensor | None = None


@dataclass
class Run:
    """One forward call. Shapes: q new tokens, [batch, q].

    Attributes:
        visual: which are image tokens; images: whether any is. row: place of the prompt's last token, [batch, 1].
        left: visual tokens that are still there, and all others. worked: tokens that some block worked on.
        ranking: attention that the tokens got in the last block that ranks. number: blocks that were called. stage: how
            often tokens were dropped. memo: what blocks with the same rule share.
    """

    visual: Tensor
    row: Tensor
    left: Tensor
    worked: Tensor
    images: bool
    ranking: Tensor | None = None
    number: int = 0
    stage: int = 0
    memo: dict[Any, Any] = field(default_factory=dict)


class Layered(nn.Module):
    """Treats visual tokens by the rules on the decoder's blocks. No parameters, no buffers; `install` puts it on."""

    def __init__(self, decoder: nn.Module, image_token_id: int) -> None:
        super().__init__()
        self._decoder = [decoder]  # in a list: no child of its own child
        self.image_token_id = image_token_id
        self.causal = not setting(decoder, "use_bidirectional_attention")
        self.labels: Tensor | None = None
        self.generating: Generating | None = None
        self.run: Run | None = None
        self.last = Last()

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def note_labels(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.labels = named(module, args, kwargs).get("labels")

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note which tokens of this call are visual, and where the prompt ends."""
        values = named(module, args, kwargs)
        cache, labels = values.get(CACHE), self.labels
        self.run = self.labels = None
        ids = ids_of(module, values, self.image_token_id)
        visual = ids == self.image_token_id
        images = bool(visual.any())
        if ids.shape[1] > 1:
            self.last = Last()
        if not images and not any(held_by(layer) for layer in getattr(cache, "layers", ())):
            return
        if images and cache is not None and cache.is_compileable:
            raise UsageError("a static cache cannot hold fewer visual tokens", change="use a dynamic cache")
        past = cache.get_seq_length() if cache is not None else 0
        row = self._row(ids, values.get(MASK), labels, past)
        everything = torch.ones_like(visual)
        self.run = Run(visual, row, everything, torch.zeros_like(visual), images)

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.run = None

    def before(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Give a block its plan and its mask."""
        run = self.run
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if run.number == 0:
            self._shorten(run, hidden)
        number, rule = run.number, rule_of(block)
        run.number += 1
        cache, mask = kwargs.get(CACHE), kwargs.get(MASK)
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
            raise UsageError(
                "visual tokens are treated block by block with sdpa or eager attention only",
                where=type(block).__name__,
                found=f"a mask that is {type(mask).__name__}",
                change='load the model with attn_implementation="sdpa"',
            )
        layer = cache.layers[number] if cache is not None and number < len(cache.layers) else None
        past = self._past(run, layer)
        if run.images and rule.ranks:
            run.ranking = self._ranking(run, block, hidden, kwargs, past, layer)
        if run.images and rule.keep is not None:
            run.left = run.left & (~run.visual | self._chosen(run, rule.keep))
            run.stage += 1
        return self._planned(run, block, past, layer, (args, kwargs))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _row(self, ids: Tensor, mask: Any, labels: Tensor | None, past: int) -> Tensor:
        """Where the prompt's last token stands among the new ones, [batch, 1]."""
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        real = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, mask.shape[1] - ids.shape[1] :].bool()
        if labels is not None and labels.shape == ids.shape:
            answer = (labels != -100).to(ids.device)
            first = torch.where(answer.any(1), answer.int().argmax(1), ids.shape[1])
            real = real & (places < first[:, None])
        if self.generating is not None and self.generating.given is not None:
            real = real & (past + places < self.generating.given)
        return torch.where(real, places, 0).amax(1, keepdim=True)

    def _shorten(self, run: Run, hidden: Tensor) -> None:
        """Where a reduction took tokens out before the decoder: the same of those that are left."""
        if hidden.shape[:2] == run.visual.shape:
            return
        reduction: Any = self._decoder[0]._modules.get(REDUCTION)
        cut = reduction.cut if reduction is not None else None
        if cut is None or cut.index.shape != hidden.shape[:2]:
            raise ModelError(
                "the model changes the length of the sequence between input_ids and the decoder",
                where=type(self._decoder[0]).__name__,
                found=f"{tuple(run.visual.shape)} ids, {tuple(hidden.shape[:2])} hidden states",
            )
        run.visual = run.visual.gather(1, cut.index) & cut.valid
        run.row = ((cut.index == run.row) & cut.valid).int().argmax(1, keepdim=True)
        run.left, run.worked = torch.ones_like(run.visual), torch.zeros_like(run.visual)

    def _past(self, run: Run, layer: Any) -> Shortened:
        held = held_by(layer)
        if held is not None:
            return held
        length = layer.get_seq_length() if layer is not None else 0
        window = window_of(layer)
        if length not in run.memo:
            run.memo[length] = Shortened.whole(len(run.visual), length, run.visual.device)
        whole = run.memo[length]
        if window and length >= window:
            first = length - window + 1
            whole = replace(whole, slots=whole.slots[:, first:], valid=whole.valid[:, first:])
        return whole

    def _rows(self, run: Run, rule: Rule) -> tuple[Rows, Rows, Rows, Tensor] | None:
        """Tokens that ask, those beside them, all that are held, and where these lie; None where all do both."""
        key = (rule.frozen, rule.hidden, run.stage)
        if key not in run.memo:
            asking = run.left & ~(run.visual & rule.frozen)
            held = run.left & ~(run.visual & rule.hidden)
            run.memo[key] = None
            if not bool((asking & held).all()):
                mine, others, keys = order(asking), order(held & ~asking), order(held)
                rows, q = asking.shape
                where = torch.zeros(rows, q + 1, dtype=torch.long, device=asking.device)  # the last one: of no token
                numbers = torch.arange(mine[0].shape[1] + others[0].shape[1], device=asking.device).expand(rows, -1)
                index, valid = (torch.cat(pair, dim=1) for pair in zip(others, mine))
                where.scatter_(1, torch.where(valid, index, q), numbers)
                run.memo[key] = mine, others, keys, where.gather(1, keys[0])
            run.worked = run.worked | asking
        return run.memo[key]

    def _all(self, run: Run) -> tuple[Rows, Rows, Rows, Tensor]:
        """As `_rows` where all tokens do both."""
        if "all" not in run.memo:
            every = order(torch.ones_like(run.visual))
            run.memo["all"] = every, order(torch.zeros_like(run.visual)), every, every[0]
        return run.memo["all"]

    def _planned(
        self, run: Run, block: nn.Module, past: Shortened, layer: Any, call: tuple[tuple, dict]
    ) -> tuple[tuple, dict] | None:
        args, kwargs = call
        rule, found = rule_of(block), None
        if run.images:
            found = self._rows(run, rule)
            self.last.through = run.left & run.worked
        if found is None and held_by(layer) is None:
            return None
        new = run.visual.shape[1]
        if found is None:
            found = self._all(run)
        mine, others, keys, where = found
        if new > 1:
            self.last.blocks[block] = Worked(mine, others)
        cache, state = kwargs.get(CACHE), None
        if cache is not None:
            key: tuple[Any, ...] = ("state", id(past), id(keys[0]))
            if key not in run.memo:
                run.memo[key] = past.extended(keys[0], keys[1], new), past
            state = run.memo[key][0]
        window = window_of(layer)
        key = ("mask", id(past), id(keys[0]), id(mine[0]), id(kwargs.get(MASK)), window)
        if key not in run.memo:
            mask = block_mask(kwargs.get(MASK), past, mine[0], keys, new, causal=self.causal, window=window)
            run.memo[key] = mask, past, kwargs.get(MASK)  # kept, so that their ids stay theirs
        plan = Plan(*mine, *others, where, run.left if run.stage else None, state)
        return args, {**kwargs, MASK: run.memo[key][0], PLAN: plan}

    @torch.no_grad()
    def _ranking(self, run: Run, block: Any, hidden: Tensor, kwargs: dict, past: Shortened, layer: Any) -> Tensor:
        """The attention that the prompt's last token pays to the new tokens in this block, [batch, q], float32."""
        index, valid = order(run.left)
        keys, _ = keys_and_values(block, hidden, kwargs, index, values=False)
        if past.slots.shape[1]:
            keys = torch.cat([layer.keys, keys], dim=2)
        mask = block_mask(
            kwargs.get(MASK), past, run.row, (index, valid), run.visual.shape[1],
            causal=self.causal, window=window_of(layer),
        )  # fmt: skip
        paid = attention_of(block, hidden, kwargs, run.row, keys, mask)[:, past.slots.shape[1] :]
        return paid.new_zeros(run.visual.shape).scatter_add(1, index, paid.masked_fill(~valid, 0))

    def _chosen(self, run: Run, keep: float) -> Tensor:
        """Visual tokens that stay, bool [batch, q]: the share `keep` of each image's."""
        if run.ranking is None:
            raise ModelError("no block ranked the visual tokens", change="compress the model again")
        ranking = run.ranking.masked_fill(~run.left, -torch.inf).flatten()
        stay = torch.zeros_like(run.visual).flatten()
        for places in images_of(run.visual):
            best = ranking[places].argsort(dim=1, descending=True, stable=True)
            stay[places.gather(1, best[:, : kept_count(places.shape[1], keep)]).flatten()] = True
        return stay.view_as(run.visual)


def images_of(visual: Tensor) -> Iterator[Tensor]:
    """The images (runs of consecutive image tokens) of `visual` [batch, q], by length: places [n, T] in it, flat."""
    before = nn.functional.pad(visual, (1, 0))[:, :-1]
    run = (visual & ~before).flatten().long().cumsum(0) - 1
    flat = visual.flatten()
    counts = torch.bincount(run[flat])
    sizes = torch.where(flat, counts[run.clamp_min(0)], 0)
    for tokens in counts.unique().tolist():
        yield (sizes == tokens).nonzero().view(-1, tokens)


# ---------------------------------------------------------------------------------------------------------- on a model


def installed(model: nn.Module) -> Layered | None:
    """The mechanism that `model` carries, if any."""
    return next((m for m in model.modules() if isinstance(m, Layered)), None)


def obstacle(model: nn.Module, decoder_path: str) -> str:
    """Why `model` cannot treat visual tokens block by block; the empty string where it can."""
    reason = cannot(model, decoder_path)
    used = setting(model.get_submodule(decoder_path), "_attn_implementation") or getattr(
        model.get_submodule(decoder_path).config, "_attn_implementation", None
    )
    if not reason and used not in ("sdpa", "eager"):
        return f"its decoder runs with attn_implementation {used}, not sdpa or eager"
    return reason


def install(
    model: Any, decoder_path: str, image_token_id: int, blocks: Mapping[nn.Module, tuple[str, str | None, str | None]]
) -> Layered:
    """The mechanism of `model`, put on it where it is not there yet; without any rule nothing changes.

    Args:
        blocks: the decoder's blocks in the order of their calls -> paths in the block of the attention module and of
            the projections of queries and values (None where they are fused).

    Raises:
        ModelError: the model cannot carry it (see `obstacle`).
    """
    layered = installed(model)
    if layered is not None:
        return layered
    reason = obstacle(model, decoder_path)
    if reason:
        raise ModelError("this model cannot treat visual tokens block by block", where=decoder_path, found=reason)
    decoder, merging = model.get_submodule(decoder_path), merger(model, decoder_path)
    assert merging is not None
    layered = Layered(decoder, image_token_id)
    decoder.register_module(SLOT, layered)
    model.register_forward_pre_hook(layered.note_labels, with_kwargs=True)
    layered.generating = generating(model)
    merging.register_forward_pre_hook(layered.begin, with_kwargs=True)
    merging.register_forward_hook(layered.end, always_call=True)
    for block, paths in blocks.items():
        vars(block)[RULE] = Rule(*paths)
        vars(block)["forward"] = MethodType(run_block, block)
        block.register_forward_pre_hook(layered.before, with_kwargs=True)
    return layered


def attached(model: nn.Module) -> bool:
    """Whether the mechanism acts on every block that carries a rule."""
    layered = installed(model)

    def mine(hooks: Mapping[int, Any]) -> bool:
        return any(getattr(hook, "__self__", None) is layered for hook in hooks.values())

    return layered is not None and all(
        mine(block._forward_pre_hooks) and getattr(vars(block).get("forward"), "__func__", None) is run_block
        for block in blocks_of(model).values()
    )
