"""Where the time went: a lane for each actor, its work in each step and over all steps."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from s2w.observe.timeline import STAGES, Interval, Stage, merge
from s2w.report.run import Run, Work

NAMES: dict[Stage, str] = {
    "generate": "rollout engine {}",
    "score": "teacher {}",
    "learn": "learner",
    "swap": "swap",
}
GAP = 5
"""A pause between steps longer than this many median steps ends a stretch: the run was stopped and resumed."""


@dataclass(frozen=True, slots=True)
class Lane:
    """One actor."""

    stage: Stage
    actor: int
    work: tuple[Work, ...]
    """In order of time."""

    @property
    def name(self) -> str:
        return NAMES[self.stage].format(self.actor)


@dataclass(frozen=True, slots=True)
class Lanes:
    """All actors of a run, in the order of the stages, and the time that its steps took."""

    lanes: tuple[Lane, ...]
    steps: tuple[int, ...]
    windows: tuple[Interval, ...]
    """Of each step, wall-clock seconds: from its beginning to the end of its swap. Held-out evaluations and
    checkpoints lie between windows."""

    @property
    def step_seconds(self) -> float:
        """Time in steps."""
        return sum(stop - start for start, stop in self.windows)

    def busy(self, lane: Lane) -> np.ndarray:
        """float64 [steps]: seconds of each window in which the actor was at work."""
        intervals = merge((one.start, one.stop) for one in lane.work)
        # Work done up to a given time is linear between the ends of the intervals.
        ends = np.array(intervals).ravel()
        done = np.cumsum([[0.0, stop - start] for start, stop in intervals])
        starts, stops = np.array(self.windows).T
        return np.interp(stops, ends, done) - np.interp(starts, ends, done)

    def last_stretch(self, count: int) -> Interval:
        """From the beginning to the end of the last ``count`` steps, or of fewer if the run was resumed in between."""
        typical = float(np.median([stop - start for start, stop in self.windows]))
        first = len(self.windows) - 1
        while first > max(0, len(self.windows) - count):
            if self.windows[first][0] - self.windows[first - 1][1] > GAP * typical:
                break
            first -= 1
        return self.windows[first][0], self.windows[-1][1]


def make_lanes(run: Run) -> Lanes | None:
    """The lanes of a run's on-policy phase; None if it has no step with a timeline."""
    by_actor: defaultdict[tuple[Stage, int], list[Work]] = defaultdict(list)
    for work in run.timeline:
        by_actor[work.stage, work.actor].append(work)
    # A step ends with its swap; the report of the step knows how long it was.
    ends = {work.step: work.stop for work in run.timeline if work.stage == "swap"}
    done = [(line["step"], line["seconds"]) for line in run.steps if line["step"] in ends]
    if not done:
        return None
    order = sorted(by_actor, key=lambda key: (STAGES.index(key[0]), key[1]))
    return Lanes(
        lanes=tuple(Lane(*key, tuple(sorted(by_actor[key], key=lambda one: one.start))) for key in order),
        steps=tuple(step for step, _ in done),
        windows=tuple((ends[step] - length, ends[step]) for step, length in done),
    )
