"""What an actor does while it starts, which may take minutes: told where it happens, asked for by the driver.

The stage of an actor stands on its board: a file in memory that the actor makes (:func:`open_board`) and that its child
processes find through their environment (:func:`join_board`). So vLLM's engine core and workers tell what they do as
the actor itself does, with :func:`enter`, and nothing is left behind, however they end.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

UP = "up"
"""The last stage."""

_BOARD = "S2W_STAGE_BOARD"
_BYTES = 1024
"""Size of a record on the board: JSON, filled up with spaces."""
_LONGEST = 100
"""Characters of a name or detail that are kept."""
_FAILURE = 4096
"""Offset on the board of why an engine failed, and the most bytes of it."""
_file: int | None = None
"""The board, as this process has it open."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What an actor is doing."""

    name: str
    """Such as "loading weights"."""
    detail: str = ""
    """How far it has come, such as "shard 3 of 118"; may be empty."""
    seconds: float = 0.0
    """Since it began."""
    number: int = 0
    """Stages before it: of actors that do the same, the one with the lowest number is furthest behind."""

    def __str__(self) -> str:
        return ", ".join(filter(None, [self.name, self.detail, duration(self.seconds)]))


def open_board() -> None:
    """Makes the board of this process, an actor; processes that it starts from now on find it."""
    global _file
    _file = os.memfd_create("s2w-stage")
    os.environ[_BOARD] = f"/proc/{os.getpid()}/fd/{_file}"
    enter("starting")


def join_board() -> None:
    """Finds the board of the actor that started this process; without one :func:`enter` does nothing."""
    global _file
    if _file is None and (path := os.environ.get(_BOARD)):
        with suppress(OSError):  # The actor has just died.
            _file = os.open(path, os.O_RDWR)


def enter(name: str, detail: str = "") -> None:
    """The actor of this process is at the stage ``name`` from now on, or has come further in it."""
    if _file is None:
        return
    last, began, number = _read(_file)
    if last.name != name:
        began, number = time.monotonic(), number + 1
    record = json.dumps([name[:_LONGEST], detail[:_LONGEST], began, number], ensure_ascii=False)
    os.pwrite(_file, record.encode().ljust(_BYTES), 0)


def fail(text: str) -> None:
    """A process of this actor's engine ends for the reason ``text``; the first one counts, others follow from it."""
    if _file is not None and not failure():
        os.pwrite(_file, text.encode()[:_FAILURE], _FAILURE)


def failure() -> str:
    """Why the engine of this process's actor failed; empty if it did not, or nobody could tell."""
    return "" if _file is None else os.pread(_file, _FAILURE, _FAILURE).decode(errors="ignore")


@contextmanager
def during(name: str) -> Iterator[None]:
    """A stage within another one, which goes on afterwards."""
    before = current().name
    enter(name)
    try:
        yield
    finally:
        enter(before)


def current() -> Stage:
    """The stage of this process's actor."""
    if _file is None:
        return Stage("")
    return _read(_file)[0]


def _read(file: int) -> tuple[Stage, float, int]:
    """The stage on a board, when it began (``time.monotonic``, the same in all processes of a machine), its number."""
    while content := os.pread(file, _BYTES, 0):
        with suppress(ValueError):  # Another process is writing.
            name, detail, began, number = json.loads(content)
            return Stage(name, detail, time.monotonic() - began, number), began, number
    return Stage(""), 0.0, 0


def slowest(stages: Mapping[int, Stage]) -> int | None:
    """Number of the actor that is furthest behind; None if all are up."""
    starting = [i for i, stage in stages.items() if stage.name != UP]
    return min(starting, key=lambda i: (stages[i].number, -stages[i].seconds), default=None)


def describe(what: str, stages: Mapping[int, Stage]) -> str:
    """The slowest actor by name, with its stage, and where the others are.

    Args:
        what: the kind of the actors, such as "rollout engine".
        stages: of all of them, by number.
    """
    last = slowest(stages)
    if last is None:
        return f"{what} {next(iter(stages))} is up" if len(stages) == 1 else f"all {len(stages)} {what}s are up"
    text = f"{what} {last}: {stages[last]}"
    others = Counter(stage.name for i, stage in stages.items() if i != last)
    if others:
        text += f" (of the others {', '.join(f'{count} {name}' for name, count in others.items())})"
    return text


def duration(seconds: float) -> str:
    """``41 s``, ``3:25`` (minutes) or ``1:03:25``."""
    whole = round(max(seconds, 0))
    if whole < 100:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes = f"{rest // 60:02}" if hours else f"{rest // 60}"
    return (f"{hours}:" if hours else "") + f"{minutes}:{rest % 60:02}"
