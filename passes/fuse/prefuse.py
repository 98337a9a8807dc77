"""fuse.prefuse: text meets the picture in blocks of its own; the decoder sees a few tokens of each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ...compress.base import Context, Json, Notes, Pass
from ...compress.errors import PromiseBroken, Unmet

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView
    from ...compress.runtime.images import Choice, Images

MOST = 64  # tokens an image, where the ladder ends


@dataclass(frozen=True)
class Prefuse(Pass):
    """A few tokens an image for the decoder; what text wants to know of all others it reads before (LLaVA-Mini).

    Before the decoder, copies of its first blocks run once over all visual tokens and the prompt; what they add to a
    token, brought to the token's size, counts by a gate for each channel. Then cross-attention of `tokens` queries over
    each image's tokens gives those that stay; it starts as `tokens.pool`. The decoder's sequence, its prefill and its
    cache are those of `tokens` an image: FLOPs fall, while the copied blocks and the compressor add parameters, which
    the report shows with the connector's. Without training this is about what pooling is; `distill.logits` after it
    is what the pass is for, with ``train: full`` (``where: "prefusion.*"`` trains what is new alone).

    As in the paper, answers are not fused: neither in training and scoring, where labels mark them, nor in generation,
    with a cache or without. So a prompt is fused as a whole, earlier turns of a conversation included. The blocks keep
    no cache: where a later turn goes on with the cache of the one before, only text that comes with a new image is
    fused, together with that image. Who decodes step by step without `generate` and without a cache marks the answer
    by labels. Unlike in the paper, positions and order are the original's, text before an image stays before it, the
    tokens of an image are made from what the blocks have made of it, and a gate mixes what is fused with what was
    there, so that a trained decoder knows its input from the start.

    The new parts are units of the connector: `connector.fuse0`, ..., `connector.compress`; quantizing passes take them
    with it. Prune before this pass: no config says the shapes after it. `svlm.load` rebuilds the model; stock loaders
    see the decoder alone, with all visual tokens.

    Settings:
        tokens: of each image for the decoder, at least 1; an image with fewer keeps its own.
        blocks: copied, the first of the language model; at least 1.
        gate: at the start, how much of what these blocks add goes into text, as a share of each token's size; 0 starts
            as `tokens.pool`, exactly. Visual tokens start with 0.
        seed: of the queries' start.
    """

    name: ClassVar[str] = "fuse.prefuse"
    summary: ClassVar[str] = "few visual tokens for the decoder; text reads all of them in blocks before it (to distil)"
    paper: ClassVar[str] = "LLaVA-Mini, arXiv 2501.03895"
    names_blocks: ClassVar[bool] = True

    tokens: int = 4
    blocks: int = 1
    gate: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if not 0 <= self.gate <= 1:
            raise ValueError(f"gate is in [0, 1], not {self.gate}")

    def requires(self, model: ModelView, ctx: Context) -> None:
        from ...compress.runtime.reduce import obstacle

        if model.image_token_id is None:
            reason = "its language model sees the image through cross-attention, not as tokens of its sequence"
        else:
            reason = obstacle(model.model, model.decoder_path) or _misplaced(model)
        if reason:
            raise Unmet(
                f"{self.name} cannot put blocks in front of this decoder",
                where=f"family {model.family.name}",
                found=reason,
                change="leave the pass out for this model",
            )
        blocks = _decoder_blocks(model)
        if len(blocks) < self.blocks:
            raise Unmet(
                f"{self.name} copies more blocks than there are",
                where=f"blocks: {self.blocks}",
                found=f"{len(blocks)} blocks",
                change=f"blocks: 1 to {len(blocks)}",
            )
        gridded = [ref.path for unit in blocks for ref in unit.linears if ref.path in model.grids]
        if gridded:
            raise Unmet(
                f"{self.name} copies blocks that are to be trained",
                where=gridded[0],
                found="weights on a grid",
                change="put the quantizing pass after this one",
            )

    def apply(self, model: ModelView, ctx: Context) -> Notes:
        from ...compress.runtime.hooks import layer_types
        from ...compress.runtime.reduce import installed
        from ..tokens._reduce import image_sizes

        before = sum(p.numel() for p in model.model.parameters())
        record: dict[str, Json] = {"kinds": layer_types(model.decoder)[: self.blocks]}
        self.rebuild(model, record)
        reduction = installed(model.model)
        assert reduction is not None
        counts = sorted({tokens for batch in ctx.fit for tokens in image_sizes(model, batch)})
        kept = [reduction.kept(tokens) for tokens in counts]
        numbers: dict[str, Json] = {
            "tokens_per_image": counts,
            "kept_per_image": kept,
            "parameters_before": before,
            "parameters": sum(p.numel() for p in model.model.parameters()),
        }
        return Notes(numbers, record | {"kept_per_image": kept[0] if len(set(kept)) == 1 else None})

    def rebuild(self, model: ModelView, record: Mapping[str, Json]) -> None:
        """The same modules; their weights are copies, or what the checkpoint has."""
        import torch

        from ...compress.runtime.prefusion import SLOT, Prefusion, QueryCompressor
        from ...compress.runtime.reduce import Reduction, install

        own = [unit.module for unit in _decoder_blocks(model)]
        blocks = [_bare(own[min(i, len(own) - 1)]) for i in range(self.blocks)]
        width = model.model.get_input_embeddings().weight.shape[1]
        start = torch.Generator().manual_seed(self.seed)
        layers, norm = _names(model)
        fusion = Prefusion(blocks, QueryCompressor(self.tokens, width, self.gate, start), layers, norm, record["kinds"])
        if model.image_token_id is None:
            raise Unmet(f"{self.name}: this model has no image token", where=f"family {model.family.name}")
        reduction = Reduction(
            choose,
            1.0,
            model.image_token_id,
            self._label(),
            per_image=model.per_image() or 0,
            count=self.tokens,
            rewrite=fusion.forward,
        )
        install(model.model, model.decoder_path, reduction)
        model.model.add_module(SLOT, fusion.to(model.model.device).eval())
        model.refresh()

    def ensures(self, model: ModelView) -> None:
        from ...compress.runtime.hooks import owner
        from ...compress.runtime.prefusion import SLOT, Prefusion
        from ...compress.runtime.reduce import installed

        reduction = installed(model.model)
        fusion = model.model._modules.get(SLOT)
        if reduction is None or reduction.label != self._label():
            found = "no reduction on the model" if reduction is None else f"another one: {reduction.label}"
        elif not reduction.attached_to(model.model, model.decoder_path):
            found = "its hooks on the decoder are gone"
        elif not isinstance(fusion, Prefusion) or owner(reduction.rewrite) is not fusion:
            found = "its blocks are gone"
        elif len(fusion.blocks) != self.blocks:
            found = f"{len(fusion.blocks)} blocks before the decoder, not {self.blocks}"
        else:
            return
        raise PromiseBroken(
            f"{self.name} promised that the language model sees {self.tokens} tokens of an image", found=found
        )

    def weaker(self) -> Self | None:
        """Twice the tokens."""
        return replace(self, tokens=2 * self.tokens) if 2 * self.tokens <= MOST else None

    def _label(self) -> dict[str, Json]:
        return {"pass": self.name, **self.settings()}


def choose(images: Images, k: int) -> Choice:
    """k even cells of each image, and the mean over each, as in `tokens.pool`."""
    from ...compress.runtime.images import Choice
    from ..tokens._merge import cells

    return Choice(*map(images.same, cells(images.shape, k)))


def _decoder_blocks(model: ModelView) -> list[Any]:
    return [unit for unit in model.parts.get("language", ()) if unit.index is not None]


def _names(model: ModelView) -> tuple[str, str]:
    """What the decoder calls its list of blocks and its last norm; ("", "") where they are not its own children."""
    lists = {unit.path.rpartition(".")[0] for unit in _decoder_blocks(model)}
    entries = {unit.entry for unit in model.parts.get("head", ())}
    if len(lists) != 1 or len(entries) != 1:
        return "", ""
    names = [(path or "").rpartition(".") for path in (*lists, *entries)]
    if any(parent != model.decoder_path for parent, _, _ in names):
        return "", ""
    return names[0][2], names[1][2]


def _misplaced(model: ModelView) -> str:
    if _names(model) == ("", ""):
        return "its decoder does not hold one list of blocks and then one last norm"
    return ""


def _bare(block: Any) -> Any:
    """A copy of a block without hooks: a model's hooks are about its own blocks."""
    import copy

    copied = copy.deepcopy(block)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied
