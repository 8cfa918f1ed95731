"""Processes that end with the one that started them, however that one ended."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

import psutil

REAPER_GRACE_S = 5
"""How long processes may take to end by themselves."""


def die_with_parent() -> None:
    """Kills this process as soon as the one that started it by ``multiprocessing`` is gone; idempotent.

    It waits on the pipe whose other end only the parent holds. Unlike the parent's pid, it cannot come to mean another
    process; this also works if the parent died before this call; and unlike PR_SET_PDEATHSIG, it does not mistake the
    end of the parent's thread for the parent's. Does nothing in a process that was started in another way.
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


def start_reaper(family: Iterable[psutil.Process]) -> subprocess.Popen[bytes]:
    """Starts a process that kills what is left of ``family`` once this process is gone, however it ended.

    For processes that are not started by s2w. It has its own session, so that signals to this process and its
    group do not reach it; a process that ends in good order kills it.
    """
    members = json.dumps([(process.pid, process.create_time()) for process in family])
    command = [sys.executable, "-c", "from s2w.actors.orphans import reap; reap()", members]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def reap() -> None:
    """The reaper's work: waits for the end of its standard input, which only its parent holds open."""
    sys.stdin.buffer.read()
    time.sleep(REAPER_GRACE_S)
    for pid, created in json.loads(sys.argv[1]):
        try:
            process = psutil.Process(pid)
            if process.create_time() == created:  # Not another process with its number.
                process.kill()
        except psutil.NoSuchProcess:
            continue
