"""A held-out evaluation, response by response: all as numbers, the first of each mode in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from s2w.eval.grading import Graded
from s2w.records import HeldoutResponse, HeldoutSample, Rollout

SAMPLES = 8
"""Responses of each mode that are kept in full at each version."""


def heldout_responses(
    version: int, rollouts: Sequence[Rollout], graded: Sequence[Graded], kl_sums: np.ndarray
) -> list[HeldoutResponse]:
    """The numbers of every response.

    Args:
        rollouts: fresh ones of ``version``, one to each held-out prompt.
        graded: the same, in order.
        kl_sums: [rollouts, 2], forward and reverse KL summed over the sampled tokens of each, nats.
    """
    responses = []
    for rollout, grade, (forward, reverse) in zip(rollouts, graded, kl_sums.tolist(), strict=True):
        tokens = len(rollout.sampled_rows)
        responses.append(
            HeldoutResponse(
                version=version,
                uid=grade.uid,
                mode=grade.mode,
                tokens=tokens,
                forward_kl=forward / tokens,
                reverse_kl=reverse / tokens,
                correct=grade.correct,
                adherent=grade.adherent,
                truncated=grade.truncated,
            )
        )
    return responses


def heldout_samples(
    version: int, rollouts: Sequence[Rollout], graded: Sequence[Graded], text: Callable[[Rollout], str]
) -> list[HeldoutSample]:
    """The first :data:`SAMPLES` responses of each mode: those to the same prompts at every version.

    Args:
        rollouts, graded: as in :func:`heldout_responses`.
        text: gives the text of a response, such as :meth:`s2w.eval.grading.Grader.text`.
    """
    samples: list[HeldoutSample] = []
    seen: Counter[str] = Counter()
    for rollout, grade in zip(rollouts, graded, strict=True):
        seen[grade.mode] += 1
        if seen[grade.mode] <= SAMPLES:
            asked = [message["content"] for message in rollout.prompt.messages if message["role"] == "user"]
            samples.append(
                HeldoutSample(
                    version=version,
                    uid=grade.uid,
                    mode=grade.mode,
                    prompt=asked[-1] if asked else "",
                    response=text(rollout),
                    correct=grade.correct,
                    adherent=grade.adherent,
                    finish_reason=rollout.finish_reason,
                )
            )
    return samples
