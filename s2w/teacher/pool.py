"""The pool of teacher engines: dispatch by load and by prefix."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import ray

from s2w.actors.hardware import shares_gpu
from s2w.actors.place import Places, anywhere
from s2w.actors.pool import Member, Pool, idle
from s2w.actors.starting import Watcher, answering
from s2w.actors.vllm import actor_options
from s2w.config.schema import ClusterConfig, SignalConfig, TeacherConfig
from s2w.records import Fault, Rollout, TeacherSignal
from s2w.teacher.engine import TeacherEngine
from s2w.teacher.signal import SignalRequest

REMEMBERED_PROMPTS = 100_000
"""Prompts whose replica is remembered; older ones have left the prefix caches."""


class Dispatcher:
    """Chooses a replica for each rollout.

    The cost of a rollout at a replica is the tokens queued there plus those it would compute: the response,
    and the prompt where its prefix is not cached. So the samples of a prompt stay together until the queue
    before them is longer than the prompt.
    """

    def __init__(self) -> None:
        self._waiting: defaultdict[int, int] = defaultdict(int)
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
        self._waiting.pop(replica, None)
        for holders in self._holders.values():
            holders.discard(replica)


class TeacherPool:
    """``config.replicas`` teacher engines, driven from the controller's event loop; those that die are replaced.

    Args:
        config: The pool's settings.
        signal: What to ask for.
        temperature: The loss's; the engines apply it (signal kinds other than ``hidden``).
        device, dtype, max_model_len, vocab_size: See :class:`TeacherEngine`.
        sampled: Ask for the log-prob of each sampled token besides the signal.
        name: Of an engine in messages, before its number.
        place: Finds a place for an engine.
        cluster, on_fault: See :class:`s2w.actors.pool.Pool`.
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
        name: str = "teacher",
        cluster: ClusterConfig | None = None,
        place: Places = anywhere,
        on_fault: Callable[[Fault], None] = lambda fault: None,
    ) -> None:
        self._config = config
        cluster = cluster or ClusterConfig()
        self._request = SignalRequest(signal.kind, signal.top_k, temperature, signal.dtype, sampled)
        self._arguments = (device, dtype, max_model_len, vocab_size)
        world = config.tensor_parallel * config.pipeline_parallel
        self._options = actor_options(device, config.cpus, world, config.gpus, verbose=cluster.log_to_driver)
        self._place = place
        self.shares_gpu = shares_gpu(device, config.gpus)
        """Others may use an engine's GPU."""
        self._dispatcher = Dispatcher()
        self.pool = Pool(
            name,
            config.replicas,
            self,
            sequences=config.max_sequences,
            in_turn=self.shares_gpu,
            cluster=cluster,
            on_fault=on_fault,
        )

    def create(self, number: int, slot: int) -> Any:
        """See :class:`s2w.actors.pool.Actors`."""
        place = self._place(slot)
        actor = answering(TeacherEngine).options(**self._options | dict(place.options))
        return actor.remote(self._config, number, *self._arguments, place.spans_nodes)

    def load(self, actor: Any) -> ray.ObjectRef:
        return actor.start.remote()

    def forget(self, number: int) -> None:
        self._dispatcher.forget(number)

    async def start(self, timeout_s: float, watcher: Watcher | None = None) -> dict[str, Any]:
        """Waits until every engine has loaded the teacher; returns what :meth:`TeacherEngine.start` does.

        Args:
            watcher: Shows what the engines do meanwhile, and later those that replace dead ones.

        Raises:
            RuntimeError: if an engine cannot be placed or cannot load the teacher.
        """
        return (await self.pool.start(timeout_s, watcher))[0]

    async def score(self, rollout: Rollout) -> TeacherSignal:
        """The teacher's signal for one rollout; from another replica if one dies.

        Raises:
            ValueError, FloatingPointError: see :meth:`TeacherEngine.score`.
            LeftOutError, RuntimeError: see :meth:`s2w.actors.pool.Pool.call`.
        """
        tokens = 0

        def choose(members: Sequence[Member]) -> Member:
            nonlocal tokens
            by_number = {member.number: member for member in members}
            number, tokens = self._dispatcher.assign(rollout, list(by_number))
            return by_number[number]

        def ask(member: Member) -> ray.ObjectRef:
            return member.actor.score.remote(rollout, self._request)

        def done(member: Member) -> None:
            self._dispatcher.release(member.number, tokens)

        return await self.pool.call(rollout.uid, ask, choose, done)

    async def score_batch(self, rollouts: list[Rollout]) -> list[TeacherSignal]:
        """Signals in the order of ``rollouts``, bit for bit the same whenever it is called with the same ones.

        The shares depend only on the batch; an engine has one at a time, whichever it is, and sees all of it before it
        begins. Nothing else may be scored meanwhile. Errors as above.
        """
        everyone = list(range(self._config.replicas))
        dispatcher = Dispatcher()
        shares: list[list[int]] = [[] for _ in everyone]
        for position, rollout in enumerate(rollouts):
            shares[dispatcher.assign(rollout, everyone)[0]].append(position)
        signals: dict[int, TeacherSignal] = {}

        async def score_share(share: list[int]) -> None:
            own = [rollouts[i] for i in share]
            results = await self.pool.call(
                f"{own[0].uid}, ...", lambda member: member.actor.score_batch.remote(own, self._request), idle
            )
            signals.update(zip(share, results, strict=True))

        tasks = [asyncio.create_task(score_share(share)) for share in shares if share]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # those still waiting when another has failed
        return [signals[position] for position in range(len(rollouts))]

    async def alive(self) -> list[int]:
        """Numbers of the engines that are not dead now; the signals of the others are gone with them."""
        await self.pool.check()
        return [member.number for member in self.pool.members]

    async def stats(self) -> list[dict[str, float]]:
        """:meth:`TeacherEngine.stats` of the replicas that serve."""
        return list(await asyncio.gather(*(member.actor.stats.remote() for member in self.pool.serving)))

    async def shutdown(self) -> None:
        """Ends the engines, their processes and their actors."""
        await self.pool.shutdown()
