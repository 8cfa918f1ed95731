"""Properties of the micro-batch plan over random lengths."""

from __future__ import annotations

import random

import pytest

from s2w.learner.batching import padded_tokens, plan_micro_batches

CASES = [
    (seed, samples, budget, ranks)
    for seed, (samples, budget, ranks) in enumerate(
        [(1, 10, 1), (1, 10, 4), (2, 4096, 3), (7, 100, 2), (64, 512, 2), (65, 512, 4), (200, 2048, 8), (33, 1, 4)]
    )
]


def draw(seed: int, samples: int) -> list[int]:
    generator = random.Random(seed)
    return [min(1000, int(generator.lognormvariate(4, 1)) + 1) for _ in range(samples)]


@pytest.mark.parametrize(("seed", "samples", "budget", "ranks"), CASES)
def test_each_sample_once_within_budget_and_equal_counts(seed: int, samples: int, budget: int, ranks: int) -> None:
    lengths = draw(seed, samples)
    plan = plan_micro_batches(lengths, budget, ranks)
    batches = [batch for rank in plan for batch in rank]

    assert sorted(i for batch in batches if batch.weighted for i in batch.samples) == list(range(samples))
    assert len({len(rank) for rank in plan}) == 1
    for batch in batches:
        assert len(batch.samples) == 1 or padded_tokens(lengths, batch) <= budget
    # Copies only where there are fewer samples than places.
    copies = [batch for batch in batches if not batch.weighted]
    assert len(copies) < ranks
    assert not copies or all(len(batch.samples) == 1 for batch in batches)
    assert plan == plan_micro_batches(lengths, budget, ranks)


@pytest.mark.parametrize("seed", range(5))
def test_balance(seed: int) -> None:
    """Ranks differ by less than their largest micro-batch; the k-th micro-batches shrink with k."""
    lengths = draw(seed, 128)
    plan = plan_micro_batches(lengths, 2048, 4)
    sizes = [[padded_tokens(lengths, batch) for batch in rank] for rank in plan]
    loads = [sum(rank) for rank in sizes]
    assert max(loads) - min(loads) <= max(max(rank) for rank in sizes)
    for earlier, later in zip(zip(*sizes, strict=True), list(zip(*sizes, strict=True))[1:], strict=False):
        assert min(earlier) >= max(later)


def test_equal_lengths_are_cut_evenly() -> None:
    """10 samples of 100 with room for 9: two micro-batches of 5, not 9 and 1."""
    (rank,) = plan_micro_batches([100] * 10, 900, 1)
    assert [len(batch.samples) for batch in rank] == [5, 5]


def test_largest_is_split_to_fill_the_ranks() -> None:
    plan = plan_micro_batches([10, 10, 10], 30, 2)
    assert [[len(batch.samples) for batch in rank] for rank in plan] == [[2], [1]]


@pytest.mark.parametrize(("lengths", "budget", "ranks"), [([], 1, 1), ([0], 1, 1), ([1], 0, 1), ([1], 1, 0)])
def test_refuses_nonsense(lengths: list[int], budget: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        plan_micro_batches(lengths, budget, ranks)
