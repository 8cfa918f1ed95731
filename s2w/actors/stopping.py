"""What SIGINT and SIGTERM do: the first ends the work in an orderly way, the second at once."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import psutil

P = ParamSpec("P")
T = TypeVar("T")

INTERRUPTED = 130
"""Exit code after SIGINT or SIGTERM, what shells use for SIGINT."""


def uninterrupted(work: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Makes every call of the coroutine function ``work`` a unit: if cancelled, it finishes first.

    If the work fails meanwhile, its error is raised in place of the cancellation.
    """

    @functools.wraps(work)
    async def unit(*args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.create_task(work(*args, **kwargs))
        cancellation: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.wait([task])  # Unlike `await task`, it leaves the task alone when it is cancelled.
            except asyncio.CancelledError as error:
                cancellation = error
        result = task.result()
        if cancellation is not None:
            raise cancellation
        return result

    return unit


def run_stoppable(
    work: Coroutine[Any, Any, T], stopping: Callable[[], None] = lambda: None, last_words: Callable[[], str] = str
) -> T:
    """``asyncio.run`` that SIGINT and SIGTERM end alike, also where SIGINT was ignored, as in a shell's
    background job.

    Args:
        stopping: called when the first signal has come and ``work`` is cancelled.
        last_words: printed when a second one comes, which ends this process with exit code 130, wherever it is.

    Raises:
        KeyboardInterrupt: a signal came, and the work has ended.
    """
    task: asyncio.Task[T] | None = None
    loop: asyncio.AbstractEventLoop
    stopped = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            # Not print, which this handler may have interrupted.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"s2w: {last_words()}\n".encode())
            os._exit(INTERRUPTED)
        stopped = True
        if task is not None:
            loop.call_soon_threadsafe(cancel)

    def cancel() -> None:
        assert task is not None
        task.cancel()
        stopping()

    async def main() -> T:
        nonlocal task, loop
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        if stopped:
            cancel()
        return await work

    with handling_stop_signals(on_signal):
        try:
            return asyncio.run(main())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


@contextmanager
def ending_at_once(word: str) -> Iterator[None]:
    """SIGINT and SIGTERM end this process and its children meanwhile, with exit code 130, whatever it is doing.

    For calls into C that may wait for long: Python's own handlers come after them. Only in the main thread.

    Args:
        word: printed then.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while number := os.read(reading, 1)[0]:
            if number in (signal.SIGINT, signal.SIGTERM):
                family = psutil.Process().children(recursive=True)
                # Not print, since the main thread may be in the middle of one.
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"s2w: {word}\n".encode())
                for process in family:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                os._exit(INTERRUPTED)

    watcher = threading.Thread(target=watch, name="stop-signals", daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writing)
    try:
        with handling_stop_signals(lambda number, frame: None):
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, b"\0")
        watcher.join()  # For ever, if a signal came.
        os.close(reading)
        os.close(writing)


@contextmanager
def handling_stop_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Sends SIGINT and SIGTERM to ``handler`` in the meantime."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
