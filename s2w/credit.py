"""What each response counts for: the advantage of its verified reward, and how far its teacher can be trusted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from s2w.config import RewardConfig
from s2w.eval.grading import Graded
from s2w.off_policy.response import Response
from s2w.records import Prompt, Scored

EQUAL = 1e-6
"""Standard deviation of rewards below which they are all the same."""
PromptKey = tuple[tuple[tuple[str, str], ...], str]
"""Messages and mode: a prompt of the off-policy set may have another uid."""


class Credit:
    """Gives samples their advantage and weight.

    Args:
        reward: how rewards become advantages; None gives none.
        reliability: share of the teacher's own answers that were right, by prompt; see :func:`reliability`.
        unreliable_weight: weight where that share is 0.
    """

    def __init__(
        self, reward: RewardConfig | None, reliability: Mapping[PromptKey, float], unreliable_weight: float
    ) -> None:
        self.reward, self.reliability, self.unreliable_weight = reward, reliability, unreliable_weight

    def assign(self, samples: Sequence[Scored], graded: Sequence[Graded]) -> list[Scored]:
        """The samples with their advantage and weight; ``graded`` belongs to them, in order.

        Responses of the teacher take no part in the advantages: the student did not sample them.
        """
        advantages = np.zeros(len(samples))
        if self.reward is not None:
            own = [i for i, sample in enumerate(samples) if sample.rollout.versions]
            prompts = [samples[i].rollout.prompt for i in own]
            advantages[own] = group_advantages(
                [float(bool(graded[i].correct)) for i in own],
                [(prompt.uid, prompt.mode, prompt.seed) for prompt in prompts],
                normalize=self.reward.normalize,
            )
        return [
            replace(sample, advantage=float(advantage), weight=self.weight(sample.rollout.prompt))
            for sample, advantage in zip(samples, advantages, strict=True)
        ]

    def weight(self, prompt: Prompt) -> float:
        """u + (1 - u) r of ``loop.unreliable_weight``."""
        share = self.reliability.get(prompt_key(prompt), 1.0)
        return self.unreliable_weight + (1 - self.unreliable_weight) * share


def group_advantages(rewards: Sequence[float], groups: Sequence[object], *, normalize: bool) -> np.ndarray:
    """Advantages relative to the group: (r - mean) / std (GRPO, arXiv 2402.03300, section 4.1.2), or r - mean.

    Args:
        rewards: [n].
        groups: [n], equal for responses to the same prompt.
        normalize: divide by the standard deviation (of the population). A group whose rewards are equal has 0.

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


def reliability(right: Sequence[Response], wrong: Sequence[Response]) -> dict[PromptKey, float]:
    """Share of the teacher's verified answers to each prompt that were right."""
    good, bad = (Counter(prompt_key(response.prompt) for response in part) for part in (right, wrong))
    return {key: good[key] / (good[key] + bad[key]) for key in good | bad}


def prompt_key(prompt: Prompt) -> PromptKey:
    """What two uses of a prompt have in common."""
    return tuple((message["role"], message["content"]) for message in prompt.messages), prompt.mode
