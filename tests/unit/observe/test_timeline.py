"""Intervals of work, and the busy shares of the stages."""

from __future__ import annotations

import json
from pathlib import Path

from s2w.observe.timeline import Timeline, merge, seconds


def test_merge_is_the_union() -> None:
    intervals = [(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (4.0, 4.5), (2.5, 2.6)]
    assert merge(intervals) == [(1.0, 4.5), (5.0, 6.0)]
    assert seconds(merge(intervals)) == 4.5
    assert merge([]) == []


def test_busy_shares_cover_a_window_once(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.jsonl")
    timeline.add("generate", 0, [(0.0, 4.0)], 1)
    timeline.add("generate", 1, [(2.0, 6.0)], 1)
    timeline.add("learn", 0, [(9.0, 12.0)], 1)
    assert timeline.busy(0.0, 10.0) == {"generate": 0.6, "score": 0.0, "learn": 0.1, "swap": 0.0}
    # What reaches past the window counts in the next one.
    assert timeline.busy(10.0, 20.0) == {"generate": 0.0, "score": 0.0, "learn": 0.2, "swap": 0.0}
    lines = [json.loads(line) for line in (tmp_path / "timeline.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["actor"], line["stop"]) for line in lines] == [
        ("generate", 0, 4.0), ("generate", 1, 6.0), ("learn", 0, 12.0),
    ]  # fmt: skip
