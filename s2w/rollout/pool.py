"""The pool of rollout engines: dispatch by load, each sample handed on when it finishes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import numpy as np
import ray

from s2w.config import RolloutConfig
from s2w.failures import answer
from s2w.models.checkpoint import ModelReference
from s2w.records import Prompt, Rollout
from s2w.rollout.engine import RolloutEngine
from s2w.vllm_actor import SHUTDOWN_S, actor_options, as_future, first_error
from s2w.weights.publish import ReceiveStep


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
        await first_error("rollout engine", [engine.start.remote(version) for engine in self.engines], timeout_s)
        self._up = True

    async def generate(self, prompt: Prompt, sample: int, thinking_budget: int | None = None) -> Rollout:
        """One response, from the engine with the least to do; see :meth:`RolloutEngine.generate`."""
        index = min(range(len(self.engines)), key=self._load.__getitem__)
        self._load[index] += 1
        try:
            return await answer(_name(index), self.engines[index].generate.remote(prompt, sample, thinking_budget))
        finally:
            self._load[index] -= 1

    async def generate_batch(self, requests: list[tuple[Prompt, int]]) -> list[Rollout]:
        """The responses in the order of ``requests``, bit for bit the same in every run with the same weights."""
        count = len(self.engines)
        calls = [engine.generate_batch.remote(requests[i::count]) for i, engine in enumerate(self.engines)]
        shares = await asyncio.gather(*(answer(_name(i), call) for i, call in enumerate(calls)))
        return [shares[i % count][i // count] for i in range(len(requests))]

    def weight_workers(self) -> dict[int, int]:
        """Worker processes of each engine, by its number."""
        return dict.fromkeys(range(len(self.engines)), self.workers)

    async def receive_weights(self, engine: int, step: ReceiveStep, *args: Any) -> None:
        """One step of a swap in one engine."""
        await self.engines[engine].receive_weights.remote(step, *args)

    async def log_probs(self, token_ids: np.ndarray) -> list[np.ndarray]:
        """What each engine's weights say of the tokens, see :meth:`RolloutEngine.log_probs`."""
        calls = [answer(_name(i), engine.log_probs.remote(token_ids)) for i, engine in enumerate(self.engines)]
        return await asyncio.gather(*calls)

    async def probed(self) -> list[np.ndarray]:
        """What each engine's weights say of the probe of the last swap."""
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


def _name(engine: int) -> str:
    return f"rollout engine {engine}"
