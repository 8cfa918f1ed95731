"""An ablation that a good method must beat: no teacher, no reward, only away from the student's least likely tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Interval

from s2w.config.schema import AboveZero, RewardConfig
from s2w.eval.grading import Graded
from s2w.objectives.advantages import policy_rows
from s2w.objectives.objective import Objective, TokenBatch, TokenLoss, register
from s2w.records import Scored, SignalKind


@register("negative")
@dataclass(frozen=True)
class FixedNegative(Objective):
    """mean over S of advantage log q(y), S the share of a batch's tokens that were least likely when sampled.

    On-policy distillation without a teacher: most of its advantages are near zero, and what it lowers are tokens that
    the student itself found unlikely. What distillation gains over this is what the teacher adds.
    """

    source = "OPSA's ablation, arXiv 2608.31046"
    when = "Never to train: as the control that tells what the teacher adds."
    signals: ClassVar[tuple[SignalKind, ...]] = ()
    own_samples_only: ClassVar[bool] = True

    share: Annotated[float, Interval(gt=0, le=1)] = 0.2
    """Share of a batch's sampled tokens that count."""
    advantage: AboveZero = 0.5
    """Minus the advantage of each of them."""

    def credit(self, samples: Sequence[Scored], graded: Sequence[Graded]) -> list[Scored]:
        """The advantages of S make up for the tokens that are not in it: the loss is a mean over all."""
        log_probs = np.concatenate([sample.rollout.log_probs[sample.rollout.sampled_rows] for sample in samples])
        count = max(1, int(self.share * len(log_probs)))
        limit = np.partition(log_probs, count - 1)[count - 1]
        chosen = int((log_probs <= limit).sum())
        height = np.float32(-self.advantage * len(log_probs) / chosen)
        return [
            replace(sample, token_advantages=np.where(sample.rollout.log_probs <= limit, height, np.float32(0)))
            for sample in samples
        ]

    def loss(self, batch: TokenBatch) -> TokenLoss:
        return TokenLoss(policy=policy_rows(batch, RewardConfig(), 1.0))
