"""The driver's view of actors that start: it asks what they do, and shows it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from s2w.actors.stages import UP, Stage

POLL_S = 1.0
"""Seconds between two questions to an actor."""
_GROUP = "stage"
"""Ray's concurrency group of the method ``stage``: a thread of its own."""


class Watcher(Protocol):
    """Shows how actors start."""

    def starting(self, what: str, stages: Mapping[int, Stage]) -> None:
        """What the actors of a kind do now, by their number; called about every second.

        Args:
            what: the kind, such as "rollout engine".
        """

    def started(self, what: str, stages: Mapping[int, Stage], seconds: float) -> None:
        """Nothing follows: they are up after so many seconds, or their start has failed at these stages."""

    def warn(self, text: str) -> None:
        """A sentence about an actor that died, and what is done about it."""


async def start_all(starts: Mapping[str, Callable[[], Coroutine[Any, Any, Any]]], in_turn: bool) -> dict[str, Any]:
    """Starts parts at once and waits for all; returns what each start returned.

    Args:
        in_turn: one after the other: parts that share a GPU, since vLLM measures what is free on it while it starts.
    """
    if in_turn:
        return {name: await start() for name, start in starts.items()}
    async with asyncio.TaskGroup() as group:
        tasks = {name: group.create_task(start()) for name, start in starts.items()}
    return {name: task.result() for name, task in tasks.items()}


def answering(actor: type) -> Any:
    """The Ray class of actors that answer ``stage()`` while another method keeps them busy."""
    return ray.remote(concurrency_groups={_GROUP: 1})(actor)  # type: ignore[call-overload]  # documented


@asynccontextmanager
async def watched(
    what: str, actors: Mapping[int, Any], watcher: Watcher | None
) -> AsyncIterator[Callable[[], Mapping[int, Stage]]]:
    """While it is open, asks the actors for their stages and tells ``watcher``; nothing is asked afterwards.

    Args:
        what: the kind of the actors, such as "rollout engine".
        actors: of classes made with :func:`answering`, by number.
        watcher: None shows nothing.

    Yields:
        What gives the stages as they were last told.
    """
    began = time.monotonic()
    # What an actor answered, and when. One that has not answered yet has no process.
    answers: dict[int, tuple[Stage, float]] = {number: (Stage("starting its process"), began) for number in actors}

    def stages() -> dict[int, Stage]:
        now = time.monotonic()
        return {i: replace(stage, seconds=stage.seconds + now - asked) for i, (stage, asked) in answers.items()}

    async def ask(number: int, actor: Any) -> None:
        with suppress(RayError):  # It has died: whoever waits for it hears why.
            while answers[number][0].name != UP:
                stage = await actor.stage.options(concurrency_group=_GROUP).remote()
                answers[number] = stage, time.monotonic()
                await asyncio.sleep(POLL_S)

    async def tell(watcher: Watcher) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            watcher.starting(what, stages())

    tasks = [asyncio.create_task(ask(number, actor)) for number, actor in actors.items()]
    if watcher is not None:
        tasks.append(asyncio.create_task(tell(watcher)))
    up = False
    try:
        yield stages
        up = True
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if watcher is not None:
            last = dict.fromkeys(actors, Stage(UP)) if up else stages()
            watcher.started(what, last, time.monotonic() - began)
