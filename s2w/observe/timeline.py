"""When each actor was at work: ``timeline.jsonl`` and the busy shares of the stages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from s2w.observe import jsonl

Stage = Literal["generate", "score", "learn", "swap"]
STAGES: tuple[Stage, ...] = ("generate", "score", "learn", "swap")
Interval = tuple[float, float]


class Timeline:
    """Collects intervals (wall-clock seconds) by stage and actor.

    Args:
        path: the file that gets a line for each stretch of an actor's uninterrupted work.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._recent: dict[Stage, list[Interval]] = {stage: [] for stage in STAGES}

    def add(self, stage: Stage, actor: int, intervals: Iterable[Interval], step: int) -> list[Interval]:
        """Adds what ``actor`` did for ``step``; returns the union of its intervals."""
        merged = merge(intervals)
        self._recent[stage] += merged
        lines = [{"stage": stage, "actor": actor, "step": step, "start": start, "stop": stop} for start, stop in merged]
        jsonl.append(self.path, lines)
        return merged

    def busy(self, start: float, stop: float) -> dict[str, float]:
        """Share of ``start`` to ``stop`` in which at least one actor of each stage was at work.

        Counts work that was added before this call; earlier work is then forgotten.
        """
        shares: dict[str, float] = {}
        for stage, intervals in self._recent.items():
            inside = [(max(a, start), min(b, stop)) for a, b in intervals if b > start and a < stop]
            shares[stage] = seconds(merge(inside)) / (stop - start)
            self._recent[stage] = [interval for interval in intervals if interval[1] > stop]
        return shares


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, as disjoint ones in order."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def seconds(merged: Iterable[Interval]) -> float:
    """Total length of disjoint intervals."""
    return sum(stop - start for start, stop in merged)
