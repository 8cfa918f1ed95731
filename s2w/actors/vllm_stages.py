"""Has vLLM's processes tell what they do while an engine starts, and why they end; see :mod:`s2w.actors.stages`."""

from __future__ import annotations

import functools
import logging
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from s2w.actors import bars, stages

EXECUTOR_STAGES = {
    "determine_available_memory": "profiling memory for the KV cache",
    "compile_or_warm_up_model": "warming up",
}
"""Stages by the method of vLLM's executor in which they happen."""


ENDS = (
    "EngineCore failed to start.",
    "EngineCore encountered a fatal error.",
    "WorkerProc failed to start.",
    "WorkerProc failed.",
)
"""What vLLM logs, with the exception, when such a process ends; the front end hears only that it has."""


class _Ends(logging.Handler):
    """Puts the exception of a process that ends on the board."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg in ENDS and record.exc_info and (error := record.exc_info[1]) is not None:
            stages.fail(f"{type(error).__name__}: {error}")


@functools.cache
def register() -> None:
    """Hooks into engine cores and workers; does nothing in the front end, whose stages the actor knows; idempotent.

    Shards and CUDA graphs are counted by vLLM's own progress bars.
    """
    if multiprocessing.parent_process() is None:
        return
    from vllm.compilation import decorators
    from vllm.v1.executor.abstract import Executor

    stages.join_board()
    bars.report()
    logging.getLogger("vllm").addHandler(_Ends(logging.ERROR))
    for method, name in EXECUTOR_STAGES.items():
        setattr(Executor, method, _entering(getattr(Executor, method), name))
    compiles = decorators.monitor_torch_compile

    @contextmanager
    @functools.wraps(compiles)
    def monitor_torch_compile(*args: Any, **kwargs: Any) -> Iterator[None]:
        with stages.during("compiling"), compiles(*args, **kwargs):
            yield

    decorators.monitor_torch_compile = monitor_torch_compile


def _entering(method: Any, name: str) -> Any:
    @functools.wraps(method)
    def entering(*args: Any, **kwargs: Any) -> Any:
        stages.enter(name)
        return method(*args, **kwargs)

    return entering
