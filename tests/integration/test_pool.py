"""The lives of a pool's members, with actors that do nothing but wait, die and hang."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray

from s2w.actors import pool as pool_module
from s2w.actors import stages
from s2w.actors.pool import Pool, idle, least_busy
from s2w.actors.stages import Stage
from s2w.actors.starting import answering
from s2w.config.schema import ClusterConfig
from s2w.errors import LeftOutError
from s2w.records import Fault

# Ray's workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

POISON = "poison"


class Actor:
    """Answers with its number once it is told to go on."""

    def __init__(self, number: int, starts: bool | None) -> None:
        stages.open_board()
        self.number, self.starts = number, starts
        self.go = asyncio.Event()

    async def start(self) -> int:
        if self.starts is None:
            os._exit(1)
        if not self.starts:
            raise ValueError("no such model")
        stages.enter(stages.UP)
        return os.getpid()

    async def stage(self) -> Stage:
        return stages.current()

    async def beat(self) -> None: ...

    async def work(self, uid: str) -> int:
        if uid == POISON:
            os._exit(1)
        await self.go.wait()
        return self.number

    async def go_on(self) -> None:
        self.go.set()

    async def shutdown(self) -> None: ...


class Actors:
    """As a pool of engines is.

    Args:
        good: whether the member with a number can start; None if it dies of it.
    """

    def __init__(self, good: Callable[[int], bool | None] = lambda number: True) -> None:
        self.good = good
        self.slots: list[int] = []
        self.forgotten: list[int] = []

    def create(self, number: int, slot: int) -> Any:
        self.slots.append(slot)
        actor = answering(Actor).options(num_cpus=0, max_concurrency=100)
        return actor.remote(number, self.good(number))

    def load(self, actor: Any) -> ray.ObjectRef:
        return actor.start.remote()

    def forget(self, number: int) -> None:
        self.forgotten.append(number)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "BEAT_S", 0.2)
    monkeypatch.setattr(pool_module, "FIRST_BACKOFF_S", 0.1)
    monkeypatch.setattr(pool_module, "SHUTDOWN_S", 1)


def make_pool(size: int, actors: Actors, sequences: int = 1, hang_timeout_s: int = 60) -> tuple[Pool, list[Fault]]:
    faults: list[Fault] = []
    cluster = ClusterConfig(start_attempts=2, hang_timeout_s=hang_timeout_s)
    return Pool("worker", size, actors, sequences=sequences, cluster=cluster, on_fault=faults.append), faults


def ask(pool: Pool, uid: str, choose: Any = least_busy) -> asyncio.Task[int]:
    return asyncio.create_task(pool.call(uid, lambda member: member.actor.work.remote(uid), choose))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.05)


def test_requests_wait_in_one_queue_and_those_of_the_dead_come_first() -> None:
    async def run() -> None:
        actors = Actors()
        pool, faults = make_pool(2, actors)
        try:
            pids = await pool.start(60)
            calls = [ask(pool, str(i)) for i in range(6)]
            await asyncio.sleep(0)
            assert [member.requests for member in pool.members] == [2, 2]
            os.kill(pids[0], signal.SIGKILL)  # It has 0 and 2; 1 waits at the other, 4 and 5 here.
            await until(lambda: len(pool.serving) == 2 and len(faults) == 1)
            assert [member.number for member in pool.serving] == [1, 2]
            assert actors.slots == [0, 1, 0] and actors.forgotten == [0]
            await until(lambda: all(member.requests == 2 for member in pool.serving))
            # The joiner has found work: that of the dead one, before what came later.
            await pool.serving[1].actor.go_on.remote()
            assert await asyncio.gather(calls[0], calls[2]) == [2, 2]
            await pool.serving[0].actor.go_on.remote()
            assert sorted(await asyncio.gather(*calls)) in ([1, 1, 2, 2, 2, 2], [1, 1, 1, 2, 2, 2])
            [fault] = faults
            assert (fault.kind, fault.what, fault.replacement) == ("worker", "worker 0", "worker 2")
            assert f"its process {pids[0]} was killed or crashed" in fault.why and fault.seconds
        finally:
            await pool.shutdown()

    asyncio.run(run())


def test_one_that_hangs_is_found_by_its_silence() -> None:
    async def run() -> None:
        pool, faults = make_pool(2, Actors(), hang_timeout_s=1)
        try:
            pids = await pool.start(60)
            call = ask(pool, "a")
            await asyncio.sleep(0.5)
            os.kill(pids[0], signal.SIGSTOP)
            await until(lambda: bool(faults))
            assert faults[0].why == "it has given no sign of life for 1 s (cluster.hang_timeout_s)"
            for member in pool.serving:
                await member.actor.go_on.remote()
            assert await call == 1
            await until(lambda: not psutil.pid_exists(pids[0]))
        finally:
            await pool.shutdown()

    asyncio.run(run())


def test_a_request_that_kills_whatever_takes_it_is_left_out_and_the_others_are_not() -> None:
    async def run() -> None:
        pool, faults = make_pool(2, Actors(), sequences=2)
        try:
            await pool.start(60)
            calls = [ask(pool, str(i)) for i in range(3)]
            with pytest.raises(LeftOutError, match=r"^poison: 3 workers died while they had this request; it is left"):
                await ask(pool, POISON)
            await until(lambda: len(pool.serving) == 2 and len(faults) == 3)
            for member in pool.serving:
                await member.actor.go_on.remote()
            assert set(await asyncio.gather(*calls)) <= {member.number for member in pool.serving}
        finally:
            await pool.shutdown()

    asyncio.run(run())


def test_a_replacement_may_wait_for_its_admission() -> None:
    async def run() -> None:
        pool, _ = make_pool(1, Actors())
        loaded = asyncio.Event()
        try:
            pids = await pool.start(60)
            pool.admission = loaded.set
            os.kill(pids[0], signal.SIGKILL)
            async with asyncio.timeout(30):
                await loaded.wait()
            await pool.any_left()
            call = ask(pool, "a", idle)
            await asyncio.sleep(0)
            assert not pool.serving and [member.requests for member in pool.loaded] == [0]
            pool.admit(1)
            await asyncio.sleep(0)
            assert [member.requests for member in pool.serving] == [1]
            await pool.serving[0].actor.go_on.remote()
            assert await call == 1
        finally:
            await pool.shutdown()

    asyncio.run(run())


def test_a_pool_without_members_says_why() -> None:
    async def run() -> None:
        pool, faults = make_pool(1, Actors(good=lambda number: number == 0))
        try:
            pids = await pool.start(60)
            call = ask(pool, "a")
            await asyncio.sleep(0.5)
            os.kill(pids[0], signal.SIGKILL)
            with pytest.raises(RuntimeError, match=r"^no worker is left: worker 2 did not start: .*no such model"):
                await call
            assert faults[0].replacement is None
            with pytest.raises(RuntimeError, match="no worker is left"):
                await pool.any_left()
            with pytest.raises(RuntimeError, match="no worker is left"):
                await ask(pool, "b")
        finally:
            await pool.shutdown()

    asyncio.run(run())


def test_a_cancelled_request_gives_its_place_back() -> None:
    async def run() -> None:
        pool, _ = make_pool(1, Actors())
        try:
            await pool.start(60)
            calls = [ask(pool, uid) for uid in "abc"]  # One of them waits.
            await asyncio.sleep(0.5)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert pool.members[0].requests == 0
            await pool.members[0].actor.go_on.remote()
            assert await ask(pool, "c") == 0
        finally:
            await pool.shutdown()

    asyncio.run(run())


def test_one_that_dies_in_the_first_start_is_started_again() -> None:
    async def run(good: Callable[[int], bool | None], size: int = 3) -> tuple[list[int], list[int]]:
        actors = Actors(good)
        pool, faults = make_pool(size, actors)
        try:
            pids = await pool.start(60)
            assert len(set(pids)) == size and not faults
            return [member.number for member in pool.serving], actors.slots
        finally:
            await pool.shutdown()

    # Number 1 dies; number 3 has its slot.
    assert asyncio.run(run(lambda number: None if number == 1 else True)) == ([0, 3, 2], [0, 1, 2, 1])
    # Twice is as often as is tried.
    with pytest.raises(RuntimeError, match=r"^worker 3 did not start: its process \d+ was killed or crashed"):
        asyncio.run(run(lambda number: None if number in (1, 3) else True))
    # An error is one that the next start would meet too.
    with pytest.raises(RuntimeError, match=r"^worker 2 did not start: no such model"):
        asyncio.run(run(lambda number: number != 2))
