"""A swap: the learner's weights become the next policy version in every engine, with the requests kept running.

:func:`publish` drives both sides from the controller: the learner as a :class:`WeightSource`, whose ranks each hold a
:class:`~s2w.weights.transfer.Transfer`, and each engine as a :class:`WeightReceiver`. The same code runs over shared
memory and over NCCL.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from s2w.actors.failures import PROCESS_DEATHS, reason, root
from s2w.weights.probe import EngineProbe

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from s2w.weights.transfer import Update

T = TypeVar("T")


class WeightSource(Protocol):
    """The learner group. Each call reaches every rank's ``Transfer`` at the same time; it raises the exception of the
    first rank that fails, without waiting for the others."""

    async def prepare_weights(self, workers: dict[int, int]) -> Update:
        """Does what can be done while the engines generate; ``workers`` as in ``Transfer.prepare``."""

    async def connect_weights(self) -> None:
        """Connects to the engines, which connect at the same time."""

    async def send_weights(self) -> None:
        """Sends the weights; the engines receive at the same time."""


class WeightReceiver(Protocol):
    """One engine, as a swap sees it; see :class:`EngineWeights`, which does the work beside it."""

    @property
    def workers(self) -> int:
        """Worker processes (tensor x pipeline parallel) of the engine."""

    async def connect(self, info: dict[str, Any]) -> None: ...

    async def pause(self) -> None: ...

    async def load(self, info: dict[str, Any]) -> None: ...

    async def finish(self, version: int, probe_ids: np.ndarray | None) -> None: ...

    async def resume(self) -> None: ...


class EngineWeights:
    """One engine's side of a swap; lives beside its ``AsyncLLM``."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.llm = llm
        self._probe: EngineProbe | None = None

    async def connect(self, info: dict[str, Any]) -> None:
        """Connects to the learner; ``info`` is the backend's ``init_info``."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self.llm.shutdown_weight_transfer_engine()  # The connection to an earlier group, if there is one.
        await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(info))

    async def pause(self) -> None:
        """Stops scheduling; running requests stay and continue after :meth:`resume`.

        Their KV cache is dropped and recomputed from the new weights, so a token never mixes two versions, and
        no later request finds a prefix that the old weights computed.
        """
        await self.llm.pause_generation(mode="keep", clear_cache=True)

    async def load(self, info: dict[str, Any]) -> None:
        """Loads the weights; ``info`` is the backend's ``update_info``.

        Raises:
            Exception: vLLM's, with the reason in its text. The weights are then a mixture of old and new: the
                engine must not resume before an update succeeds.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.llm.start_weight_update()
        try:
            await self.llm.update_weights(WeightTransferUpdateRequest(info))
        except Exception:
            # vLLM ends the session of the worker that raised; this ends it in the others, so that the next update
            # can start.
            with suppress(Exception):
                await self.llm.finish_weight_update()
            raise

    async def finish(self, version: int, probe_ids: np.ndarray | None) -> None:
        """Makes the loaded weights policy ``version``: tokens sampled from now on are marked with it.

        Args:
            probe_ids: tokens of a probe, which is the first request that the new weights compute.
        """
        await self.llm.finish_weight_update(weight_version=str(version))
        if probe_ids is not None:
            # Now, because pausing has freed all of the engine's slots: once it runs they may be full of responses for
            # minutes.
            self._probe = await EngineProbe.enqueue(self.llm, probe_ids)

    async def resume(self) -> None:
        """Lets requests continue."""
        await self.llm.resume_generation()

    async def probed(self) -> np.ndarray:
        """Log-probs of the last swap's probe, see :func:`s2w.weights.probe.engine_log_probs`."""
        assert self._probe is not None
        return await self._probe.result()


@dataclass(frozen=True, slots=True)
class SwapReport:
    """What a swap cost; milliseconds of wall-clock time."""

    version: int
    bytes: int
    """Bytes of the model in the engines' dtype; each engine reads them once."""
    gather_ms: float
    """Before the engines stopped: gathering and, over shared memory, writing."""
    pause_ms: float
    """From the request to pause until the last engine has resumed."""
    load_ms: float
    """The part of ``pause_ms`` in which weights moved into the engines."""
    total_ms: float


