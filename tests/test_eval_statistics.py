"""pass@k against enumeration, bootstrap intervals against a known case."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from s2w.eval.statistics import bootstrap, pass_at_k


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_sets_that_hold_a_right_answer(samples: int) -> None:
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            sets = list(combinations(range(samples), k))
            share = sum(any(i < correct for i in chosen) for chosen in sets) / len(sets)
            # Float64 on both sides: products of up to seven factors.
            assert pass_at_k(samples, correct, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    # Python's integers are exact: C(1000, 500) has 300 digits.
    expected = 1 - comb(900, 500) / comb(1000, 500)
    assert pass_at_k(1000, 100, 500) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_impossible_counts_are_refused(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=str(samples)):
        pass_at_k(samples, correct, k)


def test_intervals_are_those_of_the_normal_law_for_many_problems() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 2_000)
    estimate = bootstrap(values.tolist(), seed=1)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    # 10,000 resamples place each end to about 2 % of the half width.
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    trials, covered = 300, 0
    for trial in range(trials):
        estimate = bootstrap((draw.binomial(8, 0.3, 40) / 8).tolist(), seed=trial)
        covered += estimate.low <= 0.3 <= estimate.high
    # 95 % asked for; 40 problems cost a percentile interval about one point, 300 trials know it to 1.3 points.
    assert 0.905 <= covered / trials <= 0.985


def test_the_seed_repeats_an_interval() -> None:
    values = [0.0, 1.0, 0.5, 0.25, 1.0]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap([1.0, 1.0], seed=0) == bootstrap([1.0, 1.0], seed=1)
    with pytest.raises(ValueError, match="no problems"):
        bootstrap([], seed=0)
