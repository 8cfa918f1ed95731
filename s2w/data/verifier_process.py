"""Verification in a child process with a time limit: scorers parse what a model wrote, and some of it never ends.

Several reasoning-gym scorers evaluate the answer as an expression: ``9**9**9`` would hold the caller for ever.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import Counter
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType

from s2w.data.verifiers import is_custom, prepare, verifier_at, verify
from s2w.errors import ConfigError, VerifierError
from s2w.records import Prompt

IMPORT_S = 120.0
"""Seconds that the import of a verifier may take, once in a process: they are no answer's."""
OVERDUE = 32
"""Responses in a row that a verifier of the user's may be too slow for, or end the process on. One can be the
response's fault, which scores 0; so many are the verifier's."""


class VerifierClosedError(RuntimeError):
    """:meth:`VerifierProcess.close` was called meanwhile."""


class VerifierProcess:
    """Scores answers one at a time; a context manager. Not for use from several threads at once, but for ``close``.

    Args:
        timeout_s: seconds for one answer; one that takes longer, or brings the process down, scores 0.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.timeout_s = timeout_s
        self._overdue: Counter[str] = Counter()
        self._closed = False
        self._changing = threading.Lock()
        self._start()

    def verify(self, prompt: Prompt, answer_text: str) -> float:
        """:func:`s2w.data.verifiers.verify` within the time limit.

        Raises:
            ConfigError, VerifierError: as there.
            VerifierError: a verifier of the user's was too slow for :data:`OVERDUE` responses in a row.
            VerifierClosedError: the process was ended, here or from another thread.
        """
        score = self.timed(prompt, answer_text)
        if score is not None:
            self._overdue[prompt.task] = 0
            return score
        self._overdue[prompt.task] += 1
        if self._overdue[prompt.task] >= OVERDUE and is_custom(prompt.task):
            raise VerifierError(
                f"{verifier_at(prompt)} took more than {self.timeout_s:g} s, or ended its process, for {OVERDUE} "
                "responses in a row: make it faster, or have it return 0 for what takes too long"
            )
        return 0.0

    def timed(self, prompt: Prompt, answer_text: str) -> float | None:
        """As :meth:`verify`, but None where the verifier did not answer in time, or ended the process."""
        if prompt.task not in self._prepared:
            self.prepare(prompt.task)
        try:
            return self._ask((prompt, answer_text), self.timeout_s)
        except OSError:
            self._restart()
            return None

    def prepare(self, task: str) -> None:
        """Imports a task's verifier: :func:`s2w.data.verifiers.prepare` within :data:`IMPORT_S`.

        Raises:
            ConfigError: as there, or it took longer.
        """
        try:
            self._ask(task, IMPORT_S)
        except OSError:
            self._restart()
            raise ConfigError(
                f"task {task!r}: the import of its verifier took more than {IMPORT_S:g} s, or ended the process"
            ) from None
        self._prepared.add(task)

    def _ask(self, request: str | tuple[Prompt, str], timeout_s: float) -> float:
        """What the process answers; OSError if it does not, in time or at all."""
        try:
            self._connection.send(request)
            if not self._connection.poll(timeout_s):
                raise TimeoutError
            result = self._connection.recv()
        except EOFError as error:
            raise ConnectionError from error
        if isinstance(result, ConfigError | VerifierError):
            raise result
        return result

    def _restart(self) -> None:
        self._end()
        self._start()

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
        self._prepared: set[str] = set()
        with self._changing:
            if self._closed:
                raise VerifierClosedError("the verifier's process has been ended")
            # Not fork: callers have threads (Ray, OpenMP), which a forked child would find holding locks.
            context = multiprocessing.get_context("spawn")
            self._connection, far = context.Pipe()
            self._process = context.Process(target=_serve, args=(far, self.timeout_s), daemon=True)
            self._process.start()
            far.close()
        with suppress(EOFError, OSError):
            self._connection.recv()  # It is up: the time limit is for answers alone.

    def _end(self) -> None:
        with self._changing:
            self._process.kill()
            self._process.join()
            self._connection.close()


def _serve(connection: Connection, timeout_s: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; its parent decides when it ends.
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return  # The parent is gone.
        # If the parent goes while an answer holds the interpreter, only the kernel can end this process.
        signal.setitimer(signal.ITIMER_REAL, (IMPORT_S if isinstance(request, str) else timeout_s) + 1)
        try:
            if isinstance(request, str):
                prepare(request)
                connection.send(None)
            else:
                connection.send(verify(*request))
        except (ConfigError, VerifierError) as error:
            connection.send(error)
        except BrokenPipeError:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
