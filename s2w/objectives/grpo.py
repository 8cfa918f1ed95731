"""GRPO: reinforcement learning from verified rewards, the baseline that distillation is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from s2w.config.schema import RewardConfig
from s2w.eval.grading import Graded
from s2w.objectives.advantages import policy_rows, with_advantages
from s2w.objectives.objective import Objective, TokenBatch, TokenLoss, register
from s2w.records import Scored, SignalKind


@register("grpo")
@dataclass(frozen=True)
class GRPO(Objective):
    """mean over tokens of -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = q / q_sampling and A the
    verified reward of the response, minus its group's mean, over the group's standard deviation (section ``reward``).

    Without a reference model; every token of a step has the same weight. The teacher scores the held-out evaluation.
    """

    source = "GRPO, arXiv 2402.03300, eq. 3, outcome supervision"
    when = "As the baseline; or where there is a verifier and no teacher that is better than the student."
    signals: ClassVar[tuple[SignalKind, ...]] = ()
    reward_needed: ClassVar[Literal["unused", "used", "required"]] = "required"
    groups: ClassVar[bool] = True
    own_samples_only: ClassVar[bool] = True

    reward: RewardConfig = field(default_factory=RewardConfig)

    def credit(self, samples: Sequence[Scored], graded: Sequence[Graded]) -> list[Scored]:
        return with_advantages(samples, graded, normalize=self.reward.normalize)

    def loss(self, batch: TokenBatch) -> TokenLoss:
        return TokenLoss(policy=policy_rows(batch, self.reward, 1.0))
