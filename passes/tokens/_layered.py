"""What all passes share that treat visual tokens differently from block to block of the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...compress.base import Json, Pass
from ...compress.errors import PromiseBroken, Unmet

if TYPE_CHECKING:
    from ...compress.anatomy import ModelView, Unit
    from ...compress.runtime.rules import Rule

DROPPED = "visual tokens are dropped inside its decoder already"
FROZEN = "visual tokens are frozen in some of its blocks already"
BYPASSED = "visual tokens bypass its decoder already"


def decoder_blocks(model: ModelView) -> list[Unit]:
    """The decoder's blocks in order."""
    inside = model.decoder_path + "."
    return [u for u in model.parts["language"] if u.index is not None and u.attention and u.path.startswith(inside)]


def check(step: Pass, model: ModelView, *beside: str) -> None:
    """Raise Unmet where `step` cannot put rules on the decoder's blocks.

    Args:
        beside: of DROPPED, FROZEN and BYPASSED those that may be so.
    """
    from ...compress.runtime.layered import obstacle
    from ...compress.runtime.rules import blocks_of, rule_of

    rules = [rule_of(block) for block in blocks_of(model.model).values()]
    states = {
        DROPPED: any(rule.ranks or rule.keep is not None for rule in rules),
        FROZEN: any(rule.frozen for rule in rules) and not any(rule.hidden for rule in rules),
        BYPASSED: any(rule.hidden for rule in rules),
    }
    refused = [state for state, holds in states.items() if holds and state not in beside]
    if model.image_token_id is None:
        reason = "its language model sees the image through cross-attention, not as tokens of its sequence"
    else:
        reason = obstacle(model.model, model.decoder_path) or next(iter(refused), "")
    if reason:
        raise Unmet(
            f"{step.name} cannot treat visual tokens block by block in this model",
            where=f"family {model.family.name}",
            found=reason,
            change="leave one of the two passes out" if refused else "leave the pass out for this model",
        )


def rules_of(model: ModelView) -> dict[str, Rule]:
    """Path of each block of the decoder -> its rule, in order. Puts the mechanism on a model that lacks it."""
    from ...compress.runtime.layered import install
    from ...compress.runtime.rules import rule_of

    units = decoder_blocks(model)

    def inside(unit: Unit, path: str | None) -> str | None:
        return None if path is None else path[len(unit.path) + 1 :]

    paths = {}
    if model.image_token_id is None:
        raise Unmet("this model has no image token", where=f"family {model.family.name}")
    for unit in units:
        assert unit.attention is not None
        module = unit.attention.module[len(unit.path) + 1 :]
        paths[unit.module] = (module, inside(unit, unit.attention.q), inside(unit, unit.attention.v))
    install(model.model, model.decoder_path, model.image_token_id, paths)
    return {unit.path: rule_of(unit.module) for unit in units}


def promised(step: Pass, model: ModelView) -> dict[str, Rule]:
    """The rules of the model's blocks by path. PromiseBroken where the mechanism does not act on all of them."""
    from ...compress.runtime.layered import attached
    from ...compress.runtime.rules import blocks_of, rule_of

    blocks = blocks_of(model.model)
    if not attached(model.model) or blocks.keys() != {unit.path for unit in decoder_blocks(model)}:
        raise PromiseBroken(
            f"{step.name} promised to treat visual tokens block by block",
            found="blocks without its hooks" if blocks else "nothing on the model that does",
        )
    return {path: rule_of(block) for path, block in blocks.items()}


def broken(step: Pass, promise: str, path: str) -> PromiseBroken:
    return PromiseBroken(f"{step.name} promised {promise}", where=path, found="another rule on this block")


def held(model: ModelView) -> Mapping[str, Json]:
    """For the notes: the share of an image's tokens that each block of the decoder holds."""
    from ...compress.runtime.rules import held_shares

    shares = held_shares(model.model) or []
    return {"held_by_block": shares, "held": sum(shares) / max(len(shares), 1)}
