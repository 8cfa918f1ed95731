"""A run: what every phase of it needs to know, and how signals end it."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2w.actors.place import Place
from s2w.actors.stopping import INTERRUPTED, run_stoppable
from s2w.config.schema import Config
from s2w.launch.run_directory import saved
from s2w.learner.group import LearnerGroup
from s2w.models.checkpoint import ModelReference
from s2w.models.pair import ModelPair
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder


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


def run_to_its_end(work: Coroutine[Any, Any, None], directory: Path, progress: Progress, command: str) -> int:
    """Runs ``work`` to its end (0), or until SIGINT or SIGTERM cancels it (130); then says how to continue.

    Args:
        directory: the run's, open (:func:`s2w.launch.run_directory.opened`).
        command: of ``s2w``.
    """

    def stopping() -> None:
        progress.warn("finishing and saving the work in progress; a second signal stops the run at once")

    try:
        with progress:
            run_stoppable(work, stopping, lambda: f"ended at once; {saved(directory, command)}")
    except KeyboardInterrupt:
        progress.warn(f"interrupted; {saved(directory, command)}")
        return INTERRUPTED
    return 0


async def start_learner(config: Config, student: ModelReference, job: Job, ranks: Sequence[Place]) -> LearnerGroup:
    """The learner of one phase of ``job``: as :meth:`LearnerGroup.start`.

    Args:
        config: the job's, with what the phase changes.
        student: the checkpoint to start from.
        ranks: places of the ranks.
    """
    vocab_size = job.models.vocabulary.vocab_size
    return await LearnerGroup.start(config, student, job.device, vocab_size, job.progress, ranks)
