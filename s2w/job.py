"""What every phase of a run needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from s2w.config import Config
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.validate import Facts


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
