"""What each block of a decoder does with visual tokens: the rules that passes lay on blocks, and what they mean.

`layered` acts by them.
"""

from __future__ import annotations

from torch import nn

RULE = "visual_tokens_rule"  # name of a block's rule among its attributes


class Rule:
    """What a block does with visual tokens. It lies on the block and moves with it.

    Attributes:
        q, v: paths in the block of the projections of queries and values (None where they are fused with others).
        attention: path in the block of its attention module.
        frozen: visual tokens do not ask; they stay as they are. hidden: nor are they attended to.
        ranks: the attention that the prompt's last token pays to visual tokens here ranks them.
        keep: from this block on, the share of each image's tokens that is left; None: as many as before.
    """

    def __init__(self, attention: str, q: str | None, v: str | None) -> None:
        self.attention, self.q, self.v = attention, q, v
        self.frozen = self.hidden = self.ranks = False
        self.keep: float | None = None

    @property
    def plain(self) -> bool:
        return not (self.frozen or self.hidden or self.ranks or self.keep is not None)


def rule_of(block: nn.Module) -> Rule:
    """The rule that lies on a block."""
    return vars(block)[RULE]


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> block, of those that carry a rule, in order."""
    return {name: module for name, module in model.named_modules() if RULE in vars(module)}


def split_blocks(model: nn.Module) -> set[str]:
    """Paths of the blocks in which keys and values are computed for more tokens than queries are."""
    return {path for path, block in blocks_of(model).items() if rule_of(block).frozen and not rule_of(block).hidden}


def held_shares(model: nn.Module) -> list[float] | None:
    """For each block the share of an image's tokens that is held; None where no block carries a rule."""
    shares, left = [], 1.0
    for block in blocks_of(model).values():
        rule = rule_of(block)
        left = left if rule.keep is None else rule.keep
        shares.append(0.0 if rule.hidden else left)
    return shares or None


def wants_labels(model: nn.Module) -> bool:
    """Whether some block ranks visual tokens by the prompt, so that the model has to know where the answer begins."""
    return any(rule_of(block).ranks for block in blocks_of(model).values())


def read_again(model: nn.Module) -> set[str]:
    """Paths of the blocks whose outputs later blocks' choice of tokens depends on: those before a block that ranks."""
    paths = list(blocks_of(model))
    ranking = [number for number, block in enumerate(blocks_of(model).values()) if rule_of(block).ranks]
    return {paths[number - 1] for number in ranking if number}


def pinned(model: nn.Module) -> dict[str, str]:
    """Path of each block that cannot be taken out of the model any more -> why."""
    rules = [(path, rule_of(block)) for path, block in blocks_of(model).items()]
    return {path: "it ranks or drops visual tokens" for path, rule in rules if rule.ranks or rule.keep is not None}
