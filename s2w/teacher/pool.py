"""The pool of teacher engines: dispatch by load and by prefix, replacement of engines that die."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from s2w.actors.calls import all_up, as_future
from s2w.actors.failures import PROCESS_DEATHS, reason
from s2w.actors.vllm import SHUTDOWN_S, actor_options
from s2w.config.schema import SignalConfig, TeacherConfig
from s2w.records import Rollout, TeacherSignal
from s2w.teacher.engine import TeacherEngine
from s2w.teacher.signal import SignalRequest

REMEMBERED_PROMPTS = 100_000
"""Prompts whose replica is remembered; older ones have left the prefix caches."""
ATTEMPTS = 3
"""Engines that may die under one rollout before it fails: it may be what kills them."""

logger = logging.getLogger(__name__)


class EngineLostError(RuntimeError):
    """A teacher engine died during a call."""


class Dispatcher:
    """Chooses a replica for each rollout.

    The cost of a rollout at a replica is the tokens queued there plus those it would compute: the response,
    and the prompt where its prefix is not cached. So the samples of a prompt stay together until the queue
    before them is longer than the prompt.
    """

    def __init__(self, replicas: int) -> None:
        self._waiting = [0] * replicas
        self._holders: OrderedDict[str, set[int]] = OrderedDict()

    def assign(self, rollout: Rollout, alive: list[int]) -> tuple[int, int]:
        """The replica, and the tokens to pass to :meth:`release` when it is done."""
        holders = self._holders.setdefault(rollout.prompt.uid, set())
        self._holders.move_to_end(rollout.prompt.uid)
        if len(self._holders) > REMEMBERED_PROMPTS:
            self._holders.popitem(last=False)
        response, prompt = len(rollout.token_ids), len(rollout.prompt.token_ids)
        costs = {i: response + (0 if i in holders else prompt) for i in alive}
        replica = min(alive, key=lambda i: (self._waiting[i] + costs[i], i))
        holders.add(replica)
        self._waiting[replica] += costs[replica]
        return replica, costs[replica]

    def release(self, replica: int, tokens: int) -> None:
        self._waiting[replica] -= tokens

    def forget(self, replica: int) -> None:
        """The replica's prefix cache is gone."""
        for holders in self._holders.values():
            holders.discard(replica)


@dataclass
class _Replica:
    actor: Any
    up: bool = False
    replacement: asyncio.Task[None] | None = None
    error: Exception | None = None
    """Why its last replacement did not start."""


