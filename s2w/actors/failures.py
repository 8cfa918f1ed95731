"""What a user reads when a run fails: one sentence; the traceback goes to a file."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from s2w.errors import ConfigError, PreflightError, RunError

T = TypeVar("T")

LONGEST = 500
"""Characters of a library's message that are kept."""


class EngineDiedError(RuntimeError):
    """The engine core of a vLLM engine is gone: its actor cannot serve any more. The text says how it ended."""


PROCESS_DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, EngineDiedError)
"""An actor or its engine is gone."""

PROCESS_DEATH = re.compile(r"pid: (?P<pid>\d+) .*Worker exit detail: (?P<detail>.*?)(?: Some common causes|$)")
"""Ray's text about an actor whose process is gone; what it says after that is guesses."""
NO_WORD = re.compile("Worker unexpectedly exits with a connection error|Worker connection closed unexpectedly")
"""Ray's two wordings for a process whose end it has not seen."""
LESS_MEMORY = {
    "rollout engine": "rollout.kv_cache_gib, rollout.max_sequences or rollout.engines",
    "teacher": "teacher.kv_cache_gib, teacher.max_sequences or teacher.replicas",
    "learner rank": (
        "learner.tokens_per_micro_batch, loss.chunk_rows or learner.ranks, or set learner.activation_checkpointing=true"
    ),
}
"""Settings that make each kind of actor smaller."""


class ActorFailedError(RuntimeError):
    """A call of an actor failed; the text names the actor and says why, in one line."""


async def answer(who: str, call: Awaitable[T]) -> T:
    """The result of an actor's call.

    Args:
        who: the actor, such as "rollout engine 2".

    Raises:
        ActorFailedError: the actor or its engine died.
        Exception: what the call raised.
    """
    try:
        return await call
    except PROCESS_DEATHS as error:
        raise ActorFailedError(f"{who} died: {reason(error, who)}") from error


def reason(error: BaseException, who: str = "") -> str:
    """Why ``error`` happened, in one line without a full stop at its end.

    Args:
        who: the actor it happened to, for the settings that make it smaller.
    """
    error = root(error)
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError):
        return f"Ray killed it because the node ran out of memory{_memory_users(str(error))}{_less_memory(who)}"
    if isinstance(error, ActorDiedError) and (found := PROCESS_DEATH.search(text)):
        how = "was killed or crashed" if NO_WORD.search(found["detail"]) else f"ended: {_end(found['detail'])}"
        return f"its process {found['pid']} {how}{_less_memory(who)}"
    if isinstance(error, RayActorError) and "creation task" in text:
        text = str(error).strip().splitlines()[-1]
    if isinstance(error, EngineDiedError) and "killed" in text:
        text += _less_memory(who)
    if not text:
        return type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def root(error: BaseException) -> BaseException:
    """The error inside groups of errors and Ray's wrappers."""
    while True:
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            error = error.cause
        elif isinstance(error, BaseExceptionGroup):
            # Deaths say more than the errors they caused elsewhere.
            leaves = [root(one) for one in error.exceptions]
            error = next((one for one in leaves if isinstance(one, ActorFailedError)), leaves[0])
        else:
            return error


@contextmanager
def reported(log: Callable[[], Path], saved: Callable[[], str]) -> Iterator[None]:
    """Turns an error that ends a run into one sentence.

    Args:
        log: the file that the traceback is appended to.
        saved: what is on disk and how to continue, as the end of the sentence.

    Raises:
        RunError: in place of what the run raised.
        ConfigError, PreflightError: as the run raised them, taken out of any group.
    """
    try:
        yield
    except Exception as error:
        cause = root(error)
        if isinstance(cause, ConfigError | PreflightError | RunError):
            raise cause from None
        path = log()
        with path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{''.join(traceback.format_exception(error))}\n")
        named = type(cause).__module__.startswith("s2w.") or type(cause) in (RuntimeError, TimeoutError)
        what = reason(error) if named and str(cause) else f"{type(cause).__name__}: {reason(error)}"
        raise RunError(f"{_end(what)}; {saved()}; traceback: {path}") from error


def _memory_users(text: str) -> str:
    """From Ray's report: how full the node was, and the three processes that used most."""
    parts = [f"{used[1]} of {used[2]} GB"] if (used := re.search(r"([\d.]+)GB used / ([\d.]+)GB limit", text)) else []
    holders = re.findall(r"^\d+\t([\d.]+)\t(.+)$", text, re.MULTILINE)[:3]
    if holders:
        parts.append("most of it in " + ", ".join(f"{command[:40].strip()} ({size} GB)" for size, command in holders))
    return f" ({'; '.join(parts)})" if parts else ""


def _less_memory(who: str) -> str:
    kind = next((kind for kind in LESS_MEMORY if who.startswith(kind)), None)  # "teacher solver 1" is a teacher.
    return f"; if memory ran out, lower {LESS_MEMORY[kind]}" if kind else ""


def _end(text: str) -> str:
    return text.rstrip(" .")
