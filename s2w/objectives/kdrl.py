"""KDRL: distillation and reinforcement learning from verified rewards in one loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from s2w.config.schema import Config, RewardConfig
from s2w.errors import ConfigError
from s2w.eval.grading import Graded
from s2w.objectives.advantages import policy_rows, with_advantages
from s2w.objectives.objective import Objective, TokenBatch, TokenLoss, register
from s2w.records import Scored


@register("kdrl")
@dataclass(frozen=True)
class KDRL(Objective):
    """The divergence plus ``reward.weight`` times the loss of grpo, in one kernel at the same logits.

    KDRL estimates the reverse KL by the squared log-ratio of the sampled token; here it is ``loss.divergence``, exact
    with signal hidden. Prompts without a verifier have no reward, and are only distilled.
    """

    source = "KDRL, arXiv 2506.02208, eq. 8"
    when = "The student should surpass its teacher on prompts whose answers can be verified."
    reward_needed: ClassVar[Literal["unused", "used", "required"]] = "used"
    groups: ClassVar[bool] = True
    own_samples_only: ClassVar[bool] = True

    reward: RewardConfig = field(default_factory=RewardConfig)

    def check(self, config: Config) -> None:
        if self.reward.weight == 0:
            raise ConfigError("loss.objective=kdrl with reward.weight=0 is distillation alone: write a weight above 0")

    def credit(self, samples: Sequence[Scored], graded: Sequence[Graded]) -> list[Scored]:
        return with_advantages(samples, graded, normalize=self.reward.normalize)

    def loss(self, batch: TokenBatch) -> TokenLoss:
        return TokenLoss(batch.teacher, batch.weights, policy_rows(batch, self.reward, self.reward.weight))
