"""The pool of rollout engines: dispatch by load, each sample passed on when it finishes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from s2w.actors.calls import all_up, as_future
from s2w.actors.failures import answer
from s2w.actors.vllm import SHUTDOWN_S, actor_options
from s2w.config.schema import RolloutConfig
from s2w.models.checkpoint import ModelReference
from s2w.records import Request, Rollout
from s2w.rollout.engine import RolloutEngine


class RolloutPool:
    """``config.engines`` actors, driven from the controller's event loop.

    Args:
        config: the pool's settings.
        model, device, dtype, max_model_len, vocab_size, candidates, stop_token_ids: see :class:`RolloutEngine`.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model: ModelReference,
        device: str,
        dtype: str,
        max_model_len: int,
        vocab_size: int,
        candidates: int,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        self.config = config
        self.workers = config.tensor_parallel * config.pipeline_parallel
        """Processes of each engine."""
        actor = ray.remote(RolloutEngine).options(**actor_options(device, config.cpus, self.workers))
        self.engines: list[Any] = [
            actor.remote(config, index, model, device, dtype, max_model_len, vocab_size, candidates, stop_token_ids)
            for index in range(config.engines)
        ]
        self._load = [0] * config.engines
        self._up = False

    async def start(self, version: int, timeout_s: float) -> None:
        """Waits until every engine takes requests.

        Raises:
            RuntimeError: an engine could not be placed or could not load its model.
        """
        await all_up("rollout engine", [engine.start.remote(version) for engine in self.engines], timeout_s)
        self._up = True

    async def generate(self, request: Request) -> Rollout:
        """One response, from the engine with the fewest requests; see :meth:`RolloutEngine.generate`."""
        index = min(range(len(self.engines)), key=self._load.__getitem__)
        self._load[index] += 1
        try:
            return await answer(_name(index), self.engines[index].generate.remote(request))
        finally:
            self._load[index] -= 1

    async def generate_batch(self, requests: Sequence[Request]) -> list[Rollout]:
        """The responses in the order of ``requests``, bit for bit the same in every run with the same weights."""
        count = len(self.engines)
        calls = [engine.generate_batch.remote(list(requests[i::count])) for i, engine in enumerate(self.engines)]
        shares = await asyncio.gather(*(answer(_name(i), call) for i, call in enumerate(calls)))
        return [shares[i % count][i // count] for i in range(len(requests))]

    def receivers(self) -> dict[int, RemoteReceiver]:
        """Each engine as a swap sees it, by its number."""
        return {number: RemoteReceiver(engine, self.workers) for number, engine in enumerate(self.engines)}

    async def log_probs(self, token_ids: np.ndarray) -> list[np.ndarray]:
        """Log-probs of the tokens under each engine's weights, see :meth:`RolloutEngine.log_probs`."""
        calls = [answer(_name(i), engine.log_probs.remote(token_ids)) for i, engine in enumerate(self.engines)]
        return await asyncio.gather(*calls)

    async def probed(self) -> list[np.ndarray]:
        """Log-probs of the last swap's probe under each engine's weights."""
        calls = [answer(_name(i), engine.probed.remote()) for i, engine in enumerate(self.engines)]
        return await asyncio.gather(*calls)

    async def shutdown(self) -> None:
        """Ends the engines and their processes: those that have not started, or do not answer, by force."""
        if self._up:
            calls = [as_future(engine.shutdown.remote()) for engine in self.engines]
            with suppress(TimeoutError):
                async with asyncio.timeout(SHUTDOWN_S):
                    await asyncio.gather(*calls, return_exceptions=True)
        for engine in self.engines:
            ray.kill(engine)


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


def _name(engine: int) -> str:
    return f"rollout engine {engine}"
