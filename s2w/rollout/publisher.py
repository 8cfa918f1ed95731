"""The learner's weights on their way into the engines: at every swap, and into engines that replace others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from s2w.actors.stopping import uninterrupted
from s2w.rollout.pool import RemoteReceiver, RolloutPool
from s2w.weights.probe import ProbeResult, compare
from s2w.weights.publish import SwapError, SwapReport, WeightSource, publish

ATTEMPTS = 3
"""Swaps to one version in which engines may die before the run ends: it may be the swap that kills them."""


class Learner(WeightSource, Protocol):
    """The learner group."""

    async def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-prob of each token but the first, given those before it: float32 [n - 1], in nats."""


class Publisher:
    """Keeps the engines at the learner's version, and proves it by a probe after each swap.

    Args:
        version: of the learner's weights, which are those that engines load.
        probe_ids: int32, tokens whose log-probs in engines and learner are compared.
        tolerance: see :func:`s2w.weights.probe.compare`.
    """

    def __init__(
        self, learner: Learner, rollouts: RolloutPool, version: int, probe_ids: np.ndarray, tolerance: float
    ) -> None:
        self._learner, self._rollouts = learner, rollouts
        self._probe_ids, self._tolerance = probe_ids, tolerance
        self.version = version
        self.updating = asyncio.Lock()
        """Held while the learner's weights change, and until all engines have them."""
        # The learner's log-probs of the probe with the weights that engines load, and at the last version.
        self._loaded: np.ndarray | None = None
        self._probed: np.ndarray | None = None
        self._usual: list[float] = []  # the median difference at each swap
        self._joined = asyncio.Event()

    async def swap(self, version: int) -> tuple[SwapReport, ProbeResult]:
        """Puts the learner's weights into the engines as ``version``; those that die meanwhile are replaced. The
        caller holds ``updating``.

        Raises:
            SwapError: all engines refuse the weights alike.
            ProbeError: an engine does not compute with them.
            RuntimeError: no engine is left, or engines died each time.
        """
        self.version = version
        for _ in range(ATTEMPTS):
            await self._rollouts.pool.any_left()
            if given := await self._give(self._rollouts.receivers()):
                return given
        raise RuntimeError(f"rollout engines died in each of {ATTEMPTS} swaps to version {version}")

    async def welcome(self) -> None:
        """Gives engines that replace others the current weights as soon as they have loaded, and lets them serve; runs
        until it is cancelled."""
        self._rollouts.pool.admission = self._joined.set
        while True:
            await self._joined.wait()
            self._joined.clear()
            async with self.updating:
                if new := self._rollouts.receivers(loaded=True):
                    await self._give(new)

    @uninterrupted
    async def _give(self, engines: Mapping[int, RemoteReceiver]) -> tuple[SwapReport, ProbeResult] | None:
        """Puts the weights into ``engines`` and compares log-probs; None if it is to be done again without those that
        failed."""
        pool = self._rollouts.pool
        try:
            swap = await publish(self._learner, engines, self.version, self._probe_ids)
        except SwapError as error:
            if not error.survivable(engines):
                raise
            for number, why in error.engines.items():
                pool.lose(number, why)
            return None
        probed, model = await asyncio.gather(self._rollouts.probed(engines), self._learner.probe(self._probe_ids))
        if not probed:
            return None
        new = {member.number for member in pool.loaded}
        probes = [
            compare(
                log_probs,
                model,
                self._loaded if number in new else self._probed,
                max(self._usual, default=np.inf),
                name=f"rollout engine {number}",
                version=self.version,
                tolerance=self._tolerance,
            )
            for number, log_probs in probed.items()
        ]
        for number in new & probed.keys():
            pool.admit(number)
        if self._loaded is None:
            self._loaded = model
        self._probed = model
        self._usual.append(max(probe.median for probe in probes))
        return swap, max(probes, key=lambda probe: probe.mean)
