"""Writes a report of one run: one self-contained page, and the figures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s2w.records import HeldoutSample, Mode
from s2w.report.comparison import Kind, compare, compare_by
from s2w.report.figures import Picture, draw
from s2w.report.lanes import Lanes, make_lanes
from s2w.report.run import Run, read_run, series
from s2w.report.template import environment, write
from s2w.report.verdict import NAMES, headline, judge, remarks
from s2w.teacher_data.filters import FILTERS

DIRECTORY = "report"
"""Where a report goes, in the run directory."""


@dataclass(frozen=True, slots=True)
class Triple:
    """The responses to one held-out prompt: at the first and the last version, and the teacher's."""

    before: HeldoutSample
    after: HeldoutSample | None
    teacher: HeldoutSample | None


@dataclass(frozen=True, slots=True)
class BusyShare:
    """One line of the table of actors."""

    actor: str
    stage: str
    seconds: float
    share: float
    """Share of the time in steps."""


def write_report(run: Path, output: Path | None) -> Path:
    """Writes the page and its figures; returns the page's path.

    Args:
        run: the run directory.
        output: directory of the report; None for ``report`` in the run directory.

    Raises:
        ConfigError: ``run`` is not a run directory, or the report cannot be written.
    """
    content = read_run(run)
    directory = output or run / DIRECTORY
    lanes = make_lanes(content)
    pictures = draw(content, lanes)
    return write(directory, render(content, pictures, lanes), pictures)


def render(run: Run, pictures: Sequence[Picture], lanes: Lanes | None) -> str:
    """The page."""
    comparisons = compare(run)
    kinds: tuple[Kind, ...] = ("teacher", "task")
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            run=run,
            models={part: run.config[part]["model"] for part in ("teacher", "student")},
            verdict=judge(run, comparisons),
            remarks=remarks(run, comparisons),
            headline=headline(run),
            whole=[line for line in comparisons if line.kind is None],
            groups={"mode": [line for line in comparisons if line.kind == "mode"]}
            | {kind: compare_by(run, kind) for kind in kinds},
            metric_names=NAMES,
            pictures={picture.name: picture for picture in pictures},
            hover={picture.name: picture.hover for picture in pictures if picture.hover},
            busy=_busy(lanes) if lanes else [],
            wall=_wall(run),
            triples=sample_triples(run),
            filters=FILTERS,
        )
    )


def sample_triples(run: Run) -> dict[Mode, list[Triple]]:
    """By mode, the kept responses of the first version beside those of the last one, and of the teacher, to the same
    prompts."""
    if not run.samples:
        return {}
    first, last = run.samples[0].version, run.samples[-1].version
    later = {(one.mode, one.uid): one for one in run.samples if one.version == last and last != first}
    teacher = {(one.mode, one.uid): one for one in run.teacher_samples}
    triples: dict[Mode, list[Triple]] = {}
    for sample in run.samples:
        if sample.version == first:
            key = sample.mode, sample.uid
            triples.setdefault(sample.mode, []).append(Triple(sample, later.get(key), teacher.get(key)))
    return triples


def _busy(lanes: Lanes) -> list[BusyShare]:
    total = lanes.step_seconds
    work = [(lane, float(lanes.busy(lane).sum())) for lane in lanes.lanes]
    return [BusyShare(lane.name, lane.stage, busy, busy / total) for lane, busy in work]


def _wall(run: Run) -> list[tuple[str, float]]:
    """Seconds by part of the run, over all its starts."""
    parts = [
        ("off-policy updates", float(series(run.off_policy_steps, "seconds").sum())),
        ("on-policy steps", float(series(run.steps, "seconds").sum())),
    ]
    rest = (run.wall_seconds or 0.0) - sum(seconds for _, seconds in parts)
    if rest > 0:
        again = ", steps that were lost and done again" if len(run.segments) > 1 else ""
        parts.append((f"the rest: starting, the teacher's responses, held-out evaluations, checkpoints{again}", rest))
    return [(name, seconds) for name, seconds in parts if seconds > 0]
