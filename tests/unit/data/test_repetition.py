"""Loops in responses."""

from __future__ import annotations

import numpy as np
import pytest

from s2w.data.repetition import REPEATS, has_loop


def test_loops_are_found_whatever_their_period() -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 1000, 400).astype(np.int32)
    assert not has_loop(noise, 128, 64)
    for period in (1, 3, 17, 100):
        block = np.arange(period, dtype=np.int32)
        repeated = np.tile(block, -(-400 // period))[: max(64, 4 * period)]
        looped = np.concatenate([noise, repeated, noise])
        assert has_loop(looped, 128, 64), period
        # One token less is no loop: the noise around it continues it nowhere.
        edge = np.array([5000], np.int32)
        shorter = np.concatenate([noise, edge, repeated[:-1], edge, noise])
        assert not has_loop(shorter, 128, 64), period
        assert not has_loop(looped, period - 1, 64) or period == 1


def test_a_loop_covers_its_span_and_occurs_often_enough() -> None:
    edge = np.array([1000], np.int32)

    def found(period: int, tokens: int, span: int) -> bool:
        repeated = np.arange(tokens, dtype=np.int32) % period
        return has_loop(np.concatenate([edge, repeated, edge + 1]), 8, span)

    # A single token again and again: the span decides.
    assert found(1, 64, 64) and not found(1, 63, 64)
    # Five tokens: four whole occurrences do, whatever the span.
    assert found(5, REPEATS * 5, 1) and not found(5, REPEATS * 5 - 1, 1)
    assert found(5, 64, 64) and not found(5, 63, 64)
    # An n-gram longer than asked for.
    assert not found(9, 90, 1)


@pytest.mark.parametrize("tokens", range(8))
def test_short_responses(tokens: int) -> None:
    same = np.zeros(tokens, np.int32)
    assert has_loop(same, 8, 1) == (tokens >= REPEATS)
    assert not has_loop(same, 8, 8) and not has_loop(same, 0, 1)


def test_the_longest_stretch_counts_wherever_it_is() -> None:
    noise = np.arange(100, 130, dtype=np.int32)
    loop = np.zeros(16, np.int32)
    for parts in ((loop, noise), (noise, loop), (noise, loop[:5], noise, loop)):
        assert has_loop(np.concatenate(parts), 4, 16)
        assert not has_loop(np.concatenate(parts), 4, 17)


def test_any_response_against_the_definition() -> None:
    """Every n-gram, every start, counted by hand."""

    def looks_for(ids: list[int], longest: int, span: int) -> bool:
        for n in range(1, longest + 1):
            need = max(REPEATS * n, span)
            for start in range(len(ids) - need + 1):
                if all(ids[i] == ids[i - n] for i in range(start + n, start + need)):
                    return True
        return False

    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(500):
        ids = draw.integers(0, 2, draw.integers(1, 40)).astype(np.int32)
        expected = looks_for(ids.tolist(), 5, 10)
        seen.add(expected)
        assert has_loop(ids, 5, 10) == expected, ids
    assert seen == {True, False}
