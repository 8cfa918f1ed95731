"""Processes that end with the one that started them, however that one ended."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading


def die_with_parent() -> None:
    """Kills this process as soon as the one that started it by ``multiprocessing`` is gone; idempotent.

    It waits on the pipe whose other end only the parent holds: unlike the parent's pid it cannot come to mean another
    process, it is also at its end if the parent died before this call, and unlike PR_SET_PDEATHSIG it does not take
    the end of the parent's thread for the parent's. Does nothing in a process that was started in another way.
    """
    _watch_parent(os.getpid())


@functools.cache
def _watch_parent(pid: int) -> None:
    """Starts the thread that waits, once in process ``pid``: a forked child has its parent's cache."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=wait, name="die-with-parent", daemon=True).start()
