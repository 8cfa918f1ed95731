"""What a run leaves behind: metrics.jsonl, heldout.jsonl of each phase, held-out responses, TensorBoard, W&B,
metric_definitions.json, summary.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from s2w.metric import definitions
from s2w.observe import jsonl
from s2w.records import Heldout, HeldoutResponse, HeldoutSample, OffPolicyHeldout

DEFINITIONS = "metric_definitions.json"
"""What the metrics of the run are (:mod:`s2w.metric`), for whoever reads it."""


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
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics, self.heldout_lines = directory / "metrics.jsonl", directory / "heldout.jsonl"
        self.response_lines, self.sample_lines = directory / "heldout_responses.jsonl", directory / "samples.jsonl"
        self.off_policy_heldout_lines = directory / "off_policy" / "heldout.jsonl"
        done = {"on_policy": step, "off_policy": off_policy_step}
        jsonl.keep(self.metrics, lambda line: line["step"] <= done[line["phase"]])
        jsonl.keep(directory / "timeline.jsonl", lambda line: line["step"] <= step)
        jsonl.keep(self.off_policy_heldout_lines, lambda line: line["step"] <= off_policy_step)
        jsonl.keep(self.heldout_lines, lambda line: line["version"] <= step)
        # An evaluation that was not written completely is repeated.
        evaluated = {line["version"] for line in jsonl.read(self.heldout_lines)}
        for path in (self.response_lines, self.sample_lines):
            jsonl.keep(path, lambda line: line["version"] in evaluated)
        (directory / DEFINITIONS).write_text(json.dumps(definitions(), indent=2) + "\n")
        self._tensorboard, self._first_steps = tensorboard, {name: count + 1 for name, count in done.items()}
        self._writers: dict[str, Any] = {}
        self._wandb = None
        if wandb:
            import wandb as library

            self._wandb = library.init(project=wandb, name=name, dir=str(directory), config=config, resume="allow")
            # Each phase counts its own steps; W&B's own counter may only rise.
            self._wandb.define_metric("*", step_metric="step")
            self._wandb.define_metric("off_policy/*", step_metric="off_policy/step")

    def step(self, line: dict[str, Any]) -> None:
        """Adds the line of one step of either phase, see :mod:`s2w.observe.step_report`."""
        jsonl.append(self.metrics, [line])
        self._scalars(line, line["step"], line["phase"])

    def heldout(self, result: Heldout, responses: Iterable[HeldoutResponse], samples: Iterable[HeldoutSample]) -> None:
        """Adds one held-out evaluation, and its responses: all as numbers, some in full."""
        jsonl.append(self.response_lines, map(asdict, responses))
        jsonl.append(self.sample_lines, map(asdict, samples))
        # Last: without this line, what a killed run leaves does not count as an evaluation.
        line = asdict(result)
        jsonl.append(self.heldout_lines, [line])
        self._scalars({f"heldout/{name}": value for name, value in line.items()}, result.version)

    def off_policy_heldout(self, result: OffPolicyHeldout) -> None:
        """Adds one held-out evaluation of the off-policy phase."""
        line = asdict(result)
        self.off_policy_heldout_lines.parent.mkdir(exist_ok=True)
        jsonl.append(self.off_policy_heldout_lines, [line])
        self._scalars({f"heldout/{name}": value for name, value in line.items()}, result.step, "off_policy")

    def off_policy_evaluations(self) -> list[OffPolicyHeldout]:
        """All held-out evaluations of the off-policy phase so far."""
        return [OffPolicyHeldout(**line) for line in jsonl.read(self.off_policy_heldout_lines)]

    def evaluations(self) -> list[Heldout]:
        """All held-out evaluations of this run so far, including those before it was resumed."""
        return [Heldout(**line) for line in jsonl.read(self.heldout_lines)]

    def summary(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json``."""
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Flushes TensorBoard and W&B."""
        for writer in self._writers.values():
            writer.close()
        if self._wandb:
            self._wandb.finish()

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


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, float(value)