class SwapError(RuntimeError):
    """A swap failed in some engines.

    Attributes:
        engines: the errors by engine number. Such an engine has unknown weights or does not answer: it stays paused
            until a later swap succeeds in it or it is replaced. All others are running, with the old version if the
            swap had not reached loading, else with the new one.
    """

    def __init__(self, version: int, step: str, engines: dict[int, BaseException]) -> None:
        self.engines = engines
        reasons = "; ".join(
            f"engine {engine}: {reason(error, f'rollout engine {engine}')}" for engine, error in engines.items()
        )
        super().__init__(f"swap to version {version} failed to {step}: {reasons}")

    def survivable(self, engines: Collection[int]) -> bool:
        """Whether a swap without the engines that failed may succeed; not if all of ``engines`` refuse it alike."""
        deaths = (*PROCESS_DEATHS, TimeoutError)
        return len(self.engines) < len(engines) or any(isinstance(root(one), deaths) for one in self.engines.values())


async def publish(
    learner: WeightSource,
    engines: Mapping[int, WeightReceiver],
    version: int,
    probe_ids: np.ndarray | None = None,
    timeout_s: float = 600.0,
) -> SwapReport:
    """Puts the learner's weights into every engine as policy ``version``.

    Args:
        engines: by number. An engine that replaces another has a new number, which shows that it must connect.
        probe_ids: int32 [n], tokens whose log-probs each engine computes before any other request; see
            :meth:`EngineWeights.probed`.
        timeout_s: of each step; a peer that died inside a broadcast is noticed in no other way.

    Raises:
        SwapError: engines failed; its text says which and why.
        TimeoutError: the learner did not answer in time.
        Exception: the learner's own. If weights were already being sent, the engines stay paused.
    """
    workers = {number: engine.workers for number, engine in engines.items()}
    began = time.perf_counter()
    loaded = began

    async def in_time(what: str, work: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(work, timeout_s)
        except TimeoutError:
            raise TimeoutError(f"{what} within {timeout_s:g} s") from None

    async def load(number: int) -> None:
        nonlocal loaded
        await in_time("it did not load", engines[number].load(update.info))
        await in_time("it did not finish", engines[number].finish(version, probe_ids))
        loaded = max(loaded, time.perf_counter())
        await resume(number)

    async def connect(number: int) -> None:
        await in_time("it did not connect", engines[number].connect(update.connect[number]))

    async def pause(number: int) -> None:
        await in_time("it did not pause", engines[number].pause())

    async def resume(number: int) -> None:
        await in_time("it did not resume", engines[number].resume())

    update = await in_time("the learner did not prepare", learner.prepare_weights(workers))
    gathered = time.perf_counter()
    if update.connect:
        meeting = in_time("the learner did not connect", learner.connect_weights())
        _check(version, "connect", await _while_sending(meeting, _each(update.connect, connect)))
    stop = time.perf_counter()
    failed = await _each(workers, pause)
    if failed:
        await _each(workers.keys() - failed.keys(), resume)
    _check(version, "pause", failed)
    stopped = time.perf_counter()
    sending = in_time("the learner did not send", learner.send_weights())
    _check(version, "load", await _while_sending(sending, _each(workers, load)))
    resumed = time.perf_counter()
    return SwapReport(
        version=version,
        bytes=update.nbytes,
        gather_ms=(gathered - began) * 1e3,
        pause_ms=(resumed - stop) * 1e3,
        load_ms=(loaded - stopped) * 1e3,
        total_ms=(time.perf_counter() - began) * 1e3,
    )


async def _each(engines: Iterable[int], work: Callable[[int], Awaitable[None]]) -> dict[int, BaseException]:
    """Does ``work`` for all engines at once and waits for all; returns the errors by engine number."""
    engines = list(engines)
    results = await asyncio.gather(*(work(engine) for engine in engines), return_exceptions=True)
    return {engine: r for engine, r in zip(engines, results, strict=True) if isinstance(r, BaseException)}


async def _while_sending(
    sending: Coroutine[Any, Any, None], receiving: Coroutine[Any, Any, dict[int, BaseException]]
) -> dict[int, BaseException]:
    """Runs both sides; returns the engines' errors, or raises the learner's if it fails before they end."""
    sent, received = asyncio.create_task(sending), asyncio.create_task(receiving)
    try:
        await asyncio.wait({sent, received}, return_when=asyncio.FIRST_EXCEPTION)
        errors = received.result() if received.done() else {}
        if not errors:
            await sent
        return errors
    finally:
        for task in (sent, received):
            task.cancel()
        await asyncio.gather(sent, received, return_exceptions=True)


def _check(version: int, step: str, errors: dict[int, BaseException]) -> None:
    if errors:
        raise SwapError(version, step, errors)
