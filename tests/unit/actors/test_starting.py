"""Parts start at once, or in turn where they share a GPU."""

from __future__ import annotations

import asyncio

import pytest

from s2w.actors.starting import start_all


@pytest.mark.parametrize(("in_turn", "expected"), [(False, ["+a", "+b", "-b", "-a"]), (True, ["+a", "-a", "+b", "-b"])])
def test_at_once_or_in_turn(in_turn: bool, expected: list[str]) -> None:
    seen: list[str] = []

    async def start(name: str, turns: int) -> str:
        seen.append(f"+{name}")
        for _ in range(turns):
            await asyncio.sleep(0)
        seen.append(f"-{name}")
        return name.upper()

    starts = {"a": lambda: start("a", 5), "b": lambda: start("b", 1)}
    assert asyncio.run(start_all(starts, in_turn)) == {"a": "A", "b": "B"}
    assert seen == expected


def test_after_a_failure_nothing_else_starts() -> None:
    started = []

    async def fail() -> None:
        raise RuntimeError("no memory")

    async def start() -> None:
        started.append(1)

    with pytest.raises(RuntimeError, match="no memory"):
        asyncio.run(start_all({"a": fail, "b": start}, in_turn=True))
    assert not started
