"""Distillation: the divergence between teacher and student at every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from s2w.objectives.objective import Objective, Phase, TokenBatch, TokenLoss, register


@register("divergence")
@dataclass(frozen=True)
class Distillation(Objective):
    """mean over tokens of D(p, q), ``loss.divergence``.

    Off-policy it is GKD with lambda = 0, with signals hidden or topk: the student has not sampled those tokens.
    """

    source = "Qwen3 Technical Report, arXiv 2505.09388, section 4.5; GKD, arXiv 2306.13649"
    when = "Try this first, when the teacher is good on all prompts."
    phases: ClassVar[tuple[Phase, ...]] = ("on_policy", "off_policy")

    def loss(self, batch: TokenBatch) -> TokenLoss:
        return TokenLoss(batch.teacher, batch.weights)
