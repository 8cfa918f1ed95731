"""Verification in a child process with a time limit: scorers parse what a model wrote, and some of it never ends.

Several reasoning-gym scorers evaluate the answer as an expression: ``9**9**9`` would hold the caller for ever.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType

from s2w.data import tasks
from s2w.data.verifiers import verify
from s2w.errors import ConfigError
from s2w.records import Prompt


class VerifierClosedError(RuntimeError):
    """:meth:`VerifierProcess.close` was called meanwhile."""


class VerifierProcess:
    """Scores answers one at a time; a context manager. Not for use from several threads at once, but for ``close``.

    Args:
        timeout_s: seconds for one answer; one that takes longer, or brings the process down, scores 0.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        self._timeout_s = timeout_s
        self._closed = False
        self._changing = threading.Lock()
        self._start()

    def verify(self, prompt: Prompt, answer_text: str) -> float:
        """:func:`s2w.data.verifiers.verify` within the time limit.

        Raises:
            ConfigError: as there.
            VerifierClosedError: the process was ended, here or from another thread.
        """
        try:
            self._connection.send((prompt, answer_text))
            result = self._connection.recv() if self._connection.poll(self._timeout_s) else None
        except (EOFError, OSError):
            result = None
        if result is None:
            self._end()
            self._start()
            return 0.0
        if isinstance(result, ConfigError):
            raise result
        return result

    def close(self) -> None:
        """Ends the process, whatever it is doing, for good; from any thread."""
        self._closed = True
        self._end()

    def __enter__(self) -> VerifierProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        with self._changing:
            if self._closed:
                raise VerifierClosedError("the verifier's process has been ended")
            # Not fork: callers have threads (Ray, OpenMP), which a forked child would find holding locks.
            context = multiprocessing.get_context("spawn")
            self._connection, far = context.Pipe()
            self._process = context.Process(target=_serve, args=(far, self._timeout_s), daemon=True)
            self._process.start()
            far.close()
        with suppress(EOFError, OSError):
            self._connection.recv()  # Imports are done: the time limit is for answers alone.

    def _end(self) -> None:
        with self._changing:
            self._process.kill()
            self._process.join()
            self._connection.close()


def _serve(connection: Connection, timeout_s: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; its parent decides when it ends.
    tasks.task_names()
    connection.send("ready")
    while True:
        try:
            prompt, answer_text = connection.recv()
        except EOFError:
            return  # The parent is gone.
        # If the parent goes while an answer holds the interpreter, only the kernel can end this process.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)
        try:
            connection.send(verify(prompt, answer_text))
        except ConfigError as error:
            connection.send(error)
        except BrokenPipeError:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
