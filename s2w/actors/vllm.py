"""What every Ray actor that runs a vLLM engine needs: its resources and its process environment."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, cast

from s2w.actors import stages
from s2w.actors.failures import EngineDiedError
from s2w.actors.hardware import core_count, cpu_environment, shares_gpu

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

CONCURRENT_CALLS = 10_000
"""Calls that may wait inside one asyncio actor; vLLM's scheduler does the real queueing."""


RECHECK_S = 0.2
"""Seconds between two checks whether vLLM has noticed that an engine core is gone."""
SHUTDOWN_S = 10
"""Seconds that an actor may take to end its engine before it is killed."""


def actor_options(device: str, cpus: float, world: int, gpus: float = 1.0, *, verbose: bool = False) -> dict[str, Any]:
    """Ray options of an actor whose engine spans ``world`` workers (tensor x pipeline parallel).

    vLLM logs its errors there, and what it does if ``verbose``. Each worker reserves the share ``gpus`` of a GPU.

    The workers are child processes of the actor, so the actor reserves all of the engine's GPUs on one node.
    """
    level = "INFO" if verbose else "ERROR"
    environment = {"VLLM_LOGGING_LEVEL": level, "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
    if device == "cpu":
        environment |= cpu_environment()
    if shares_gpu(device, gpus):
        # CUDA IPC handles pass between processes of vLLM, which has no other form for them than a pickle.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return {
        "num_cpus": cpus,
        "num_gpus": world * gpus if device == "cuda" else 0,
        "max_concurrency": CONCURRENT_CALLS,
        # Ray's control store would keep 3 KB for each request, up to 100,000 of them.
        "enable_task_events": False,
        "runtime_env": {"env_vars": environment},
    }


IN_ENGINE_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""vLLM's executor without worker processes."""


def prepare_process(
    device: str, world: int, threads: int | None, kv_cache_gib: int, spans_nodes: bool = False
) -> dict[str, Any]:
    """Sets what vLLM reads from the environment; call inside the actor, before vLLM is imported.

    Returns:
        Engine arguments that go with it. The workers are children of the actor, unless the engine spans nodes: inside a
        placement group vLLM would otherwise have Ray start them all. On CPU vLLM gives a single worker its own process,
        to set its threads by environment variables; here the engine core is started with those, so that the worker can
        be part of it: one process less to start, and no message to it at every token.
    """
    executor = {"distributed_executor_backend": "ray" if spans_nodes else "mp" if world > 1 else "uni"}
    if device != "cpu":
        return executor
    cores = sorted(os.sched_getaffinity(0))[: threads or core_count()]
    # vLLM leaves a core to its front end by default; a list of cores per worker makes it use all of them.
    share = max(1, len(cores) // world)
    lists = [cores[i * share : (i + 1) * share] or cores[-1:] for i in range(world)]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, cores)) for cores in lists)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib)
    if world > 1:
        return executor
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    return {"distributed_executor_backend": IN_ENGINE_CORE}


def fail_with_engine_core(llm: AsyncLLM) -> None:
    """Fails all that waits for the engine core of ``llm`` when its process ends; call it in the actor's event loop.

    vLLM itself fails only the requests: a pause or a step of a weight update would wait forever.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    client, loop = cast(Any, llm.engine_core), asyncio.get_running_loop()

    def fail() -> None:
        known = client.resources.engine_dead  # From then on vLLM refuses new calls.
        for answer in client.utility_results.values():
            if not answer.done():
                answer.set_exception(EngineDeadError())
        if not known:
            loop.call_later(RECHECK_S, fail)

    def ended(process: BaseProcess) -> None:
        loop.remove_reader(process.sentinel)
        fail()

    for process in client.resources.engine_manager.processes:
        loop.add_reader(process.sentinel, ended, process)


@contextmanager
def telling_start_failure() -> Iterator[None]:
    """Raises what ended the engine core, where vLLM says only that it did not start; :class:`EngineDiedError` if that
    was no error of its own."""
    try:
        yield
    except Exception as error:
        if why := stages.failure():
            raise RuntimeError(why) from error
        if found := re.search(r"Failed core proc\(s\): \{.*?: (-?\d+)\}", str(error)):
            raise EngineDiedError(f"its EngineCore process {_end(int(found[1]))}") from error
        raise


@contextmanager
def telling_engine_death(llm: AsyncLLM) -> Iterator[None]:
    """Raises :class:`EngineDiedError` where vLLM says only that the engine is dead."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        ends = [
            f"its {process.name} process {process.pid} {_end(process.exitcode)}"
            for process in cast(Any, llm.engine_core).resources.engine_manager.processes
            if connection.wait([process.sentinel], timeout=1)
        ]
        why = f": {failure}" if (failure := stages.failure()) else ""
        raise EngineDiedError((", ".join(ends) or str(error)) + why) from error


def _end(code: int | None) -> str:
    """How a process ended, by its exit code; None where something else has collected that."""
    if code is None:
        return "was killed or crashed"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
