"""The gradient ratio of visual to answer tokens: against a naive loop with autograd, in all families, across a kill."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from svlm.calib import balance
from svlm.calib.balance import Balance, lifted, measure, pieces
from svlm.calib.stats import Hessian
from svlm.calib.walk import Walk
from svlm.compress.anatomy import LinearRef, ModelView, view_of
from svlm.compress.base import Context
from svlm.compress.errors import Unmet, WorkFailed
from svlm.passes.tokens.grid import Grid
from tests import zoo
from tests.oracles import balance as oracle
from tests.passes.tokens.helpers import reduced

everywhere = pytest.mark.parametrize("family", zoo.FAMILIES)
NO_PROMPT = ("trocr", "donut")  # the decoder attends to image features; no sequence holds both
ENCODERS = ("blip-2-t5", "florence-2")


def batches(family: str) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(family, samples=2, seed=0), zoo.batch(family, samples=3, seed=1)]


def double(family: str) -> ModelView:
    return view_of(zoo.model(family).double())


def exact(data: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in data]


def outputs(view: ModelView) -> list[tuple[str, LinearRef]]:
    """Where gradients are looked at, and whose ratio each gives."""
    roles = {"attn.o": "attn", "mlp.down": "mlp", "cross.v": "cross"}
    refs = [ref for unit in view.parts["language"] for ref in unit.linears if ref.role in roles]
    return [(roles[ref.role], ref) for ref in refs]


def of_both(view: ModelView, ref: LinearRef) -> bool:
    """Whether the linear's rows are visual and text tokens of one sequence."""
    tokens = ref.unit.cross if ref.role == "cross.v" else ref.unit.tokens
    return tokens == ("prompt" if view.family.seq2seq else "sequence")


@everywhere
def test_means_are_those_of_the_naive_loop(family: str) -> None:
    view, data = double(family), exact(batches(family))
    wanted: dict[str, dict[str, oracle.Means]] = {}
    chosen = [(kind, ref) for kind, ref in outputs(view) if of_both(view, ref) and family not in NO_PROMPT]
    for batch in data if chosen else []:
        words = oracle.kinds(batch, {zoo.IMAGE, zoo.VIDEO}, view.family.seq2seq)
        found = oracle.output_gradients(view.model, batch, [ref.path for _, ref in chosen], view.family.seq2seq)
        for kind, ref in chosen:
            wanted.setdefault(kind, {}).setdefault(ref.unit.name, oracle.Means()).add(found[ref.path], words)
    measured = measure(view, data, samples=5)
    assert measured.samples == (0 if family in NO_PROMPT else 5)
    assert {kind: list(units) for kind, units in measured.gradients.items()} == {
        kind: list(units) for kind, units in wanted.items()
    }
    for kind, units in measured.gradients.items():
        for name, means in units.items():
            for tokens in ("vision", "text", "answer"):
                value, naive = getattr(means, tokens), wanted[kind][name][tokens]
                assert (value is None) == (naive is None)
                assert value is None or value == pytest.approx(naive, rel=1e-8, abs=1e-15), name
        ratios = [means.ratio() for means in wanted[kind].values()]
        assert list(measured.ratios[kind].values()) == pytest.approx(oracle.lift(ratios), rel=1e-8)
        assert max(ratios) > 0
    if family in NO_PROMPT:
        assert measured.ratios == {} and measured.median is None
    elif family in ENCODERS:
        assert set(measured.gradients) == {"attn", "mlp", "cross"}
        assert all(g.answer is None for units in measured.gradients.values() for g in units.values())
    else:
        last = list(measured.gradients["mlp"])[-1]
        assert measured.gradients["mlp"][last].ratio == 0, "the last block's visual tokens reach no answer"
        assert measured.ratios["mlp"][last] > 0, "lifted to the median"


@everywhere
def test_the_model_is_left_as_it_was(family: str) -> None:
    view, data = view_of(zoo.model(family)), batches(family)
    view.model.train()
    flags = []
    for number, parameter in enumerate(view.model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        flags.append(parameter.requires_grad)
    with torch.no_grad():
        view.model(**data[0])  # transformers adds hooks of its own at the first forward
    state = {name: tensor.clone() for name, tensor in view.model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in view.model.modules()]
    first, again = measure(view, data), measure(view, data)
    assert first == again, "the same bits every time"
    assert [p.requires_grad for p in view.model.parameters()] == flags and view.model.training
    assert all(p.grad is None for p in view.model.parameters()), "no gradient of a parameter"
    assert all(torch.equal(state[name], tensor) for name, tensor in view.model.state_dict().items())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in view.model.modules()]
    assert not any("forward" in module.__dict__ for module in view.model.modules())


