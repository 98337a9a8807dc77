"""Alignment of whole models: every family of the zoo, blocks and tokens that passes took, what damage looks like."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svlm.calib.alignment import INPUT, KINDS, _matched, alignment, collect, questions
from svlm.calib.sample import Sample
from svlm.calib.shown import Shown
from svlm.compress.anatomy import ModelView, view_of
from svlm.compress.base import Context
from svlm.compress.ledger import Ledger
from svlm.compress.pipeline import apply_pass
from svlm.passes import find
from tests import zoo

SAMPLES = 16


def speech(original: ModelView, family: str, seen_by_original: dict[str, torch.Tensor] | None = None) -> Any:
    """As `calib.speech.Speech`, with made-up batches: `samples` are the seeds of batches of two."""

    def encode(seeds: list[int]) -> dict[str, Any]:
        batches = [zoo.batch(family, 2, seed) for seed in seeds]
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        return joined if seen_by_original is None else Shown(joined, joined | seen_by_original)

    return SimpleNamespace(teacher=original, batch_size=4, encode=encode)


def seeds(count: int = SAMPLES // 2) -> Any:
    return list(range(count))


def context(original: ModelView) -> Context:
    batch = zoo.batch("llava")
    return Context([batch], lambda where=None, **options: None, lambda: None)


def applied(name: str, view: ModelView, **settings: Any) -> ModelView:
    apply_pass(find(name)(**settings), view, context(view))
    return view


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_is_wholly_aligned_with_itself_and_less_when_noised(family: str) -> None:
    original = view_of(zoo.model(family))
    same = alignment(view_of(zoo.model(family)), speech(original, family), seeds())
    assert same["skipped"] == {} and same["blocks"]
    compared = [unit.name for unit in original.units if unit.part != "head" and (unit.part != "language" or unit.stack)]
    assert [row["name"] for row in same["blocks"]] == [row["origin"] for row in same["blocks"]] == compared
    for row in same["blocks"]:
        assert row["cka"] == pytest.approx(1.0) and row["text_tokens"] + row["visual_tokens"] > 0, row["name"]
        assert row["mutual_knn"] in (1.0, None)
        assert row["between_knn"] == row["reference_between_knn"]
    worse = view_of(zoo.model(family))
    with torch.no_grad():
        for ref in worse.parts["language"][-1].linears:
            ref.module.weight += torch.randn_like(ref.module.weight) * 2 * ref.module.weight.std()
    noised = alignment(worse, speech(original, family), seeds())
    assert noised["blocks"][-1]["cka"] < 0.97
    first = next(i for i, row in enumerate(noised["blocks"]) if row["part"] == "language")
    before = noised["blocks"][: len(noised["blocks"]) - 1] if original.parts["language"][-1].stack else []
    assert all(row["cka"] == pytest.approx(1.0) for row in before[: first + 1])


def test_blocks_are_compared_with_what_they_were() -> None:
    original = view_of(zoo.model("llava"))
    small = applied("prune.layers", view_of(zoo.model("llava")), where="language.blocks[1]", criterion="random")
    rows = alignment(small, speech(original, "llava"), seeds())["blocks"]
    assert [(r["name"], r["origin"]) for r in rows if r["part"] == "language"] == [
        ("language.blocks[0]", "language.blocks[0]"),
        ("language.blocks[1]", "language.blocks[2]"),
    ]
    assert rows[-2]["cka"] == pytest.approx(1.0) and rows[-1]["cka"] < 1 - 1e-6


def test_blocks_whose_origin_nobody_recorded_are_left_out_and_told() -> None:
    original = view_of(zoo.model("llava"))
    small = applied("prune.layers", view_of(zoo.model("llava")), where="language.blocks[1]", criterion="random")
    small.ledger = Ledger()
    made = alignment(small, speech(original, "llava"), seeds())
    assert set(made["skipped"]) == {"language.blocks[0]", "language.blocks[1]"}
    assert all(row["part"] != "language" for row in made["blocks"])
    assert any("language.blocks[0] is left out" in sentence for sentence in made["says"])


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "paligemma", "gemma3"])
def test_of_fewer_visual_tokens_those_that_stayed_are_compared(family: str) -> None:
    original = view_of(zoo.model(family))
    small = applied("tokens.grid", view_of(zoo.model(family)), keep=0.5)
    batches = [zoo.batch(family, 4, 0), zoo.batch(family, 4, 1)]
    entering = [collect(view, batches, [], 4096, True, True)[INPUT] for view in (small, original)]
    for kind in KINDS:
        mine, theirs = _matched(*entering, kind)
        assert len(mine) and torch.equal(mine, theirs)  # the same tokens: nothing has happened to them yet
        share = 0.5 if kind == "visual" else 1.0
        assert len(mine) == len(entering[0].of(kind)) == share * len(entering[1].of(kind))
    rows = alignment(small, speech(original, family), seeds())["blocks"]
    assert next(row for row in rows if row["part"] == "vision")["cka"] == pytest.approx(1.0)
    assert rows[-1]["cka_text"] < 1 - 1e-6 and rows[-1]["visual_tokens"] > 0


def test_tokens_that_a_block_does_not_work_on_are_not_compared_there() -> None:
    original = view_of(zoo.model("llava"))
    small = applied("fuse.freeze_vision", view_of(zoo.model("llava")), blocks=(1,))
    rows = [row for row in alignment(small, speech(original, "llava"), seeds())["blocks"] if row["part"] == "language"]
    assert [row["visual_tokens"] > 0 for row in rows] == [True, False, True]
    assert rows[1]["mir"] is None and rows[1]["cka_text"] is not None


def test_where_the_original_sees_other_pictures_text_and_means_are_compared() -> None:
    original, same = view_of(zoo.model("llava")), view_of(zoo.model("llava"))
    made = alignment(same, speech(original, "llava", {"pixel_values": torch.randn(8, 3, 16, 16)}), seeds())
    first = next(row for row in made["blocks"] if row["part"] == "language")
    assert first["visual_tokens"] == 0 and first["cka_visual"] is None and first["mutual_knn_visual"] is not None
    texts = zoo.batch("llava", 2)["input_ids"]
    behind = [int(row.tolist()[::-1].index(zoo.IMAGE)) for row in texts]
    assert first["text_tokens"] == sum(behind) * SAMPLES // 2
    assert any("other pictures" in sentence for sentence in made["says"])


def test_a_rate_wants_more_tokens_than_channels_and_says_so() -> None:
    view = view_of(zoo.model("llava"))
    few = alignment(view, speech(view, "llava"), seeds(1))
    assert few["mir"] is None and any("No Modality Integration Rate in 3 of 3" in said for said in few["says"])
    many = alignment(view, speech(view, "llava"), seeds())
    assert many["mir"] == many["reference_mir"] and many["mir"] is not None


def test_the_rows_that_are_kept_are_few_and_the_same_in_both() -> None:
    views = [view_of(zoo.model("llava", seed)) for seed in (0, 1)]
    batches = [zoo.batch("llava", 4, seed) for seed in range(4)]
    unit = [view.parts["language"][-1] for view in views]
    few = [collect(view, batches, [u], 40, True, False)[u.name] for view, u in zip(views, unit)]
    every = collect(views[0], batches, unit[:1], 10**6, True, False)[unit[0].name]
    assert torch.equal(few[0].keys, few[1].keys)
    for kind in KINDS:
        assert 28 <= len(few[0].of(kind)) <= 52
    assert len(every.of("visual")) == 16 * 16
    torch.testing.assert_close(few[0].means["visual"], every.means["visual"])


def test_one_question_a_picture() -> None:
    images = [SimpleNamespace(content=name) for name in "ab"]
    asked = [Sample(str(i), "ab"[i % 2], (images[i % 2],), f"q{i}") for i in range(6)]  # type: ignore[arg-type]
    assert [s.id for s in questions(asked)] == ["0", "1"]
    assert [s.id for s in questions(asked, 1)] == ["0"]
