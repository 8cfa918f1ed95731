"""pass@k, means and shares, and their uncertainty."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
"""Bootstrap resamples: the ends of an interval then move by about 1 % of its width from seed to seed."""


Z_95 = 1.959963984540054
"""0.975 quantile of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, such as one over problems, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` responses to a problem is right.

    ``1 - C(n - c, k) / C(n, k)`` as a product, Chen et al. 2021 (arXiv 2107.03374), equation 1: of all sets of k
    among the n samples, the share that contains one of the c right ones.

    Args:
        samples: n, responses to the problem.
        correct: c, how many of them are right.

    Raises:
        ValueError: ``k`` is not in 1 to n, or ``correct`` not in 0 to n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples of a problem and k of at least 1, not {samples}")
    if not 0 <= correct <= samples:
        raise ValueError(f"{correct} of {samples} samples cannot be correct")
    if samples - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def bootstrap(values: Sequence[float], seed: int) -> Estimate:
    """The mean and its 95 % percentile bootstrap interval, problems drawn with replacement (Efron 1979).

    The problems are taken as a sample of those that could have been asked; the interval says nothing about problems
    of another kind. It has no width where all values are the same.

    Args:
        values: one for each problem, such as its pass@k.
        seed: the same values and seed give the same interval.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("there are no problems to average over")
    array = np.asarray(values, dtype=np.float64)
    means = np.concatenate([array[drawn].mean(1) for drawn in _draws(len(array), seed)])
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(array.mean()), float(low), float(high))


def wilson(successes: int, trials: int) -> Estimate:
    """A share and its 95 % score interval (Wilson 1927), which has a width at 0 and 1 too.

    Raises:
        ValueError: no trials, or ``successes`` not in 0 to ``trials``.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials} trials is not a valid share")
    share, weight = successes / trials, Z_95**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def paired_change(before: Sequence[bool], after: Sequence[bool]) -> Estimate:
    """Share of successes after minus before, on the same problems, and its 95 % interval.

    Newcombe's score interval for paired shares (1998, Statistics in Medicine 17, 2635, method 10), which has a width
    where no outcome changed too; it is extended to 0 where the exact test of McNemar does not tell the two apart
    (p >= 0.05), as with fewer than six changed outcomes.

    Args:
        before, after: outcomes of the same problems, in order.

    Raises:
        ValueError: no problems, or not as many after as before.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} outcomes before and {len(after)} after cannot be paired")
    count = len(before)
    pairs = Counter(zip(map(bool, before), map(bool, after), strict=True))
    both, neither = pairs[True, True], pairs[False, False]
    lost, gained = pairs[True, False], pairs[False, True]
    first, second = wilson(both + lost, count), wilson(both + gained, count)
    marginals = (both + lost) * (neither + gained) * (both + gained) * (neither + lost)
    product = both * neither - lost * gained
    corrected = max(product - count / 2, 0.0) if product > 0 else product
    correlation = corrected / math.sqrt(marginals) if marginals else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

    change = (gained - lost) / count
    low = change - reach(second.value - second.low, first.high - first.value)
    high = change + reach(second.high - second.value, first.value - first.low)
    if _mcnemar(lost, gained) >= 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return Estimate(change, low, high)


def _mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value that a changed outcome is as often lost as gained."""
    changed = lost + gained
    tail = sum(math.comb(changed, i) for i in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**changed)


def gap_closed(before: Sequence[float], after: Sequence[float], best: Sequence[float], seed: int) -> Estimate:
    """Share of the way from ``before`` to ``best`` that ``after`` has gone, and its 95 % percentile bootstrap interval.

    Args:
        before, after, best: values of the same problems, in order; their means differ between before and best.
        seed: the same values and seed give the same interval.

    Raises:
        ValueError: no problems, or before and best have the same mean.
    """
    start, way, whole = (np.asarray(values, np.float64) for values in (before, after, best))
    done, gap = way - start, whole - start
    if not gap.sum():
        raise ValueError("there is no gap to close")
    # A resample may have no gap: its share is infinite, or nothing where nothing was done either.
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.concatenate([done[drawn].mean(1) / gap[drawn].mean(1) for drawn in _draws(len(gap), seed)])
    low, high = np.nanquantile(shares, (0.025, 0.975), method="inverted_cdf")
    return Estimate(float(done.sum() / gap.sum()), float(low), float(high))


def bootstrap_token_mean(values: Sequence[float], tokens: Sequence[int], seed: int) -> Estimate:
    """The mean over all tokens of some responses and its 95 % percentile bootstrap interval.

    Responses are drawn with replacement, not tokens: those of one response are not independent.

    Args:
        values: mean over the tokens of each response.
        tokens: how many it has.
        seed: the same values and seed give the same interval.

    Raises:
        ValueError: no responses.
    """
    return _token_mean_interval([(values, tokens)], seed)


def bootstrap_token_mean_change(
    before: tuple[Sequence[float], Sequence[int]], after: tuple[Sequence[float], Sequence[int]], seed: int
) -> Estimate:
    """Token mean of ``after`` minus that of ``before``, with its 95 % interval; prompts are drawn with replacement.

    Args:
        before, after: as ``values, tokens`` of :func:`bootstrap_token_mean`, both for the same prompts in order.

    Raises:
        ValueError: no responses, or not as many after as before.
    """
    if len(before[0]) != len(after[0]):
        raise ValueError(f"{len(before[0])} responses before and {len(after[0])} after cannot be paired")
    return _token_mean_interval([after, before], seed)


def _token_mean_interval(moments: Sequence[tuple[Sequence[float], Sequence[int]]], seed: int) -> Estimate:
    """Estimate of the first token mean, minus the second where there is one."""
    if not len(moments[0][0]):
        raise ValueError("there are no responses to average over")
    weights = [np.asarray(tokens, np.float64) for _, tokens in moments]
    sums = [np.asarray(values, np.float64) * weight for (values, _), weight in zip(moments, weights, strict=True)]

    def mean(drawn: np.ndarray) -> np.ndarray:
        first, *others = [
            total[drawn].sum(-1) / weight[drawn].sum(-1) for total, weight in zip(sums, weights, strict=True)
        ]
        return first - others[0] if others else first

    size = len(sums[0])
    low, high = np.quantile(np.concatenate([mean(drawn) for drawn in _draws(size, seed)]), (0.025, 0.975))
    return Estimate(float(mean(np.arange(size))), float(low), float(high))


def _draws(size: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap resamples of ``size`` things, as indices [resamples, size] in parts that fit in memory."""
    draw = np.random.default_rng(seed)
    # In one piece they take 800 MB for 10,000 things.
    part = max(1, 1_000_000 // size)
    for start in range(0, RESAMPLES, part):
        yield draw.integers(0, size, (min(part, RESAMPLES - start), size))
