"""Checkpoints of a phase: when they are due, and a last one when it ends early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from s2w.actors.stopping import uninterrupted
from s2w.learner.group import LearnerGroup


class Saver:
    """Saves the updates of one phase.

    Args:
        directory: the phase's checkpoints.
        keep: checkpoints that stay on disk.
        step: updates that the learner's weights have already had (resume).
        say: prints a line.
        texts: what else is written into the checkpoint of a step, by file name.
    """

    def __init__(
        self,
        learner: LearnerGroup,
        directory: Path,
        keep: int,
        step: int,
        say: Callable[[str], None],
        texts: Callable[[int], Mapping[str, str]],
    ) -> None:
        self.directory = directory
        self._learner, self._keep, self._say, self._texts = learner, keep, say, texts
        self._saved = step

    @uninterrupted
    async def save(self, step: int, data: dict[str, Any]) -> None:
        """Writes the checkpoint after ``step`` updates, with ``data``, unless it is there."""
        if step == self._saved:
            return
        path = await self._learner.save(self.directory, step, data, self._keep, self._texts(step))
        self._saved = step
        self._say(f"saved {path}")

    async def rescue(self, step: int, data: dict[str, Any]) -> None:
        """:meth:`save`, while an exception ends the phase: never raises another one."""
        try:
            await self.save(step, data)
        except Exception as error:
            self._say(f"the updates since step {self._saved} could not be saved: {error}")


def due(step: int, every: int) -> bool:
    """Whether something done every ``every`` steps (0: never) is due after ``step``."""
    return every > 0 and step % every == 0
