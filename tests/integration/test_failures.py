"""Sentences about errors as Ray really raises them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from s2w.actors.failures import ActorFailedError, EngineDiedError, answer, reason

# Ray's workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Actor:
    def __init__(self, fails: bool = False) -> None:
        if fails:
            raise ValueError("no such model")

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def refuse(self) -> None:
        raise ValueError("two lines\nof text")

    def lose_engine(self) -> None:
        raise EngineDiedError("its EngineCore process 7 was killed by SIGKILL")

    def hold(self) -> None:
        signal.pause()


Victim: Any = ray.remote(num_cpus=0)(Actor)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def error_of(call: Any, who: str = "learner rank 1") -> Exception:
    """What awaiting a call raises."""

    async def wait() -> None:
        await answer(who, call)

    with pytest.raises(Exception) as caught:
        asyncio.run(wait())
    return caught.value


def test_an_actor_that_is_killed() -> None:
    victim = Victim.remote()
    pid = ray.get(victim.pid.remote())
    error = error_of(victim.die.remote())
    assert isinstance(error, ActorFailedError)
    assert str(error) == (
        f"learner rank 1 died: its process {pid} was killed or crashed; if memory ran out, lower "
        "learner.tokens_per_micro_batch, loss.chunk_rows or learner.ranks, or set learner.activation_checkpointing=true"
    )
    # Whoever calls it later reads the same.
    assert str(error_of(victim.pid.remote())) == str(error)


def test_an_engine_that_is_killed() -> None:
    error = error_of(Victim.remote().lose_engine.remote(), "rollout engine 3")
    assert str(error) == (
        "rollout engine 3 died: its EngineCore process 7 was killed by SIGKILL; if memory ran out, lower "
        "rollout.kv_cache_gib, rollout.max_sequences or rollout.engines"
    )


def test_what_an_actor_raises() -> None:
    assert reason(error_of(Victim.remote().refuse.remote())) == "two lines of text"
    assert reason(error_of(Victim.remote(fails=True).pid.remote())).endswith("ValueError: no such model")


def test_a_node_without_memory(tmp_path: Path) -> None:
    """Ray kills the actor, and says who used the memory."""
    ray.shutdown()
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False,
        _system_config={"memory_usage_threshold": 0.01, "memory_monitor_refresh_ms": 100},
    )  # fmt: skip
    error = error_of(Victim.remote().hold.remote(), "teacher 0")
    assert re.search(
        r"^teacher 0 died: Ray killed it because the node ran out of memory \([\d.]+ of [\d.]+ GB; most of it in "
        r".* \([\d.]+ GB\), .*\); "
        r"if memory ran out, lower teacher\.kv_cache_gib",
        str(error),
    ), str(error)
