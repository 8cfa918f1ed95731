"""A run: what every phase of it needs to know, its directory, and how signals end it."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2w.actors.failures import LOG, reported
from s2w.actors.stopping import INTERRUPTED, run_stoppable
from s2w.config.compose import to_yaml
from s2w.config.schema import Config
from s2w.learner import checkpoint
from s2w.learner.group import LearnerGroup
from s2w.models.checkpoint import ModelReference
from s2w.models.pair import ModelPair
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder

CHECKPOINTS = Path("checkpoints")
"""Checkpoints of the on-policy phase, in the run directory."""
OFF_POLICY = Path("off_policy")
"""Files of the off-policy phase, in the run directory."""
OFF_POLICY_CHECKPOINTS = OFF_POLICY / "checkpoints"


@dataclass(frozen=True, slots=True)
class Job:
    """One run, validated and connected to its cluster."""

    config: Config
    models: ModelPair
    context_tokens: dict[str, int]
    """As returned by :func:`s2w.launch.check.check_prompts`."""
    device: str
    """cuda or cpu."""
    directory: Path
    """The run directory."""
    recorder: Recorder
    progress: Progress


def open_directory(config: Config) -> Path:
    """The run directory, created if missing, with the resolved settings in it."""
    directory = Path(config.run.dir).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / "config.yaml.partial"
    partial.write_text(to_yaml(config))
    partial.replace(directory / "config.yaml")
    return directory


def saved(directory: Path) -> str:
    """What a run has on disk and how to continue it, as the end of a sentence."""
    for path, phase in ((CHECKPOINTS, ""), (OFF_POLICY_CHECKPOINTS, "off-policy ")):
        if last := checkpoint.latest(directory / path):
            what = f"{phase}step {checkpoint.read_state(last)['step']} is saved in {last}"
            break
    else:
        shards = len(list((directory / OFF_POLICY).glob("shard-*.parquet")))
        what = f"{shards} shards of responses are in {directory / OFF_POLICY}" if shards else "no step is saved yet"
    return f"{what}; to continue: the same command with run.dir={directory} run.resume=true"


def run_to_its_end(work: Coroutine[Any, Any, None], directory: Path, progress: Progress) -> int:
    """Runs ``work`` to its end (0), or until SIGINT or SIGTERM cancels it (130); then says how to continue.

    Args:
        directory: the run's.

    Raises:
        RunError: the work failed; its traceback is in ``error.log`` of the directory.
        ConfigError, PreflightError: as the work raised them.
    """

    def stopping() -> None:
        progress.say("finishing and saving the work in progress; a second signal stops the run at once")

    try:
        with reported(directory / LOG, lambda: saved(directory)):
            run_stoppable(work, stopping, lambda: f"ended at once; {saved(directory)}")
    except KeyboardInterrupt:
        progress.say(f"interrupted; {saved(directory)}")
        return INTERRUPTED
    return 0


async def start_learner(config: Config, student: ModelReference, job: Job) -> LearnerGroup:
    """The learner of one phase of ``job``: as :meth:`LearnerGroup.start`.

    Args:
        config: the job's, with what the phase changes.
        student: the checkpoint to start from.
    """
    tokenizer = job.models.student.tokenizer
    template = str(tokenizer.chat_template) if config.student.thinking_switch else None
    return await LearnerGroup.start(config, student, job.device, job.models.vocabulary.vocab_size, template)
