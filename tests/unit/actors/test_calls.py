"""Many calls at once."""

from __future__ import annotations

import asyncio

import pytest

from s2w.actors.calls import each


def test_results_stand_in_the_order_of_the_items() -> None:
    finished = []

    async def call(item: int) -> int:
        await asyncio.sleep(0.001 * (5 - item))
        finished.append(item)
        return item * item

    assert asyncio.run(each(range(5), call)) == [0, 1, 4, 9, 16]
    assert finished == [4, 3, 2, 1, 0]
    assert asyncio.run(each([], call)) == []


@pytest.mark.parametrize(("at_once", "most"), [(1, 1), (3, 3), (50, 10), (None, 10)])
def test_no_more_calls_than_asked_for_are_under_way(at_once: int | None, most: int) -> None:
    under_way, seen = 0, []

    async def call(item: int) -> int:
        nonlocal under_way
        under_way += 1
        seen.append(under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        return item

    assert asyncio.run(each(range(10), call, at_once=at_once)) == list(range(10))
    assert max(seen) == most


def test_a_call_begins_when_another_ends() -> None:
    """Not in rounds: one long call holds up nobody else."""
    begun: list[int] = []

    async def work() -> None:
        release = asyncio.Event()

        async def call(item: int) -> None:
            begun.append(item)
            if item == 0:
                await release.wait()
            if item == 5:
                release.set()

        await each(range(6), call, at_once=2)

    asyncio.run(asyncio.wait_for(work(), 5))
    assert begun == list(range(6))


def test_done_is_told_of_each_result_when_it_is_there() -> None:
    told = []

    async def call(item: int) -> str:
        await asyncio.sleep(0.002 if item == 0 else 0)
        return str(item)

    asyncio.run(each(range(3), call, done=lambda item, result: told.append((item, result))))
    assert told == [(1, "1"), (2, "2"), (0, "0")]


@pytest.mark.parametrize("at_once", [None, 2])
def test_an_error_cancels_the_other_calls_and_what_was_done_stands(at_once: int | None) -> None:
    told, cancelled = [], []

    async def call(item: int) -> int:
        if item == 1:
            await asyncio.sleep(0.001)
            raise ValueError("one")
        try:
            await asyncio.sleep(0 if item == 0 else 100)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        return item

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(each(range(4), call, at_once=at_once, done=lambda item, _: told.append(item)))
    assert [str(error) for error in caught.value.exceptions] == ["one"]
    assert told == [0]
    # Of those that had begun; with two at once the fourth had not.
    assert sorted(cancelled) == ([2, 3] if at_once is None else [2])


def test_who_cancels_it_cancels_the_calls() -> None:
    cancelled = []

    async def call(item: int) -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise

    async def work() -> None:
        calls = asyncio.create_task(each(range(2), call))
        await asyncio.sleep(0.001)
        calls.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls

    asyncio.run(work())
    assert sorted(cancelled) == [0, 1]
