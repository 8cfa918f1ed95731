"""A run: what every phase of it needs to know, its directory, and how it ends early."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2w.compose import to_yaml
from s2w.config import Config
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.validate import Facts

INTERRUPTED = 130
"""Exit code after SIGINT or SIGTERM, a shell's own for SIGINT."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run, validated and connected to its cluster."""

    config: Config
    facts: Facts
    device: str
    """cuda or cpu."""
    directory: Path
    """The run directory."""
    recorder: Recorder
    progress: Progress


def open_directory(config: Config) -> Path:
    """The run directory, made if it is not there, with the resolved settings in it."""
    directory = Path(config.run.dir).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(to_yaml(config))
    return directory


def run_interruptibly(work: Coroutine[Any, Any, None], config: Config, progress: Progress) -> int:
    """Runs ``work`` to its end (0), or until SIGINT or SIGTERM cancels it (130); then says how to go on."""

    async def cancellable() -> None:
        task = asyncio.current_task()
        assert task is not None
        # `ray job stop` and batch systems end a job with SIGTERM; asyncio treats SIGINT the same way by itself.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await work

    try:
        asyncio.run(cancellable())
    except (KeyboardInterrupt, asyncio.CancelledError):
        progress.say(f"interrupted; to continue: the same command with run.dir={config.run.dir} run.resume=true")
        return INTERRUPTED
    return 0
