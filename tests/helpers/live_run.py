"""`s2w` as a user runs it, a process of its own, and every process that it brings with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

GRACE_S = 15
"""No process of a run outlives it by more than this."""


class LiveRun:
    """A command under way.

    Args:
        process: its driver.
        output: file that its output goes to.
        ray_directory: Ray's, of the cluster that it starts or joins.
    """

    def __init__(self, process: psutil.Popen, output: Path, ray_directory: str) -> None:
        self.process, self.output, self.ray_directory = process, output, ray_directory
        self.family: dict[int, psutil.Process] = {}
        """All descendants that were seen, by pid."""

    def text(self) -> str:
        """What it has printed so far, to both of its streams."""
        return self.output.read_text()

    def until(self, condition: Callable[[], bool], seconds: float = 400) -> None:
        """Waits for ``condition``; fails if the run ends before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)

    def until_said(self, words: str, seconds: float = 400) -> None:
        """Waits until it has printed ``words``."""
        self.until(lambda: words in self.text(), seconds)

    def last_line(self) -> str:
        """The last line of that."""
        return self.text().rstrip().splitlines()[-1]

    def processes(self, title: str = "") -> list[psutil.Process]:
        """The descendants whose title (Ray and vLLM set one) begins with ``title``."""
        found = []
        for process in self.process.children(recursive=True):
            try:
                command = " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            self.family[process.pid] = process
            if command.startswith(title):
                found.append(process)
        return found

    def survivors(self) -> list[str]:
        """What is left :data:`GRACE_S` after now of the processes that were seen."""
        psutil.wait_procs([process for process in self.family.values() if runs(process)], timeout=GRACE_S)
        return [str(process) for process in self.family.values() if runs(process)]

    def wait(self, seconds: float = 120) -> int:
        """Exit code of the driver."""
        return self.process.wait(seconds)


def runs(process: psutil.Process) -> bool:
    """It has not ended."""
    # Whoever adopts an orphan may leave it as a zombie.
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@contextmanager
def live_run(
    command: list[str], output: Path, *, cluster: LiveRun | None = None, ignore_sigint: bool = False
) -> Iterator[LiveRun]:
    """Starts ``command`` in a session of its own; what is left of it at the end is killed.

    Args:
        command: arguments of Python.
        cluster: a Ray head that the command joins.
        ignore_sigint: as a shell without job control starts a job in the background.
    """
    # Ray joins a cluster that it finds in its directory; sockets there have paths of at most 107 bytes.
    ray_directory = cluster.ray_directory if cluster else tempfile.mkdtemp(prefix="s2w-", dir="/tmp")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignore_sigint else signal.SIG_DFL)
    try:
        with output.open("w") as file:
            process = psutil.Popen(
                [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=os.environ | {"RAY_TMPDIR": ray_directory}, start_new_session=True,
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    run = LiveRun(process, output, ray_directory)
    try:
        yield run
    finally:
        for member in [*run.family.values(), process]:
            if member.is_running():
                member.kill()
        process.wait()
        if cluster is None:
            shutil.rmtree(ray_directory, ignore_errors=True)
