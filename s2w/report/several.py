"""Writes a report that compares several runs: settings that differ, held-out results, cost, responses side by side."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2w.errors import ConfigError
from s2w.eval.statistics import Estimate
from s2w.records import HeldoutSample, Mode
from s2w.report.comparison import Comparison, Metric, change_between, compare
from s2w.report.figures import runs_picture
from s2w.report.run import Run, read_run, series
from s2w.report.template import environment, write
from s2w.report.verdict import NAMES, Verdict, judge

DIRECTORY = "comparison"
"""Where a report on several runs goes, beside the first one's directory."""
NOT_COMPARED = ("run.dir", "run.name", "run.resume")
"""Settings that differ in any two runs and change nothing."""
SHOWN: tuple[Metric, ...] = ("accuracy", "forward_kl", "reverse_kl", "mode_adherence", "truncated", "repetitive")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took; steps that were lost and done again count in the time alone."""

    wall_seconds: float | None
    off_policy_steps: int
    steps: int
    rollouts: int
    """Responses of the student that the on-policy steps trained on."""
    tokens: int
    """Response tokens that the steps of both phases trained on."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run of the page."""

    label: str
    run: Run
    verdict: Verdict
    lines: dict[tuple[Metric, str], Comparison]
    """By metric and mode; an empty mode is all prompts."""
    against: dict[Metric, Estimate]
    """By metric, the last version minus that of the first run on the page, paired over prompts that both were asked;
    empty for the first run, and where the prompts are other ones."""
    cost: Cost


def write_comparison(runs: Sequence[Path], output: Path | None) -> Path:
    """Writes the page and its figure; returns the page's path.

    Args:
        runs: two or more run directories; the others are compared with the first.
        output: directory of the report; None for ``comparison`` beside the first run's directory.

    Raises:
        ConfigError: one is not a run directory, or is given twice, or the report cannot be written.
    """
    places = [directory.resolve() for directory in runs]
    for place, count in Counter(places).items():
        if count > 1:
            raise ConfigError(f"{str(place)!r} is given {count} times: give each run once")
    contents = [read_run(directory) for directory in runs]
    rows = make_rows(contents)
    picture = runs_picture(contents, [row.label for row in rows])
    pictures = [picture] if picture else []
    page = (
        environment()
        .get_template("several.html.j2")
        .render(
            rows=rows,
            metric_names=NAMES,
            shown=SHOWN,
            modes=["", *sorted({mode for _, mode in (key for row in rows for key in row.lines) if mode})],
            settings=differing_settings(contents),
            pictures={one.name: one for one in pictures},
            samples=side_by_side(contents),
        )
    )
    return write(output or places[0].parent / DIRECTORY, page, pictures)


def make_rows(runs: Sequence[Run]) -> list[Row]:
    """A row for each run, in order."""
    return [
        Row(
            label,
            run,
            judge(run, comparisons),
            {(line.metric, line.name): line for line in comparisons},
            _against(runs[0], run) if run is not runs[0] else {},
            _cost(run),
        )
        for label, run in zip(_labels(runs), runs, strict=True)
        for comparisons in [compare(run)]
    ]


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """By name, what each run has of every setting that is not the same in all; one that a run lacks is a dash."""
    flat = [dict(_flatten(run.config)) for run in runs]
    names = sorted({name for one in flat for name in one} - set(NOT_COMPARED))
    found = {name: [json.dumps(one[name]) if name in one else "–" for one in flat] for name in names}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def side_by_side(runs: Sequence[Run]) -> dict[Mode, list[list[HeldoutSample]]]:
    """By mode, the last responses of all runs to each prompt that all kept, then the first run's teacher's, if any."""
    sides = []
    for run in runs:
        last = run.samples[-1].version if run.samples else None
        sides.append({(one.mode, one.uid): one for one in run.samples if one.version == last})
    teacher = {(one.mode, one.uid): one for one in runs[0].teacher_samples}
    found: dict[Mode, list[list[HeldoutSample]]] = {}
    for key, first in sides[0].items():
        own = [side[key] for side in sides if key in side]
        if len(own) == len(runs) and len({one.prompt for one in own}) == 1:
            found.setdefault(first.mode, []).append([*own, *([teacher[key]] if key in teacher else [])])
    return found


def _labels(runs: Sequence[Run]) -> list[str]:
    """Their names; with their directories' where several have the same."""
    names = Counter(run.name for run in runs)
    return [run.name if names[run.name] == 1 else run.directory.resolve().name for run in runs]


def _against(first: Run, other: Run) -> dict[Metric, Estimate]:
    if not (first.heldout and other.heldout and _same_prompts(first, other)):
        return {}
    before, after = (run.responses_at(run.heldout[-1].version) for run in (first, other))
    changes = {metric: change_between(before, after, metric) for metric in SHOWN}
    return {metric: change for metric, change in changes.items() if change is not None}


def _same_prompts(first: Run, other: Run) -> bool:
    """Whether prompts with the same uid are the same: those of another seed are not."""
    texts = [{(one.mode, one.uid): one.prompt for one in run.samples} for run in (first, other)]
    shared = texts[0].keys() & texts[1].keys()
    return bool(shared) and all(texts[0][key] == texts[1][key] for key in shared)


def _cost(run: Run) -> Cost:
    lines = [*run.off_policy_steps, *run.steps]
    rollouts = sum(mode.get("responses", 0) for line in run.steps for mode in line["by_mode"].values())
    tokens = int(series(lines, "response_tokens").sum()) if lines else 0
    return Cost(run.wall_seconds, len(run.off_policy_steps), len(run.steps), int(rollouts), tokens)


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
