"""Writes a report: one self-contained page, and the figures beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from s2w.errors import ConfigError
from s2w.eval.statistics import Estimate
from s2w.models.modes import THINK_CLOSE
from s2w.records import HeldoutSample, Mode
from s2w.report.comparison import Metric, compare
from s2w.report.figures import Picture, draw
from s2w.report.lanes import Lanes, make_lanes
from s2w.report.run import Run, read_run, series
from s2w.report.verdict import NAMES, duration, headline, number, remarks
from s2w.teacher_data.filters import FILTERS

DIRECTORY = "report"
"""Where a report goes, in the run directory."""
PAGE = "index.html"


@dataclass(frozen=True, slots=True)
class Pair:
    """The response to one held-out prompt at the first and the last version."""

    before: HeldoutSample
    after: HeldoutSample | None


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
    page = render(content, pictures, lanes)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (directory / f"{picture.name}.png").write_bytes(picture.png)
        (directory / PAGE).write_text(page)
    except OSError as error:
        raise ConfigError(f"the report cannot be written: {error}") from error
    return directory / PAGE


def render(run: Run, pictures: Sequence[Picture], lanes: Lanes | None) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("s2w.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "estimate": _estimate,
        "data_uri": lambda png: "data:image/png;base64," + base64.b64encode(png).decode(),
        "duration": duration,
        "thinking_and_answer": _thinking_and_answer,
    }
    comparisons = compare(run)
    return environment.get_template("page.html.j2").render(
        run=run,
        name=run.config["run"]["name"],
        models={part: run.config[part]["model"] for part in ("teacher", "student")},
        remarks=remarks(run, comparisons),
        headline=headline(run, comparisons),
        comparisons=comparisons,
        metric_names=NAMES,
        pictures={picture.name: picture for picture in pictures},
        hover={picture.name: picture.hover for picture in pictures if picture.hover},
        busy=_busy(lanes) if lanes else [],
        wall=_wall(run),
        pairs=sample_pairs(run),
        filters=FILTERS,
    )


def sample_pairs(run: Run) -> dict[Mode, list[Pair]]:
    """By mode, the kept responses of the first version beside those of the last one to the same prompts."""
    if not run.samples:
        return {}
    versions = [sample.version for sample in run.samples]
    first, last = min(versions), max(versions)
    later = {(one.mode, one.uid): one for one in run.samples if one.version == last and last > first}
    pairs: dict[Mode, list[Pair]] = {}
    for sample in run.samples:
        if sample.version == first:
            pairs.setdefault(sample.mode, []).append(Pair(sample, later.get((sample.mode, sample.uid))))
    return pairs


def _busy(lanes: Lanes) -> list[BusyShare]:
    total = lanes.step_seconds
    work = [(lane, float(lanes.busy(lane).sum())) for lane in lanes.lanes]
    return [BusyShare(lane.name, lane.stage, busy, busy / total) for lane, busy in work]


def _wall(run: Run) -> list[tuple[str, float]]:
    """Seconds by part of the run; the rest is known only of a run that was never resumed."""
    parts = [
        ("off-policy updates", float(series(run.off_policy_steps, "seconds").sum())),
        ("on-policy steps", float(series(run.steps, "seconds").sum())),
    ]
    rest = (run.wall_seconds or 0.0) - sum(seconds for _, seconds in parts)
    if rest > 0:
        parts.append(("the rest: starting, the teacher's responses, held-out evaluations, checkpoints", rest))
    return [(name, seconds) for name, seconds in parts if seconds > 0]


def _estimate(estimate: Estimate | None, metric: Metric, signed: bool = False) -> str:
    """The value and its interval."""
    if estimate is None:
        return "–"

    def text(value: float) -> str:
        return ("+" if signed and value > 0 else "") + number(value, metric)

    if estimate.low != estimate.low:
        return text(estimate.value)
    return f"{text(estimate.value)} [{text(estimate.low)}, {text(estimate.high)}]"


def _thinking_and_answer(response: str) -> tuple[str, str]:
    """A response split after its think block; the first part is empty if there is none."""
    head, close, tail = response.partition(THINK_CLOSE)
    return (head + close, tail) if close else ("", response)
