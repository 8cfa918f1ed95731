"""pass@k and its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
"""Bootstrap resamples: the ends of an interval then move by about 1 % of its width from seed to seed."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` responses to a problem is right.

    ``1 - C(n - c, k) / C(n, k)`` as a product, Chen et al. 2021 (arXiv 2107.03374), equation 1: of all sets of k
    among the n samples, the share that holds one of the c right ones.

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

    The problems are taken for a sample of those that could have been asked; the interval says nothing about problems
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
    draw = np.random.default_rng(seed)
    # [resamples, problems] in parts: at once it is 800 MB for 10,000 problems.
    part = max(1, 1_000_000 // len(array))
    sizes = [min(part, RESAMPLES - start) for start in range(0, RESAMPLES, part)]
    means = np.concatenate([array[draw.integers(0, len(array), (size, len(array)))].mean(1) for size in sizes])
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(array.mean()), float(low), float(high))
