"""What a run leaves behind: metrics.jsonl, heldout.jsonl of each phase, held-out responses, events.jsonl, TensorBoard,
W&B, metric_definitions.json, segments.json, summary.json."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from s2w.metric import definitions
from s2w.observe import jsonl
from s2w.observe.weights_and_biases import start_weights_and_biases
from s2w.records import Fault, Heldout, HeldoutResponse, HeldoutSample, OffPolicyHeldout

DEFINITIONS = "metric_definitions.json"
"""What the metrics of the run are (:mod:`s2w.metric`), for whoever reads it."""
SEGMENTS = "segments.json"
"""A list with, for each start of the run, the wall-clock seconds (``time.time``) at which it began and until which it
is known to have worked: ``{"began", "until"}``."""
TEACHER = "teacher_heldout"
"""Directory of the teacher's own responses to the held-out prompts, in files like those of the student's."""


class Recorder:
    """Writes each number as soon as it is known, so that a run that dies keeps what it measured.

    Args:
        directory: the run directory; created if missing.
        step: updates already done (resume). Later lines of an interrupted run are dropped.
        off_policy_step: the same for the off-policy phase.
        config: the resolved configuration, for W&B.
        tensorboard: write ``tensorboard/``.
        wandb: project name, or None.
        name: the run's name in W&B.
        began: when this start of the run began, ``time.time()``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        step: int,
        off_policy_step: int,
        config: dict[str, Any],
        tensorboard: bool,
        wandb: str | None,
        name: str,
        began: float,
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        segments = directory / SEGMENTS
        self._segments = json.loads(segments.read_text()) if segments.exists() else []
        self._segments.append({"began": began, "until": time.time()})
        self._working()
        self.metrics, self.heldout_lines = directory / "metrics.jsonl", directory / "heldout.jsonl"
        self.off_policy_heldout_lines = directory / "off_policy" / "heldout.jsonl"
        self.events = directory / "events.jsonl"
        done = {"on_policy": step, "off_policy": off_policy_step}
        jsonl.keep(self.metrics, lambda line: line["step"] <= done[line["phase"]])
        jsonl.keep(directory / "timeline.jsonl", lambda line: line["step"] <= step)
        jsonl.keep(self.off_policy_heldout_lines, lambda line: line["step"] <= off_policy_step)
        jsonl.keep(self.heldout_lines, lambda line: line["version"] <= step)
        # An evaluation that was not written completely is repeated.
        for place in (directory, directory / TEACHER):
            complete = partial(_is_of, {line["version"] for line in jsonl.read(place / "heldout.jsonl")})
            for file in ("heldout_responses.jsonl", "samples.jsonl"):
                jsonl.keep(place / file, complete)
        (directory / DEFINITIONS).write_text(json.dumps(definitions(), indent=2) + "\n")
        self._tensorboard, self._first_steps = tensorboard, {name: count + 1 for name, count in done.items()}
        self._writers: dict[str, Any] = {}
        self._wandb: Any = None
        if wandb:
            self._wandb = start_weights_and_biases(wandb, name, directory, config)

    def step(self, line: dict[str, Any]) -> None:
        """Adds the line of one step of either phase, see :mod:`s2w.observe.step_report`."""
        jsonl.append(self.metrics, [line])
        self._working()
        self._scalars(line, line["step"], line["phase"])

    def heldout(self, result: Heldout, responses: Iterable[HeldoutResponse], samples: Iterable[HeldoutSample]) -> None:
        """Adds one held-out evaluation, and its responses: all as numbers, some in full."""
        place = self.directory if result.version is not None else self.directory / TEACHER
        place.mkdir(exist_ok=True)
        jsonl.append(place / "heldout_responses.jsonl", map(asdict, responses))
        jsonl.append(place / "samples.jsonl", map(asdict, samples))
        # Last: without this line, what a killed run leaves does not count as an evaluation.
        line = asdict(result)
        jsonl.append(place / "heldout.jsonl", [line])
        self._working()
        if result.version is not None:
            self._scalars({f"heldout/{name}": value for name, value in line.items()}, result.version)

    def off_policy_heldout(self, result: OffPolicyHeldout) -> None:
        """Adds one held-out evaluation of the off-policy phase."""
        line = asdict(result)
        self.off_policy_heldout_lines.parent.mkdir(exist_ok=True)
        jsonl.append(self.off_policy_heldout_lines, [line])
        self._working()
        self._scalars({f"heldout/{name}": value for name, value in line.items()}, result.step, "off_policy")

    def fault(self, fault: Fault) -> None:
        """Adds what became of something that died."""
        jsonl.append(self.events, [asdict(fault)])
        self._working()

    def faults(self) -> list[dict[str, Any]]:
        """The lines of all that died so far, as of :class:`Fault`, including those before the run was resumed."""
        return jsonl.read(self.events)

    def off_policy_evaluations(self) -> list[OffPolicyHeldout]:
        """All held-out evaluations of the off-policy phase so far."""
        return [OffPolicyHeldout(**line) for line in jsonl.read(self.off_policy_heldout_lines)]

    def evaluations(self) -> list[Heldout]:
        """All held-out evaluations of this run so far, including those before it was resumed."""
        return [Heldout(**line) for line in jsonl.read(self.heldout_lines)]

    def teacher_evaluation(self) -> Heldout | None:
        """The teacher's own responses to the held-out prompts; None if they were not asked for yet."""
        lines = jsonl.read(self.directory / TEACHER / "heldout.jsonl")
        return Heldout(**lines[0]) if lines else None

    def steps(self) -> list[dict[str, Any]]:
        """The lines of all on-policy steps so far, including those before the run was resumed."""
        return [line for line in jsonl.read(self.metrics) if line["phase"] == "on_policy"]

    @property
    def wall_seconds(self) -> float:
        """Time that the run took so far, over all its starts."""
        self._working()
        return sum(segment["until"] - segment["began"] for segment in self._segments)

    def summary(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json``."""
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Flushes TensorBoard and W&B."""
        self._working()
        for writer in self._writers.values():
            writer.close()
        if self._wandb:
            self._wandb.finish()

    def _working(self) -> None:
        """Notes that the run works: one that is killed has worked until its last record."""
        self._segments[-1]["until"] = time.time()
        unfinished = self.directory / f"{SEGMENTS}.partial"
        unfinished.write_text(json.dumps(self._segments, indent=2) + "\n")
        unfinished.replace(self.directory / SEGMENTS)

    def _scalars(self, line: dict[str, Any], step: int, phase: str = "on_policy") -> None:
        scalars = dict(_flatten({name: value for name, value in line.items() if name != "phase"}))
        if self._tensorboard:
            for name, value in scalars.items():
                self._writer(phase).add_scalar(name, value, step)
        if self._wandb:
            prefix = "" if phase == "on_policy" else f"{phase}/"
            self._wandb.log({f"{prefix}{name}": value for name, value in {**scalars, "step": step}.items()})

    def _writer(self, phase: str) -> Any:
        """TensorBoard's writer, a directory for each phase: resuming hides the later steps of a whole directory."""
        if phase not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            root = self.directory / "tensorboard"
            directory = root if phase == "on_policy" else root / phase
            self._writers[phase] = SummaryWriter(str(directory), purge_step=self._first_steps[phase])
        return self._writers[phase]


def _is_of(versions: set[int | None], line: dict[str, Any]) -> bool:
    return line["version"] in versions


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, float(value)
