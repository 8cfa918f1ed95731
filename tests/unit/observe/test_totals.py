"""What a run's steps add up to, those from before it was resumed too."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from s2w.observe.step_report import totals
from s2w.observe.timeline import Timeline


def test_totals_are_over_all_steps(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.jsonl")
    # Two engines that overlap for a second: 5 s in which one was at work; then 1 s.
    timeline.add("generate", 0, [(0.0, 3.0)], 1)
    timeline.add("generate", 1, [(2.0, 5.0)], 1)
    timeline.add("generate", 0, [(7.0, 8.0)], 2)
    timeline.add("learn", 0, [(5.0, 6.0)], 1)
    steps = [
        {"step": 1, "tokens_per_second": {"generate": 100.0, "learn": 400.0}, "swap_ms": 30.0, "probe_error": 1e-6},
        {
            "step": 2,
            "tokens_per_second": {"generate": 700.0, "learn": 0.0},
            "swap_ms": math.nan,
            "probe_error": math.nan,
        },
        {"step": 3, "tokens_per_second": {"generate": 0.0, "learn": 0.0}, "swap_ms": 10.0, "probe_error": 3e-6},
    ]
    total = totals(steps, timeline.path)
    assert total["tokens_per_second"] == pytest.approx({"generate": (500 + 700) / 6, "learn": 400.0})
    assert (total["swap_ms"], total["probe_error"]) == (30.0, 3e-6)


def test_totals_of_nothing(tmp_path: Path) -> None:
    assert totals([], tmp_path / "timeline.jsonl") == {"tokens_per_second": {}, "swap_ms": None, "probe_error": None}
