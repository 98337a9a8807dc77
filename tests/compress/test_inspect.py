"""What `svlm inspect` says of models that passes took visual tokens from, and what a plan refuses."""

from __future__ import annotations

from typing import Any

import pytest

from svlm.compress.anatomy import view_of
from svlm.compress.errors import Unmet
from svlm.compress.inspect import inspect_table
from svlm.passes import find
from tests import zoo


@pytest.mark.parametrize(
    "passes, left",
    [
        ([], 16),
        ([("tokens.dpp", {"keep": 0.25})], 4),
        ([("tokens.fastv", {"keep": 0.25, "block": 1})], (16 + 4 + 4) / 3),
        ([("tokens.dpp", {"keep": 0.5}), ("tokens.fastv", {"keep": 0.25, "block": 1})], (8 + 2 + 2) / 3),
        ([("fuse.freeze_vision", {"blocks": [1]})], 16),
        ([("fuse.prefuse", {"tokens": 4})], 4),
    ],
)
def test_visual_tokens_are_those_that_passes_leave(passes: list[tuple[str, dict[str, Any]]], left: float) -> None:
    from tests.passes.distill.test_logits import context

    view, batch = view_of(zoo.model("llava")), zoo.batch("llava")
    for name, settings in passes:
        step, ctx = find(name).from_settings(settings), context(view_of(zoo.model("llava")), [batch])
        step.requires(view, ctx)
        view.ledger.add(step, step.apply(view, ctx).record)
    assert inspect_table(view)["visual_tokens"] == left
    assert view.visual_tokens(batch) == [left] * 2


def test_prefuse_copies_no_more_blocks_than_there_are() -> None:
    from tests.passes.distill.test_logits import context

    view = view_of(zoo.model("llava"))
    step = find("fuse.prefuse").from_settings({"blocks": 4})
    with pytest.raises(Unmet, match="more blocks than there are"):
        step.requires(view, context(view, [zoo.batch("llava")]))
    assert step.brief().settings()["blocks"] == 4 and step.names_blocks  # the rehearsal tries what was asked for


def test_fastv_names_its_controls() -> None:
    fastv = find("tokens.fastv")
    assert not fastv.from_settings({}).controls()
    asked = fastv.from_settings({"keep": 0.25, "against_controls": True}).controls()
    assert asked == tuple((f"tokens.{name}", {"keep": 0.25}) for name in ("random", "grid", "resolution"))
