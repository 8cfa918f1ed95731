"""How far the teacher can be trusted: weights of prompts by the share of its own answers that were right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from s2w.records import Prompt, Scored

PromptKey = tuple[tuple[tuple[str, str], ...], str]
"""Messages and mode: a prompt of the off-policy set may have another uid."""


class Reliability:
    """Down-weights samples of prompts that the teacher itself gets wrong (``loop.unreliable_weight``).

    Args:
        shares: share of the teacher's own answers that were right, by prompt; see :func:`reliability`.
        unreliable_weight: weight where that share is 0.
    """

    def __init__(self, shares: Mapping[PromptKey, float], unreliable_weight: float) -> None:
        self.shares, self.unreliable_weight = shares, unreliable_weight

    def apply(self, samples: Sequence[Scored]) -> list[Scored]:
        """The samples with their weights times :meth:`weight`."""
        return [replace(sample, weight=sample.weight * self.weight(sample.rollout.prompt)) for sample in samples]

    def weight(self, prompt: Prompt) -> float:
        """u + (1 - u) r, with u the lowest weight and r the prompt's share; 1 for an unknown prompt."""
        return self.unreliable_weight + (1 - self.unreliable_weight) * self.shares.get(prompt_key(prompt), 1.0)


def reliability(right: Iterable[Prompt], wrong: Iterable[Prompt]) -> dict[PromptKey, float]:
    """Share of the teacher's verified answers to each prompt that were right, from the prompt of each answer."""
    good, bad = (Counter(map(prompt_key, prompts)) for prompts in (right, wrong))
    return {key: good[key] / (good[key] + bad[key]) for key in good | bad}


def prompt_key(prompt: Prompt) -> PromptKey:
    """What two uses of a prompt have in common."""
    return tuple((message["role"], message["content"]) for message in prompt.messages), prompt.mode
