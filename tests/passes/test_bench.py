"""The arithmetic and the sentences of `svlm bench`; needs no openvino."""

from __future__ import annotations

import pytest

from svlm.passes.bench import compare, lines, phases, sentences


def row(vision: float, prefill: float, token: float, whole: float, wall: float = 1.0) -> dict:
    cpu = {"vision": vision, "prefill": prefill, "decode_per_token": token, "end_to_end": whole}
    return {"ms": {k: v * wall for k, v in cpu.items()}, "cpu_ms": cpu, "bytes": 100, "peak_rss_bytes": 1000}


def test_phases_are_differences() -> None:
    made = phases((10.0, 9.0), (15.0, 14.0), (77.0, 76.0), 32)
    assert made == {
        "vision": (10.0, 9.0),
        "prefill": (5.0, 5.0),
        "decode_per_token": (2.0, 2.0),
        "end_to_end": (77.0, 76.0),
    }


def test_ratios_and_where_it_does_not_pay() -> None:
    made = compare({"against": row(10, 5, 2, 77), "out": row(5, 10, 0.5, 76.9) | {"bytes": 25}})
    assert made["clock"] == "ms"
    assert made["ratio"] == pytest.approx(
        {"vision": 0.5, "prefill": 2.0, "decode_per_token": 0.25, "end_to_end": 76.9 / 77, "bytes": 0.25, "peak_rss": 1}
    )
    assert made["says"] == [
        "The vision tower is 2.00 times faster than the original.",
        "Compression does not pay for reading the prompt on this machine: 2.00 times the original's time.",
        "Each further token is 4.00 times faster than the original.",
        "Compression makes no difference for a whole answer on this machine.",
    ]
    assert "2.00" in "\n".join(lines(made | {"runtime": "torch"}))


def test_cpu_time_counts_where_others_hold_the_processor() -> None:
    made = compare({"against": row(10, 5, 2, 77, wall=3.0), "out": row(5, 5, 2, 77, wall=1.0)})
    assert made["clock"] == "cpu_ms" and made["ratio"]["vision"] == 0.5
    assert "CPU time" in made["says"][-1]


def test_more_memory_is_said() -> None:
    said = sentences({"vision": None, "prefill": 1, "decode_per_token": 1, "end_to_end": 1, "peak_rss": 1.5}, False)
    assert said[-1].startswith("Loading and answering takes more memory")
