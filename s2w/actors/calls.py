"""Many calls to actors at once: to a whole pool while it starts, and to a pool for many responses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

import ray

from s2w.actors.failures import PROCESS_DEATHS, reason, root
from s2w.actors.stages import Stage, describe

Item = TypeVar("Item")
Result = TypeVar("Result")


async def each(
    items: Iterable[Item],
    call: Callable[[Item], Awaitable[Result]],
    *,
    at_once: int | None = None,
    done: Callable[[Item, Result], None] | None = None,
) -> list[Result]:
    """Calls ``call`` with every item; results in the order of the items. The one way to ask a pool for many responses.

    Args:
        at_once: most calls in flight; None for all.
        done: called with each item and its result, when it has one.

    Raises:
        BaseExceptionGroup: calls failed; the others are cancelled. What ``done`` has been called with stands.
    """
    wanted = list(items)
    results: list[Any] = [None] * len(wanted)
    waiting = iter(enumerate(wanted))

    async def work() -> None:
        for i, item in waiting:
            results[i] = await call(item)
            if done is not None:
                done(item, results[i])

    async with asyncio.TaskGroup() as group:
        for _ in range(min(at_once or len(wanted), len(wanted))):
            group.create_task(work())
    return results


async def all_up(
    what: str, calls: Mapping[int, ray.ObjectRef], timeout_s: float, stages: Callable[[], Mapping[int, Stage]]
) -> dict[int, Any]:
    """Results of the start-up calls of all actors of a pool, by the actors' numbers, by which they are given too.

    An actor that has died has a RuntimeError as its result, which says how; the others are waited for.

    Args:
        what: the kind of the actors, such as "rollout engine".
        stages: gives what each of them does, for the text of an error; as from :func:`s2w.actors.starting.watched`.

    Raises:
        RuntimeError: names the first actor that failed without dying, or how many were not up in ``timeout_s`` seconds.
    """
    tasks = {number: asyncio.ensure_future(as_future(call)) for number, call in calls.items()}
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout_s
    try:
        while len(results) < len(tasks):
            left = [task for number, task in tasks.items() if number not in results]
            await asyncio.wait(left, timeout=max(0, end - time.monotonic()), return_when=asyncio.FIRST_EXCEPTION)
            found = {number: task for number, task in tasks.items() if number not in results and task.done()}
            if not found:
                raise RuntimeError(
                    f"{len(left)} of {len(calls)} {what}s were not up after {timeout_s:.0f} s "
                    f"({describe(what, stages())}): give them more time (cluster.start_timeout_s) or look at the "
                    "cluster's free resources (ray status)"
                )
            for number, task in found.items():
                if (error := task.exception()) is None:
                    results[number] = task.result()
                    continue
                who = f"{what} {number}"
                results[number] = RuntimeError(f"{who} did not start: {reason(error, who)}")
                results[number].__cause__ = error
                if not isinstance(root(error), PROCESS_DEATHS):
                    raise results[number]
    finally:
        for task in tasks.values():
            task.cancel()  # Those that have not ended.
    return results


async def as_future(call: ray.ObjectRef) -> Any:
    """The result of an actor's call, as a coroutine: asyncio's tools do not take Ray's references."""
    return await call
