"""The pool of rollout engines: dispatch by load, each sample passed on when it finishes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from s2w.actors.failures import PROCESS_DEATHS, answer
from s2w.actors.hardware import shares_gpu
from s2w.actors.place import Places, anywhere
from s2w.actors.pool import Member, Pool, idle, least_busy
from s2w.actors.starting import Watcher, answering
from s2w.actors.vllm import actor_options
from s2w.config.schema import ClusterConfig, RolloutConfig
from s2w.models.checkpoint import ModelReference
from s2w.records import Fault, Request, Rollout
from s2w.rollout.engine import RolloutEngine


class RolloutPool:
    """``config.engines`` engines, driven from the controller's event loop; those that die are replaced.

    Args:
        config: the pool's settings.
        name: of an engine in messages, before its number.
        cluster, on_fault: see :class:`s2w.actors.pool.Pool`.
        model, device, dtype, max_model_len, vocab_size, candidates, stop_token_ids: see :class:`RolloutEngine`.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        name: str = "rollout engine",
        model: ModelReference,
        device: str,
        dtype: str,
        max_model_len: int,
        vocab_size: int,
        candidates: int,
        stop_token_ids: tuple[int, ...],
        cluster: ClusterConfig | None = None,
        place: Places = anywhere,
        on_fault: Callable[[Fault], None] = lambda fault: None,
    ) -> None:
        self.config = config
        cluster = cluster or ClusterConfig()
        self.workers = config.tensor_parallel * config.pipeline_parallel
        """Processes of each engine."""
        self._options = actor_options(device, config.cpus, self.workers, config.gpus, verbose=cluster.log_to_driver)
        self._place = place
        self._arguments = (model, device, dtype, max_model_len, vocab_size, candidates, stop_token_ids)
        self._version = 0
        self.pool = Pool(
            name,
            config.engines,
            self,
            sequences=config.max_sequences,
            in_turn=shares_gpu(device, config.gpus),
            cluster=cluster,
            on_fault=on_fault,
        )

    @property
    def at_once(self) -> int:
        """Requests that all engines have together at most: with as many under way, none waits for the next."""
        return self.config.engines * self.pool.at_once

    def create(self, number: int, slot: int) -> Any:
        """See :class:`s2w.actors.pool.Actors`."""
        place = self._place(slot)
        actor = answering(RolloutEngine).options(**self._options | dict(place.options))
        return actor.remote(self.config, number, *self._arguments, place.spans_nodes)

    def load(self, actor: Any) -> ray.ObjectRef:
        return actor.start.remote(self._version)

    def forget(self, number: int) -> None: ...

    async def start(self, version: int, timeout_s: float, watcher: Watcher | None = None) -> None:
        """Loads the model as policy ``version`` in every engine, and waits until they take requests.

        Args:
            watcher: shows what the engines do meanwhile.

        Raises:
            RuntimeError: an engine could not be placed or could not load its model.
        """
        self._version = version
        await self.pool.start(timeout_s, watcher)

    async def generate(self, request: Request) -> Rollout:
        """One response, from the engine with the fewest requests; from another one if that dies.

        Raises:
            RequestRefusedError: see :meth:`RolloutEngine.generate`.
            LeftOutError, RuntimeError: see :meth:`s2w.actors.pool.Pool.call`.
        """
        return await self.pool.call(request.uid, lambda engine: engine.actor.generate.remote(request), least_busy)

    async def stream(self, request: Request) -> AsyncIterator[np.ndarray | Rollout]:
        """Like :meth:`generate`; yields the tokens so far, int32 [n], as they come, and the response at last.

        Raises:
            ActorFailedError: the engine died; what was yielded cannot be taken back.
        """
        async with self.pool.member(least_busy) as engine:
            async for part in engine.actor.stream.remote(request):
                yield await answer(self._name(engine), part)

    async def generate_batch(self, requests: Sequence[Request]) -> list[Rollout]:
        """The responses in the order of ``requests``, bit for bit the same in every run with the same weights.

        The shares depend only on the batch; an engine has one at a time, whichever it is. Errors as above.
        """
        count = self.config.engines
        shares = [list(requests[i::count]) for i in range(min(count, len(requests)))]

        async def generate(share: list[Request]) -> list[Rollout]:
            return await self.pool.call(
                f"{share[0].uid}, ...", lambda engine: engine.actor.generate_batch.remote(share), idle
            )

        done = await asyncio.gather(*map(generate, shares))
        return [done[i % count][i // count] for i in range(len(requests))]

    def receivers(self, loaded: bool = False) -> dict[int, RemoteReceiver]:
        """Engines as a swap sees them, by their number.

        Args:
            loaded: only those that wait for their weights before they serve.
        """
        members = self.pool.loaded if loaded else [*self.pool.serving, *self.pool.loaded]
        return {member.number: RemoteReceiver(member.actor, self.workers) for member in members}

    async def log_probs(self, token_ids: np.ndarray) -> list[np.ndarray]:
        """Log-probs of the tokens under each engine's weights, see :meth:`RolloutEngine.log_probs`."""
        engines = self.pool.serving
        calls = [answer(self._name(engine), engine.actor.log_probs.remote(token_ids)) for engine in engines]
        return await asyncio.gather(*calls)

    async def probed(self, engines: Mapping[int, RemoteReceiver]) -> dict[int, np.ndarray]:
        """Log-probs of the last swap's probe under the weights of the engines given, by their number; an engine that
        dies is lost, and not among them."""

        async def probe(number: int) -> np.ndarray | None:
            try:
                return await engines[number].actor.probed.remote()
            except PROCESS_DEATHS as error:
                self.pool.lose(number, error)
                return None

        results = await asyncio.gather(*map(probe, engines))
        return {number: result for number, result in zip(engines, results, strict=True) if result is not None}

    async def shutdown(self) -> None:
        """Ends the engines and their processes: those that have not started, or do not answer, by force."""
        await self.pool.shutdown()

    def _name(self, engine: Member) -> str:
        return f"{self.pool.name} {engine.number}"


@dataclass(frozen=True, slots=True)
class RemoteReceiver:
    """An engine's actor as a :class:`s2w.weights.publish.WeightReceiver`."""

    actor: Any
    workers: int

    async def connect(self, info: dict[str, Any]) -> None:
        await self.actor.connect_weights.remote(info)

    async def pause(self) -> None:
        await self.actor.pause.remote()

    async def load(self, info: dict[str, Any]) -> None:
        await self.actor.load_weights.remote(info)

    async def finish(self, version: int, probe_ids: np.ndarray | None) -> None:
        await self.actor.finish_weights.remote(version, probe_ids)

    async def resume(self) -> None:
        await self.actor.resume.remote()
