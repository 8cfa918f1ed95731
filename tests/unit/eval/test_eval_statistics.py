"""pass@k against enumeration, bootstrap intervals against a known case."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from s2w.eval.statistics import (
    bootstrap,
    bootstrap_token_mean,
    bootstrap_token_mean_change,
    gap_closed,
    paired_change,
    pass_at_k,
    wilson,
)


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


@pytest.mark.parametrize(("successes", "trials"), [(0, 12), (3, 10), (20, 20), (155, 400)])
def test_wilson_ends_are_where_the_score_test_turns(successes: int, trials: int) -> None:
    """The interval holds the shares that the score test does not reject, found by trying them all."""
    estimate = wilson(successes, trials)
    tried = np.linspace(0, 1, 200_001)[1:-1]
    z = (successes / trials - tried) / np.sqrt(tried * (1 - tried) / trials)
    kept = tried[np.abs(z) <= 1.959964]
    assert estimate.value == successes / trials
    assert (estimate.low, estimate.high) == pytest.approx((kept.min(), kept.max()), abs=1e-5)


def test_impossible_shares_are_refused() -> None:
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="is not a valid share"):
            wilson(successes, trials)


def responses(seed: int, mean: float) -> tuple[list[float], list[int]]:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(10, 60, 400)
    return (mean + draw.normal(0, 0.5, 400)).tolist(), tokens.tolist()


def test_token_means_have_the_interval_of_a_ratio_estimate() -> None:
    values, tokens = responses(0, 2.0)
    estimate = bootstrap_token_mean(values, tokens, seed=1)
    mean = sum(v * n for v, n in zip(values, tokens, strict=True)) / sum(tokens)
    assert estimate.value == pytest.approx(mean, rel=1e-12)
    # Linearised variance of a ratio of sums (Cochran 1977, section 2.11).
    residuals = np.asarray(tokens) * (np.asarray(values) - mean)
    half = 1.96 * np.sqrt((residuals**2).sum()) / sum(tokens)
    assert (estimate.low, estimate.high) == pytest.approx((mean - half, mean + half), abs=0.08 * half)


def test_a_change_is_judged_in_pairs() -> None:
    values, tokens = responses(0, 2.0)
    before, after = (values, tokens), ([value - 0.01 for value in values], tokens)
    change = bootstrap_token_mean_change(before, after, seed=0)
    # The same response is 0.01 lower each time: the prompts' own spread cancels.
    assert (change.value, change.low, change.high) == pytest.approx((-0.01, -0.01, -0.01), abs=1e-9)
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap_token_mean_change(before, ([1.0], [1]), seed=0)
    with pytest.raises(ValueError, match="no responses"):
        bootstrap_token_mean([], [], seed=0)


def outcomes(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    pairs = [(True, True)] * both + [(True, False)] * lost + [(False, True)] * gained + [(False, False)] * neither
    before, after = zip(*pairs, strict=True)
    return list(before), list(after)


def test_few_problems_tell_little() -> None:
    """Four of four gained has p = 2 / 2^4; without any change the interval is that of an unseen change."""
    all_gained = paired_change(*outcomes(0, 0, 4, 0))
    assert (all_gained.value, all_gained.low) == (1.0, 0.0) and all_gained.high >= 1.0
    assert paired_change(*outcomes(0, 0, 6, 0)).low > 0
    for size, most in ((4, 0.5), (64, 0.06), (1000, 0.004)):
        unchanged = paired_change(*outcomes(0, 0, 0, size))
        assert unchanged.value == 0 and unchanged.high == -unchanged.low == pytest.approx(wilson(0, size).high)
        assert unchanged.high < most


def test_a_paired_change_turned_around_is_its_negative() -> None:
    one, other = paired_change(*outcomes(20, 3, 14, 27)), paired_change(*outcomes(20, 14, 3, 27))
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.value == pytest.approx(11 / 64) and 0 < one.low < one.value < one.high < 0.31


def test_paired_intervals_cover_the_change() -> None:
    draw = np.random.default_rng(0)
    chances = np.array([0.3, 0.05, 0.2, 0.45])
    covered = 0
    for counts in draw.multinomial(64, chances, 1000):
        interval = paired_change(*outcomes(*counts.tolist()))
        covered += interval.low <= chances[2] - chances[1] <= interval.high
    assert 0.93 < covered / 1000 < 0.99


def test_how_much_of_a_gap_was_closed() -> None:
    before, best = [0.0] * 40, [1.0] * 40
    closed = gap_closed(before, [1.0] * 30 + [0.0] * 10, best, 0)
    # As many ways to draw as for a share: the normal interval of 30 in 40 is 0.616 to 0.884.
    assert closed.value == 0.75 and (closed.low, closed.high) == pytest.approx((0.616, 0.884), abs=0.03)
    assert gap_closed(before, before, best, 0).high == 0.0
    # With one prompt that parts the teacher from the student some resamples have no gap.
    assert gap_closed([0.0] * 4, [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], 0).value == 1.0
    with pytest.raises(ValueError, match="no gap"):
        gap_closed(before, best, before, 0)
