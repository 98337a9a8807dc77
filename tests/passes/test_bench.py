"""The arithmetic and the sentences of `svlm bench`; needs no openvino."""

from __future__ import annotations

import pytest
import torch

import svlm
from svlm.calib.ask import example_prompt
from svlm.passes.bench import Contestant, compare, lines, one_round, phases, sentences


def row(vision: float, prefill: float, token: float, whole: float, wall: float = 1.0) -> dict:
    cpu = {"vision": vision, "prefill": prefill, "first_token": vision + prefill, "decode_per_token": token}
    cpu["end_to_end"] = whole
    return {"ms": {k: v * wall for k, v in cpu.items()}, "cpu_ms": cpu, "bytes": 100, "peak_rss_bytes": 1000}


def test_phases_are_differences() -> None:
    made = phases((10.0, 9.0), (15.0, 14.0), (77.0, 76.0), 32)
    assert made == {
        "vision": (10.0, 9.0),
        "prefill": (5.0, 5.0),
        "first_token": (15.0, 14.0),
        "decode_per_token": (2.0, 2.0),
        "end_to_end": (77.0, 76.0),
    }


def test_an_answer_of_one_token_says_nothing_of_further_ones() -> None:
    made = phases((10.0, 9.0), (15.0, 14.0), (16.0, 15.0), 1)
    assert made["decode_per_token"] == (0.0, 0.0) and made["end_to_end"] == (16.0, 15.0)


def test_ratios_and_where_it_does_not_pay() -> None:
    made = compare({"against": row(10, 5, 2, 77), "out": row(5, 10, 0.5, 76.9) | {"bytes": 25}})
    assert made["clock"] == "ms"
    wanted = {"vision": 0.5, "prefill": 2.0, "first_token": 1.0, "decode_per_token": 0.25, "end_to_end": 76.9 / 77}
    assert made["ratio"] == pytest.approx(wanted | {"bytes": 0.25, "peak_rss": 1})
    assert made["says"] == [
        "The vision tower is 2.00 times faster than the original.",
        "Compression does not pay for reading the prompt on this machine: 2.00 times the original's time.",
        "Compression makes no difference for the time to the first token on this machine.",
        "Each further token is 4.00 times faster than the original.",
        "Compression makes no difference for a whole answer on this machine.",
    ]
    assert "2.00" in "\n".join(lines(made | {"runtime": "torch"}))


def test_cpu_time_counts_where_others_hold_the_processor() -> None:
    made = compare({"against": row(10, 5, 2, 77, wall=3.0), "out": row(5, 5, 2, 77, wall=1.0)})
    assert made["clock"] == "cpu_ms" and made["ratio"]["vision"] == 0.5
    assert "CPU time" in made["says"][-1]


def test_more_memory_is_said() -> None:
    same = {"vision": None, "prefill": 1, "first_token": 1, "decode_per_token": 1, "end_to_end": 1}
    said = sentences(same | {"peak_rss": 1.5}, False)
    assert said[-1].startswith("Loading and answering takes more memory")


def test_one_answer_gives_every_phase() -> None:
    view = svlm.load_view("demo")
    counted: list[torch.Tensor] = []

    def generate(**inputs: object) -> torch.Tensor:
        counted.append(view.model.generate(**inputs))
        return counted[-1]

    inputs = example_prompt(view)
    row = one_round(Contestant("demo", view, generate, inputs), 4)
    assert [made.shape[1] - inputs["input_ids"].shape[1] for made in counted] == [4, 4], "once before it is timed"
    for clock in (0, 1):
        vision, prefill, token, whole = (row[p][clock] for p in ("vision", "prefill", "decode_per_token", "end_to_end"))
        assert vision > 0 and prefill > 0 and token > 0
        assert vision + prefill + 3 * token == pytest.approx(whole)
    assert not view.tower._forward_hooks and not view.tower._forward_pre_hooks
