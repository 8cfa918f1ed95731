"""Cuts the samples of a step into micro-batches: the same number on every rank, of nearly equal size.

Pure functions of sequence lengths, in tokens. Ranks exchange gradients (and, at ZeRO stage 3, weights) once per
micro-batch, so all must run the same number of them, and the k-th takes as long as its slowest rank does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of one forward and backward pass, as indices into the step's samples, longest first."""

    samples: tuple[int, ...]
    weighted: bool = True
    """False for a copy that only keeps the ranks in step: its rows have weight 0 and are not counted."""


def padded_tokens(lengths: Sequence[int], batch: MicroBatch) -> int:
    """Tokens of the right-padded [samples, longest] array."""
    return len(batch.samples) * max(lengths[i] for i in batch.samples)


def plan_micro_batches(lengths: Sequence[int], budget: int, ranks: int) -> list[list[MicroBatch]]:
    """Distributes samples over ranks; deterministic.

    Samples sorted by length are cut into runs of at most ``budget`` padded tokens; a longer sample is on its own. The
    number of runs is the least that the budget allows, rounded up to a multiple of ``ranks``, and the runs are made
    as even as that number lets them be. Fewer samples than ranks: the shortest is repeated with weight 0.

    Args:
        lengths: tokens of each sample, at least 1.
        budget: most tokens of a micro-batch, padding included.
        ranks: number of ranks.

    Returns:
        For each rank its micro-batches in the order in which to run them, largest first. The k-th of all ranks are
        neighbours by size; every rank has the same number.

    Raises:
        ValueError: no samples, a length below 1, or a budget or number of ranks below 1.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError("micro-batches need at least one sample, each of at least one token")
    if budget < 1 or ranks < 1:
        raise ValueError(f"budget ({budget}) and ranks ({ranks}) must be at least 1")

    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    fewest = len(_cut(lengths, order, budget))
    count = min(-(-fewest // ranks) * ranks, max(len(order), fewest))

    # The smallest budget that needs no more than `count` runs makes them most even: bisection, since the number
    # of runs never rises with the budget.
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_cut(lengths, order, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    batches = [MicroBatch(tuple(run)) for run in _cut(lengths, order, low)]

    while len(batches) % ranks:
        largest = max(
            (batch for batch in batches if len(batch.samples) > 1),
            key=lambda batch: padded_tokens(lengths, batch),
            default=None,
        )
        if largest is None:
            batches.append(MicroBatch((order[-1],), weighted=False))
            continue
        batches.remove(largest)
        half = len(largest.samples) // 2
        batches += [MicroBatch(largest.samples[:half]), MicroBatch(largest.samples[half:])]

    batches.sort(key=lambda batch: (-padded_tokens(lengths, batch), batch.samples, not batch.weighted))
    plan: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for first in range(0, len(batches), ranks):
        lightest = sorted(range(ranks), key=lambda rank: (load[rank], rank))
        for rank, batch in zip(lightest, batches[first : first + ranks], strict=True):
            plan[rank].append(batch)
            load[rank] += padded_tokens(lengths, batch)
    return plan


def _cut(lengths: Sequence[int], order: Sequence[int], budget: int) -> list[list[int]]:
    """Runs of ``order`` (longest first) of at most ``budget`` padded tokens, each as long as it can be."""
    runs: list[list[int]] = []
    for i in order:
        # The first sample of a run is its longest, so it sets the padded length.
        if runs and (len(runs[-1]) + 1) * lengths[runs[-1][0]] <= budget:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs
