"""Attribution on the demo model: planted causes are named, shares are what measuring by hand gives, nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import svlm
from svlm.calib import attribution
from svlm.calib.attribution import _remarks, _Trial, _verdict, attribute
from svlm.calib.dataset import CalibrationSet
from svlm.calib.metrics.paired import compared
from svlm.calib.workbench import Workbench
from svlm.compress.anatomy import ModelView
from svlm.compress.errors import UsageError
from svlm.compress.report.attribution import block_cells, part_cells, print_attribution
from svlm.passes import api

QUESTIONS = 8
LITTLE = 0.01


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(svlm.load_view("demo"), CalibrationSet.load("demo", fit=2, check=QUESTIONS), latency=False)


def noised(view: ModelView, where: str, amount: float, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for ref in view.linears(where):
            weight = ref.module.weight
            weight += torch.randn(weight.shape, generator=g) * weight.std() * amount


@pytest.fixture(scope="module")
def damaged() -> ModelView:
    """A little lost in the vision tower and the connector, much in one block of the language model."""
    view = svlm.load_view("demo")
    noised(view, "vision", LITTLE)
    noised(view, "connector", LITTLE)
    with torch.no_grad():
        for ref in view.linears("language.blocks[1]"):
            ref.module.weight.zero_()
    return view


@pytest.fixture(scope="module")
def found(bench: Workbench, damaged: ModelView) -> dict[str, Any]:
    before = {name: tensor.clone() for name, tensor in damaged.model.state_dict().items()}
    made = attribute(bench, damaged)
    after = damaged.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items())
    return made


def row(found: dict[str, Any], part: str) -> dict[str, Any]:
    return next(row for row in found["parts"] if part in row["parts"])


def test_a_zeroed_block_and_its_part_are_named(found: dict[str, Any]) -> None:
    assert found["named"] == "language" and found["named_block"] == "language.blocks[1]"
    assert found["says"][0].startswith("most of it was lost in the language model: restoring it brings back ")
    assert "language.blocks[1]" in found["says"][1]
    assert found["questions"] == QUESTIONS and found["images"] == 2
    assert any("2 pictures are few" in sentence for sentence in found["says"])
    assert row(found, "head")["unchanged"] and "restored" not in row(found, "head")
    assert [b["block"] for b in found["blocks"]["language"] if b.get("unchanged")] == [
        f"language.blocks[{i}]" for i in (0, 2, 3)
    ]
    json.dumps(found)


def test_what_comes_back_is_what_measuring_by_hand_gives(bench: Workbench, damaged: ModelView, found: Any) -> None:
    """The original with the damaged vision tower and connector is the small model with its language model restored."""
    by_hand = svlm.load_view("demo")
    noised(by_hand, "vision", LITTLE)
    noised(by_hand, "connector", LITTLE)
    quality, items = bench.measure(by_hand)
    restored = row(found, "language")["restored"]
    _, before = bench.measure(damaged)
    assert restored["kl"] == pytest.approx(quality["kl"], rel=1e-6)
    assert restored["share"] == pytest.approx(1 - quality["kl"] / found["loss"]["kl"], rel=1e-6)
    assert restored["exact_match"] == {"value": quality["exact_match"]["value"]} | compared(before, items)
    low, high = restored["ci95"]
    assert low <= restored["share"] <= high <= 1


def test_what_a_part_costs_alone(bench: Workbench, found: dict[str, Any]) -> None:
    alone = svlm.load_view("demo")
    noised(alone, "vision", LITTLE)
    quality, _ = bench.measure(alone)
    vision = row(found, "vision")["alone"]
    assert vision["kl"] == pytest.approx(quality["kl"], rel=1e-5)
    assert vision["exact_match"]["delta"] == quality["exact_match"]["delta"]


def test_the_tower_runs_once_for_each_of_its_states(bench: Workbench, damaged: ModelView, monkeypatch: Any) -> None:
    judge = bench.speaking(damaged).judge
    whole = judge.measure(damaged)
    trial = _Trial(judge, damaged, whole.items)
    runs = []
    handle = damaged.parts["vision"][0].module.register_forward_hook(lambda *_: runs.append(1))
    first, second = (trial.measure(("language",)) for _ in range(2))
    assert first == second and len(runs) == 4, "one by one, packed, for blank pictures, for the answers"
    trial.measure(("connector",))
    assert len(runs) == 4
    monkeypatch.setattr(attribution, "FEATURE_BYTES", 0)
    trial.features.kept.clear()
    assert trial.measure(("language",)) == first and len(runs) == 4 + 5  # packed for the trial and for the scores
    handle.remove()
    assert "forward" not in vars(damaged.tower)


def test_a_part_that_does_not_run_is_said_not_raised(bench: Workbench, damaged: ModelView) -> None:
    judge = bench.speaking(damaged).judge
    trial = _Trial(judge, damaged, judge.measure(damaged).items)
    unit = damaged.parts["language"][0]
    why = trial.measure((), [(unit, bench.original.parts["connector"][0])])
    assert isinstance(why, str) and why.startswith("the model does not run so: ")
    assert judge.measure(damaged).items == trial.items


def test_the_original_itself_lost_nothing(bench: Workbench) -> None:
    made = attribute(bench, svlm.load_view("demo"), questions=4)
    assert made["questions"] == 4 and made["images"] == 1
    assert made["named"] is None and made["loss"]["kl"] == 0
    assert made["says"][0].startswith("nothing was lost") and all(row["unchanged"] for row in made["parts"])


@pytest.mark.parametrize(
    ("name", "settings", "named", "remark"),
    [
        ("tokens.resolution", {"keep": 0.3}, "pictures + vision + connector", "tables of positions"),
        pytest.param("tokens.grid", {"keep": 0.2}, "tokens", "", marks=pytest.mark.slow),
        pytest.param("fuse.prefuse", {}, "tokens", "", marks=pytest.mark.slow),
        pytest.param("prune.layers", {"criterion": "random"}, "language", "", marks=pytest.mark.slow),
    ],
)
def test_what_is_no_weight_is_a_part_too(
    bench: Workbench, name: str, settings: dict[str, Any], named: str, remark: str
) -> None:
    view = svlm.load_view("demo")
    svlm.apply_pass(svlm.find(name).from_settings(settings), view, bench.context(view))
    made = attribute(bench, view)
    changed = [row["part"] for row in made["parts"] if not row["unchanged"]]
    assert made["named"] == named and changed == [named]
    assert row(made, named.split(" + ")[0])["restored"]["kl"] == 0
    assert made["says"][0].startswith("all of it was lost in")
    assert remark in " ".join(made["says"])


def trial(losses: list[float]) -> _Trial:
    made = object.__new__(_Trial)
    made.whole, made.images = losses, [str(i) for i in range(len(losses))]
    return made


def parts_row(part: str, sums: list[float], whole: list[float]) -> dict[str, Any]:
    share = sum(sums) / sum(whole)
    match = {"delta": 0.25, "ci95": [0.125, 0.5]}
    facts = {"share": share, "kl": 1.0, "ci95": [0.0, 1.0], "sums": sums, "exact_match": match}
    return {"part": part, "parts": [part], "restored": facts}


def test_no_single_part_where_none_brings_back_most_or_two_bring_back_as_much() -> None:
    whole = [1.0 + i % 3 for i in range(30)]

    def verdict(*shares: float) -> str | None:
        wave = [0.05 * (-1) ** i for i in range(30)]
        rows = [
            parts_row(part, [w * (share + x) for w, x in zip(whole, wave if i else wave[::-1])], whole)
            for i, (part, share) in enumerate(zip(("vision", "connector", "language"), shares))
        ]
        named, (sentence,) = _verdict(rows, trial(whole))
        assert sentence.startswith("most of it was lost" if named else "no single part")
        assert sentence.endswith("+25.0 points [+12.5, +50.0] of exact match") is (named is not None)
        return named

    assert verdict(0.9, 0.1, 0.1) == "vision"
    assert verdict(0.2, 0.1, 0.7) == "language"
    assert verdict(0.4, 0.3, 0.3) is None
    assert verdict(0.8, 0.1, 0.8) is None


def test_parts_that_do_not_add_up_are_said_to(bench: Workbench) -> None:
    def said(restored: float, alone: float, width: float) -> bool:
        sums = {
            name: {"share": share, "ci95": [share - width, share + width]}
            for name, share in (("restored", restored), ("alone", alone))
        }
        remarks = _remarks([], sums, bench.original, bench.original, {"n_images": 40})
        assert all("do not add up" in remark for remark in remarks)
        return bool(remarks)

    assert said(0.3, 1.7, LITTLE) and said(1.0, 0.6, LITTLE)
    assert not said(0.95, 1.05, 0.01), "small differences are nothing to speak of"
    assert not said(0.7, 1.0, 0.4), "nor are those that chance explains"


def test_tables(found: dict[str, Any], capsys: Any) -> None:
    titles, cells = part_cells(found)
    assert [row[0] for row in cells] == [row["part"] for row in found["parts"]]
    assert all(len(row) == len(titles) for row in cells)
    _, blocks = block_cells(found["blocks"]["language"])
    assert blocks[1][0] == "language.blocks[1]" and "%" in blocks[1][2]
    print_attribution(found)
    text = capsys.readouterr().out
    assert "most of it was lost in the language model" in text and "as in the original" in text


def test_an_analysis_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no analysis 'atribution'"):
        api.verify(tmp_path, "demo", "demo", analyses=("atribution",))