def test_no_activation_is_kept_but_the_inputs_of_blocks() -> None:
    view, batch = view_of(zoo.model("llava")), zoo.batch("llava", samples=2)
    wide = (2, batch["input_ids"].shape[1], 48)  # the MLP's inner width
    alive: list[int] = []
    most = 0

    def watch(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        if tuple(tensor.shape) == wide:
            alive.append(1)
            most = max(most, len(alive))
        return tensor

    def free(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) == wide:
            alive.pop()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(watch, free):
        whole = view.model(**batch, use_cache=False)
        whole.loss.backward()
    everything, most = most, 0
    alive.clear()
    with torch.autograd.graph.saved_tensors_hooks(watch, free):
        measure(view, [batch])
    assert everything >= 9 and most == 0, "checkpointed: nothing inside a block is saved in the forward pass"


@pytest.mark.parametrize(("family", "size"), [("llava", 1), ("idefics3", 1), ("qwen2-vl", 4), ("florence-2", 1)])
def test_batches_are_taken_apart_where_that_is_certain(family: str, size: int) -> None:
    """Qwen's patches are not a row a sample: such a batch stays whole. The result is the same."""
    view, data = double(family), exact([zoo.batch(family, samples=4)])
    parts = list(pieces(view, data[0], 1))
    assert [len(part["labels"]) for part in parts] == [size] * (4 // size)
    assert torch.equal(torch.cat([part["labels"] for part in parts]), data[0]["labels"])
    apart, whole = measure(view, data, piece=1), measure(view, data, piece=100)
    for kind, units in whole.gradients.items():
        for name, means in units.items():
            found = apart.gradients[kind][name]
            for tokens in ("vision", "text"):
                assert getattr(found, tokens) == pytest.approx(getattr(means, tokens), rel=1e-7, abs=1e-15)
    text = {"input_ids": data[0]["labels"], "labels": data[0]["labels"]}
    assert len(list(pieces(view, text, 1))) == 1, "a sample without image: pixels may be anybody's"


def test_only_as_many_samples_as_wanted_and_only_such_with_images() -> None:
    view = view_of(zoo.model("llava"))
    text = zoo.text_batch(0, 2, torch.Generator().manual_seed(3))
    data = [text, zoo.batch("llava", samples=3, seed=1), zoo.batch("llava", samples=3, seed=2)]
    assert measure(view, data, samples=3) == measure(view, data[1:2], samples=9)
    assert measure(view, data).samples == 6
    assert measure(view, data, samples=2, piece=1).samples == 2


def test_after_a_token_pass_the_tokens_that_are_left_count() -> None:
    view, batch = reduced(zoo.model("llava").double(), Grid(keep=0.25)), exact([zoo.batch("llava", samples=3)])[0]
    paths = [ref.path for _, ref in outputs(view)]
    found = oracle.output_gradients(view.model, batch, paths, seq2seq=False)
    layer = next(m for m in view.model.modules() if type(m).__name__ == "Reduction")
    places, valid = layer.last
    words = oracle.kinds(batch, {zoo.IMAGE}, seq2seq=False)
    left = [
        [row[place] if real else "padding" for place, real in zip(*pair, strict=True)]
        for row, pair in zip(words, zip(places.tolist(), valid.tolist(), strict=True), strict=True)
    ]
    assert sum(row.count("vision") for row in left) == 12
    measured = measure(view, [batch])
    for kind, ref in outputs(view):
        wanted = oracle.Means()
        wanted.add(found[ref.path], left)
        means = measured.gradients[kind][ref.unit.name]
        for tokens in ("vision", "text", "answer"):
            assert getattr(means, tokens) == pytest.approx(wanted[tokens], rel=1e-8)


# ------------------------------------------------------------------------------------------------------------- weights


class Weights:
    """A statistic that keeps the weights as they come."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        self.weights.append(weights)


def used(view: ModelView, ref: LinearRef, weights: list[torch.Tensor], data: list[Any]) -> tuple[float, float]:
    """The weight of a visual and of a text token, each the same in all batches; padding weighs nothing."""
    kind = ref.unit.cross if ref.role in ("cross.k", "cross.v") else ref.unit.tokens
    masks = [view.token_masks(batch, kind) for batch in data]
    every = torch.cat(weights)  # several batches may come together
    visual, text, padding = (torch.cat([getattr(m, k).flatten() for m in masks]) for k in ("vision", "text", "padding"))
    assert not every[padding].any()
    visual, text = every[visual], every[text]
    assert text.unique().numel() == 1 and visual.unique().numel() <= 1
    mean = float(torch.cat([visual, text]).mean())
    assert mean == pytest.approx(1, rel=1e-5)
    return (float(visual[0]) if len(visual) else float("nan")), float(text[0])


@everywhere
def test_each_linear_is_given_the_ratio_of_its_part_of_the_block(family: str) -> None:
    view, data = view_of(zoo.model(family)), batches(family)
    measured = measure(view, data)
    parts = [part for part, units in view.parts.items() if any(unit.linears for unit in units)]
    seen = set()
    for unit in Walk(view, data, parts):
        for ref, stat in unit.observe(Weights, token_weights="gradient").items():
            kind = ref.unit.cross if ref.role in ("cross.k", "cross.v") else ref.unit.tokens
            if kind == "image":
                assert all(bool((w == 1).all()) for w in stat.weights), "vision tower and connector: all alike"
                continue
            visual, text = used(view, ref, stat.weights, data)
            if not any(bool(view.token_masks(batch, kind).vision.any()) for batch in data):
                assert text == pytest.approx(1)
                continue
            part = ref.role.split(".")[0]
            seen.add(part)
            wanted = measured.ratios.get(part, {}).get(unit.name, measured.median)
            assert visual / text == pytest.approx(wanted, rel=1e-5), ref.path
    if family not in NO_PROMPT:
        assert {"attn", "mlp"} <= seen
        ratios = measured.ratios
        block = next(name for name in ratios["attn"] if name in ratios["mlp"])
        assert ratios["attn"][block] != ratios["mlp"][block], "a test that could not tell them apart"


def test_the_lift() -> None:
    assert lifted({"a": 0.1, "b": 0.4, "c": 0.2}) == {"a": 0.2, "b": 0.4, "c": 0.2}
    assert lifted({"a": None, "b": 0.4, "c": 0.2, "d": 0.0}) == {"a": 0.2, "b": 0.4, "c": 0.2, "d": 0.2}


def test_what_the_notes_say() -> None:
    view, data = view_of(zoo.model("llava")), batches("llava")
    walk = Walk(view, data, "language")
    assert walk.weights_used("gradient") is None
    assert (walk.weights_used("uniform"), walk.weights_used("text")) == (1.0, 0.0)
    visual, text = (sum(int(getattr(view.token_masks(b), k).sum()) for b in data) for k in ("vision", "text"))
    assert walk.weights_used("balanced") == pytest.approx(text / visual)
    next(iter(walk)).observe(Hessian, token_weights="gradient")
    numbers, measured = walk.weights_used("gradient"), measure(view, data)
    assert numbers["samples"] == 5 and set(numbers) == {"samples", "attn", "mlp"}
    for kind in ("attn", "mlp"):
        values = sorted(measured.ratios[kind].values())
        assert [numbers[kind][key] for key in ("min", "median", "max")] == [values[0], values[1], values[2]]
        lifts = sum(measured.ratios[kind][n] != g.ratio for n, g in measured.gradients[kind].items())
        assert numbers[kind]["lifted"] == lifts >= 1 and numbers[kind]["without_ratio"] == 0
        assert 0 < numbers[kind]["text"] != 1


def test_images_alone_need_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured for nothing")

    monkeypatch.setattr(balance, "measure", never)
    view, data = view_of(zoo.model("llava")), batches("llava")
    walk = Walk(view, data, ["vision", "connector"])
    for unit in walk:
        unit.observe(Hessian, token_weights="gradient")
    assert walk.weights_used("gradient") is None


def test_without_images_all_tokens_count_the_same() -> None:
    view = view_of(zoo.model("llava"))
    data = [zoo.text_batch(0, 2, torch.Generator().manual_seed(3))]
    unit = next(iter(Walk(view, data, "language")))
    (stat, *_) = unit.observe(Weights, token_weights="gradient").values()
    assert torch.equal(stat.weights[0], data[0]["attention_mask"].flatten().float())


def test_without_any_gradient_both_kinds_weigh_half_and_the_notes_say_so() -> None:
    view, data = view_of(zoo.model("llava")), batches("llava")
    view.model.lm_head.weight.data.zero_()  # every answer is as likely as any other, whatever the blocks do
    walk = Walk(view, data, "language")
    unit = next(iter(walk))
    (stat, *_) = unit.observe(Weights, token_weights="gradient").values()
    (same, *_) = unit.observe(Weights, token_weights="balanced").values()
    assert all(torch.equal(a, b) for a, b in zip(stat.weights, same.weights, strict=True))
    for kind in ("attn", "mlp"):
        assert walk.weights_used("gradient")[kind] == {"fallback": "balanced", "text": None, "without_ratio": 3}


def test_what_cannot_be_measured_is_refused() -> None:
    view, data = view_of(zoo.model("llava")), batches("llava")
    bare: list[Mapping[str, Any]] = [{k: v for k, v in batch.items() if k != "labels"} for batch in data]
    with pytest.raises(Unmet, match="needs the answers"):
        measure(view, bare)
    view.model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(WorkFailed, match="not finite"):
        measure(view, data)
    assert not any("forward" in module.__dict__ for module in view.model.modules())


# -------------------------------------------------------------------------------------------- once, and across a kill


def test_the_ratios_are_those_of_the_model_at_the_start() -> None:
    view, data = view_of(zoo.model("llava")), batches("llava")
    wanted = measure(view, data)
    walk = Walk(view, data, ["vision", "connector", "language"])
    for unit in walk:
        unit.observe(Hessian, token_weights="gradient")
        assert walk.balance.known() == wanted, "measured at the first unit, though it holds image patches alone"
        with torch.no_grad():
            for ref in unit.linears:
                ref.module.weight.mul_(0.8)
    assert measure(view, data) != wanted, "the model did change"


def test_the_walks_of_a_pass_share_them(tmp_path: Path) -> None:
    view, data = view_of(zoo.model("llava")), batches("llava")
    shared = Balance(view, data)
    for options in ({"balance": shared}, {"scratch": tmp_path}):
        found = []
        for name in ("first", "second"):
            walk = Walk(view, data, "language", name=name, **options)  # type: ignore[arg-type]
            next(iter(walk)).observe(Hessian, token_weights="gradient")
            found.append(walk.balance.known())
            with torch.no_grad():
                view.model.lm_head.weight.mul_(1.5)
        assert found[0] == found[1]
    other = Balance(view, data[:1], tmp_path)
    assert other.known() is None, "other data, other ratios"


def test_a_killed_pass_resumes_with_the_ratios_of_the_untouched_model(tmp_path: Path) -> None:
    from svlm.passes.quantize.gptq import GPTQ

    data = batches("llava")
    step = GPTQ(bits=2, group=8)

    def run(folder: Path | None, stop: int | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
        view = view_of(zoo.model("llava"))

        def walk(where: Any, **options: Any) -> Any:
            made = Walk(view, data, where, scratch=folder, **options)
            return made if stop is None else _Stops(made, stop)

        notes = None
        with suppress(KeyboardInterrupt):
            notes = step.apply(view, Context(data, walk, lambda: nullcontext()))
        return notes, {ref.path: ref.module.weight.detach().clone() for ref in view.linears()}

    wanted, weights = run(None)
    run(tmp_path, stop=4)  # vision tower and connector are done
    assert (tmp_path / "balance.json").is_file()
    notes, again = run(tmp_path)
    assert notes == wanted and all(torch.equal(again[path], weight) for path, weight in weights.items())
    run(tmp_path / "other", stop=4)
    (tmp_path / "other" / "balance.json").unlink()
    notes, _ = run(tmp_path / "other")
    assert notes.numbers["visual_token_weight"] != wanted.numbers["visual_token_weight"], "what the file prevents"


class _Stops:
    """A walk that is interrupted before its unit number `stop`."""

    def __init__(self, walk: Walk, stop: int) -> None:
        self.walk, self.stop = walk, stop

    def __iter__(self) -> Any:
        for number, unit in enumerate(self.walk):
            if number == self.stop:
                raise KeyboardInterrupt
            yield unit


# ------------------------------------------------------------------------------------------------ what is known already


@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2.5-vl"])
def test_what_a_walk_has_finished_is_not_computed_again(family: str) -> None:
    view, data = view_of(zoo.model(family)), batches(family)
    wanted, ran = measure(view, data, piece=1), []
    first = next(unit for unit in view.units if unit.part == "vision" and unit.stack is not None)
    with first.module.register_forward_hook(lambda *_: ran.append(1)):
        walk = Walk(view, data, "language")
        next(iter(walk))
        assert ran, "the walk itself looks at the images"
        ran.clear()
        found = measure(view, data, piece=1, finished=walk._finished)
        assert not ran
    assert found.samples == wanted.samples
    for kind, ratios in wanted.ratios.items():
        assert found.ratios[kind] == pytest.approx(ratios, rel=1e-4)
