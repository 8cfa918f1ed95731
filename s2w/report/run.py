"""Reads what a run left in its directory, finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
from omegaconf import OmegaConf
from yaml import YAMLError

from s2w.errors import ConfigError
from s2w.metric import METRICS, Metric
from s2w.observe.recorder import DEFINITIONS, SEGMENTS, TEACHER
from s2w.observe.timeline import Stage
from s2w.records import Fault, Heldout, HeldoutResponse, HeldoutSample, Mode, OffPolicyHeldout

Record = TypeVar("Record")
Line = dict[str, Any]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True)
class Work:
    """A stretch of one actor's uninterrupted work, as ``timeline.jsonl`` holds it."""

    stage: Stage
    actor: int
    step: int
    """Step of the batch that was worked on."""
    start: float
    """Wall-clock seconds (``time.time``)."""
    stop: float


@dataclass(frozen=True, slots=True)
class Segment:
    """One start of the run, as ``segments.json`` holds it."""

    began: float
    """Wall-clock seconds (``time.time``)."""
    until: float
    """When it last wrote something: its end, or a moment before it was killed."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory's content; a part that the run did not get to is empty."""

    directory: Path
    config: dict[str, Any]
    config_text: str
    """``config.yaml`` as it is."""
    steps: list[Line]
    """On-policy lines of ``metrics.jsonl`` (:mod:`s2w.observe.step_report`), perhaps of an earlier version."""
    off_policy_steps: list[Line]
    """The off-policy lines."""
    heldout: list[Heldout]
    responses: list[HeldoutResponse]
    samples: list[HeldoutSample]
    teacher_responses: list[HeldoutResponse]
    """The teacher's own responses to the held-out prompts; empty if it was not asked."""
    teacher_samples: list[HeldoutSample]
    off_policy_heldout: list[OffPolicyHeldout]
    filters: dict[str, Any] | None
    """:meth:`s2w.teacher_data.filters.Filtered.table`."""
    timeline: list[Work]
    metrics: dict[str, Metric]
    """Definitions of its metrics by name; those of this version of s2w where the run kept none."""
    faults: list[Fault]
    """What died or hung, and what became of it."""
    segments: list[Segment]
    """Every start of the run; empty for a run of s2w 0.2."""
    summary: dict[str, Any] | None
    """``summary.json`` of the last start that got to its end; None if none did."""

    @property
    def finished(self) -> bool:
        """Whether the run has done what it was asked for. A run being continued still has its first summary."""
        done = self.steps[-1]["step"] if self.steps else 0
        return self.summary is not None and done >= self.config["loop"]["steps"]

    @property
    def name(self) -> str:
        return str(self.config["run"]["name"])

    @property
    def wall_seconds(self) -> float | None:
        """Time over all starts; of a run of s2w 0.2 from its last start to its end, None if it never ended."""
        if self.segments:
            return sum(one.until - one.began for one in self.segments)
        return self.summary["wall_seconds"] if self.summary else None

    @property
    def modes(self) -> list[Mode]:
        """Modes that occur in the run."""
        seen = {mode for lines in (self.steps, self.heldout_by_mode) for line in lines for mode in line["by_mode"]}
        return [mode for mode in MODES if mode in seen]

    @property
    def heldout_by_mode(self) -> list[Line]:
        """``version`` and ``by_mode`` of each held-out evaluation."""
        return [{"version": one.version, "by_mode": one.by_mode} for one in self.heldout]

    def responses_at(self, version: int | None, mode: Mode | None = None) -> list[HeldoutResponse]:
        """Held-out responses of a version, in one mode or all."""
        return [one for one in self.responses if one.version == version and mode in (None, one.mode)]


def read_run(directory: Path) -> Run:
    """Reads a run directory. A line that is still being written is left out.

    Raises:
        ConfigError: it is not a run directory, or a file in it is not what this version of s2w writes.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (directory / name).is_file():
            raise ConfigError(f"{str(directory)!r} is not a run directory: it has no {name}")
    text = (directory / "config.yaml").read_text()
    try:
        config: Any = OmegaConf.to_container(OmegaConf.create(text))
    except YAMLError as error:
        raise ConfigError(f"{str(directory / 'config.yaml')!r} is not YAML: {error}") from error
    if (
        not isinstance(config, dict)
        or not {"loop", "loss", "off_policy", "rollout", "run", "student", "teacher"} <= config.keys()
    ):
        raise ConfigError(f"{str(directory / 'config.yaml')!r} is not the configuration of a run")
    steps = list(_lines(directory / "metrics.jsonl", ("phase", "step")))
    filters = _json(directory / "off_policy" / "filters.json")
    ceiling = directory / TEACHER
    measured = bool(_records(ceiling / "heldout.jsonl", Heldout))
    return Run(
        directory=directory,
        config=config,
        config_text=text,
        # `by_mode` was added later than the rest.
        steps=[{"by_mode": {}, **line} for line in steps if line["phase"] == "on_policy"],
        off_policy_steps=[line for line in steps if line["phase"] == "off_policy"],
        heldout=_records(directory / "heldout.jsonl", Heldout),
        responses=_records(directory / "heldout_responses.jsonl", HeldoutResponse),
        samples=_records(directory / "samples.jsonl", HeldoutSample),
        teacher_responses=_records(ceiling / "heldout_responses.jsonl", HeldoutResponse) if measured else [],
        teacher_samples=_records(ceiling / "samples.jsonl", HeldoutSample) if measured else [],
        off_policy_heldout=_records(directory / "off_policy" / "heldout.jsonl", OffPolicyHeldout),
        filters=filters,
        timeline=_records(directory / "timeline.jsonl", Work),
        metrics=_metrics(directory / DEFINITIONS),
        faults=_records(directory / "events.jsonl", Fault),
        segments=[Segment(**one) for one in _json(directory / SEGMENTS) or []],
        summary=_json(directory / "summary.json"),
    )


def series(lines: Sequence[Line], *names: str) -> np.ndarray:
    """A number over the lines, float64 [lines]; ``names`` lead to it through nested dicts, NaN where it is missing."""
    values = []
    for line in lines:
        value: Any = line
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        values.append(np.nan if value is None else value)
    return np.asarray(values, np.float64)


def _lines(path: Path, needed: Sequence[str]) -> Iterator[Line]:
    if not path.exists():
        return
    complete, _, _ = path.read_text().rpartition("\n")
    for number, text in enumerate(complete.splitlines(), 1):
        try:
            line = json.loads(text)
            missing = [name for name in needed if name not in line]
        except (json.JSONDecodeError, TypeError):
            line, missing = None, []
        if not isinstance(line, dict) or missing:
            raise ConfigError(f"{str(path)!r}, line {number}, is not what s2w writes there")
        yield line


def _records(path: Path, kind: type[Record]) -> list[Record]:
    records = []
    for number, line in enumerate(_lines(path, ()), 1):
        try:
            records.append(kind(**line))
        except TypeError as error:
            raise ConfigError(f"{str(path)!r}, line {number}, was written by another version of s2w") from error
    return records


def _metrics(path: Path) -> dict[str, Metric]:
    definitions = _json(path)
    if definitions is None:
        return dict(METRICS)
    try:
        return {metric.name: metric for metric in (Metric(**definition) for definition in definitions)}
    except TypeError as error:
        raise ConfigError(f"{str(path)!r} was written by another version of s2w") from error


def _json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not JSON: {error}") from error
