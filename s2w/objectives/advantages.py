"""Advantages of verified rewards, relative to the other responses to the same prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from s2w.config.schema import RewardConfig
from s2w.eval.grading import Graded
from s2w.objectives.kernel import PolicyRows
from s2w.objectives.objective import TokenBatch
from s2w.records import Scored

EQUAL = 1e-6
"""Standard deviation of rewards below which they count as equal."""


def with_advantages(samples: Sequence[Scored], graded: Sequence[Graded], *, normalize: bool) -> list[Scored]:
    """The samples with the advantages of their rewards, which are 1 for a right answer, else 0.

    The teacher's responses take no part: the student did not sample them.
    """
    advantages = np.zeros(len(samples))
    own = [i for i, sample in enumerate(samples) if sample.rollout.versions]
    prompts = [samples[i].rollout.prompt for i in own]
    advantages[own] = group_advantages(
        [float(bool(graded[i].correct)) for i in own],
        # The same prompt in another mode, or a second time in a batch (another epoch), is another group.
        [(prompt.uid, prompt.mode, prompt.seed) for prompt in prompts],
        normalize=normalize,
    )
    return [replace(sample, advantage=float(a)) for sample, a in zip(samples, advantages, strict=True)]


def group_advantages(rewards: Sequence[float], groups: Sequence[object], *, normalize: bool) -> np.ndarray:
    """Advantages relative to the group: (r - mean) / std (GRPO, arXiv 2402.03300, section 4.1.2), or r - mean.

    Args:
        rewards: [n].
        groups: [n], equal for responses to the same prompt.
        normalize: divide by the standard deviation (of the population). A group whose rewards are equal gets 0.

    Returns:
        float64 [n].
    """
    members: defaultdict[object, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    values = np.asarray(rewards, np.float64)
    advantages = np.zeros(len(values))
    for own in members.values():
        deviation = values[own].std()
        if deviation > EQUAL:
            advantages[own] = (values[own] - values[own].mean()) / (deviation if normalize else 1.0)
    return advantages


def policy_rows(batch: TokenBatch, reward: RewardConfig, weight: float) -> PolicyRows:
    """The clipped policy gradient of the batch's advantages, times ``weight``."""
    return PolicyRows(
        batch.ids,
        batch.advantages(),
        batch.log_probs,
        torch.full_like(batch.log_probs, weight * batch.token_weight),
        (reward.clip_low, reward.clip_high),
    )