class TeacherPool:
    """``config.replicas`` teacher engines, driven from the controller's event loop.

    Args:
        config: The pool's settings.
        signal: What to ask for.
        temperature: The loss's; the engines apply it (signal kinds other than ``hidden``).
        device, dtype, max_model_len, vocab_size: See :class:`TeacherEngine`.
        sampled: Ask for the log-prob of each sampled token besides the signal.
    """

    def __init__(
        self,
        config: TeacherConfig,
        signal: SignalConfig,
        temperature: float,
        *,
        device: str,
        dtype: str,
        max_model_len: int,
        vocab_size: int,
        sampled: bool = False,
    ) -> None:
        self._config = config
        self._request = SignalRequest(signal.kind, signal.top_k, temperature, signal.dtype, sampled)
        self._arguments = (device, dtype, max_model_len, vocab_size)
        self._device = device
        self._dispatcher = Dispatcher(config.replicas)
        self._replicas = [_Replica(self._create(i)) for i in range(config.replicas)]
        self._timeout_s = 0.0

    async def start(self, timeout_s: float) -> dict[str, Any]:
        """Waits until every engine has loaded the teacher; returns what :meth:`TeacherEngine.start` does.

        Raises:
            RuntimeError: if an engine cannot be placed or cannot load the teacher.
        """
        self._timeout_s = timeout_s
        facts = await all_up("teacher", [replica.actor.start.remote() for replica in self._replicas], timeout_s)
        for replica in self._replicas:
            replica.up = True
        return facts[0]

    async def score(self, rollout: Rollout) -> TeacherSignal:
        """The teacher's signal for one rollout; on another replica, or its replacement, if an engine dies.

        Raises:
            ValueError, FloatingPointError: see :meth:`TeacherEngine.score`.
            RuntimeError: if engines died and could not be replaced.
        """
        for _ in range(ATTEMPTS):
            replica, tokens = self._dispatcher.assign(rollout, await self._alive())
            try:
                return await self._call(replica, lambda actor: actor.score.remote(rollout, self._request))
            except EngineLostError:
                continue
            finally:
                self._dispatcher.release(replica, tokens)
        raise RuntimeError(f"{rollout.uid}: {ATTEMPTS} teacher engines died while they scored it")

    async def score_batch(self, rollouts: list[Rollout]) -> list[TeacherSignal]:
        """Signals in the order of ``rollouts``, bit for bit the same whenever it is called with the same ones.

        The assignment depends only on the batch, and each engine sees all of its share before it begins.
        Nothing else may be scored meanwhile.
        """
        everyone = list(range(len(self._replicas)))
        dispatcher = Dispatcher(len(everyone))
        shares: list[list[int]] = [[] for _ in everyone]
        for position, rollout in enumerate(rollouts):
            shares[dispatcher.assign(rollout, everyone)[0]].append(position)
        signals: dict[int, TeacherSignal] = {}

        async def score_share(replica: int, share: list[int]) -> None:
            own = [rollouts[i] for i in share]
            for _ in range(ATTEMPTS):
                await self._until_up(replica)
                try:
                    results = await self._call(replica, lambda actor: actor.score_batch.remote(own, self._request))
                except EngineLostError:
                    continue
                signals.update(zip(share, results, strict=True))
                return
            raise RuntimeError(f"teacher {replica} died {ATTEMPTS} times while it scored {rollouts[share[0]].uid}, ...")

        tasks = [asyncio.create_task(score_share(replica, share)) for replica, share in enumerate(shares) if share]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # those still waiting when another has failed
        return [signals[position] for position in range(len(rollouts))]

    async def stats(self) -> list[dict[str, float]]:
        """:meth:`TeacherEngine.stats` of the replicas that are up."""
        up = [replica.actor.stats.remote() for replica in self._replicas if replica.up]
        return list(await asyncio.gather(*up))

    async def shutdown(self) -> None:
        """Ends the engines, their processes and their actors."""
        replacements = [replica.replacement for replica in self._replicas if replica.replacement]
        for task in replacements:
            task.cancel()
        await asyncio.gather(*replacements, return_exceptions=True)
        await asyncio.gather(*(self._end(replica) for replica in self._replicas))

    def _create(self, index: int) -> Any:
        config = self._config
        world = config.tensor_parallel * config.pipeline_parallel
        actor = ray.remote(TeacherEngine).options(**actor_options(self._device, config.cpus, world))
        return actor.remote(config, index, *self._arguments)

    async def _call(self, index: int, make: Callable[[Any], ray.ObjectRef]) -> Any:
        """One call to a replica, which ``make`` makes of its actor; cancelling it takes its requests out of the engine.

        Raises:
            EngineLostError: if the engine died; its replacement is on the way.
        """
        actor = self._replicas[index].actor
        call = make(actor)
        try:
            return await call
        except asyncio.CancelledError:
            ray.cancel(call)
            raise
        except PROCESS_DEATHS as error:
            self._replace(index, actor, error)
            raise EngineLostError from error

    async def _alive(self) -> list[int]:
        """Replicas that are up; waits for a replacement if none is."""
        while not (alive := [i for i, replica in enumerate(self._replicas) if replica.up]):
            running = [replica.replacement for replica in self._replicas if replica.replacement]
            running = [task for task in running if not task.done()]
            if not running:
                why = self._replicas[0].error or RuntimeError("none has started")
                raise RuntimeError(f"no teacher engine is left: {reason(why)}") from why
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        return alive

    async def _until_up(self, index: int) -> None:
        replica = self._replicas[index]
        if not replica.up and replica.replacement:
            await asyncio.wait([replica.replacement])
        if not replica.up:
            why = reason(replica.error) if replica.error else "it never started"
            raise RuntimeError(f"teacher {index} is lost: {why}") from replica.error

    def _replace(self, index: int, actor: Any, error: Exception) -> None:
        """Starts a new actor in place of the dead ``actor``, in the background."""
        replica = self._replicas[index]
        if replica.actor is not actor or not replica.up:
            return  # another rollout found it dead earlier
        logger.warning("teacher %d died and is replaced: %s", index, reason(error, f"teacher {index}"))
        replica.up = False
        self._dispatcher.forget(index)
        replica.replacement = asyncio.create_task(self._restart(index))

    async def _restart(self, index: int) -> None:
        replica = self._replicas[index]
        await self._end(replica)
        replica.actor = self._create(index)
        try:
            await all_up("teacher", [replica.actor.start.remote()], self._timeout_s)
        except RuntimeError as error:
            logger.error("teacher %d could not be replaced: %s", index, reason(error))
            replica.error = error
        else:
            replica.up = True

    async def _end(self, replica: _Replica) -> None:
        """Ends an engine, dead or alive; the kill frees the resources of one that has not started, or is stuck."""
        if replica.up:
            try:
                await asyncio.wait_for(as_future(replica.actor.shutdown.remote()), SHUTDOWN_S)
            except Exception as error:
                logger.debug("teacher did not shut down by itself: %s", error)
        ray.kill(replica.actor)
