"""The menu: every pass that svlm ships, by the word that recipes and the command line use.

Strangers' passes join through the entry-point group `svlm.passes` (``name = "package.module:Class"``). Modules are
imported when their pass is asked for, and none of them imports torch at its top level, so that listing costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from ..compress.base import Pass
from ..compress.errors import RecipeError, did_you_mean

MENU = {
    "prune.structured": "prune.structured:Structured",
    "prune.layers": "prune.layers:Layers",
    "prune.vocabulary": "prune.vocabulary:Vocabulary",
    "prune.wanda": "prune.wanda:Wanda",
    "prune.sparsegpt": "prune.sparsegpt:SparseGPT",
    "distill.logits": "distill.logits:Logits",
    "distill.features": "distill.features:Features",
    "distill.blocks": "distill.blocks:Blocks",
    "tokens.dpp": "tokens.dpp:DPP",
    "tokens.random": "tokens.random:Random",
    "tokens.grid": "tokens.grid:Grid",
    "tokens.merge": "tokens.merge:Merge",
    "tokens.resolution": "tokens.resolution:Resolution",
    "fuse.norms": "fuse.norms:Norms",
    "fuse.connector": "fuse.connector:Connector",
    "fuse.prefuse": "fuse.prefuse:Prefuse",
    "tokens.pool": "tokens.pool:Pool",
    "tokens.divprune": "tokens.divprune:DivPrune",
    "tokens.visionzip": "tokens.visionzip:VisionZip",
    "tokens.apet": "tokens.apet:ApET",
    "tokens.fastv": "tokens.fastv:FastV",
    "tokens.pyramid": "tokens.pyramid:Pyramid",
    "fuse.freeze_vision": "fuse.freeze_vision:FreezeVision",
    "fuse.bypass": "fuse.bypass:Bypass",
    "quantize.rtn": "quantize.rtn:RTN",
    "quantize.gptq": "quantize.gptq:GPTQ",
    "quantize.awq": "quantize.awq:AWQ",
    "quantize.round": "quantize.round:Round",
    "quantize.hqq": "quantize.hqq:HQQ",
    "quantize.bnb": "quantize.bnb:BNB",
    "quantize.smooth": "quantize.smooth:Smooth",
    "quantize.static": "quantize.static:Static",
    "quantize.mixed": "quantize.mixed:Mixed",
    "quantize.kv_cache": "quantize.kv_cache:KVCache",
}


def names() -> list[str]:
    """All pass names, those that ship first."""
    return [*MENU, *sorted(e.name for e in entry_points(group="svlm.passes") if e.name not in MENU)]


def find(name: str) -> type[Pass]:
    """The class of pass `name`.

    Raises:
        RecipeError: no pass of that name.
    """
    if name in MENU:
        module, _, attribute = MENU[name].partition(":")
        return getattr(import_module(f".{module}", __package__), attribute)
    for entry in entry_points(group="svlm.passes"):
        if entry.name == name:
            kind = entry.load()
            if not (isinstance(kind, type) and issubclass(kind, Pass)):
                raise RecipeError(
                    f"the entry point '{name}' is not a pass", found=entry.value, change="derive it from svlm.Pass"
                )
            return kind
    raise RecipeError(f"there is no pass '{name}'", change=did_you_mean(name, names()))
