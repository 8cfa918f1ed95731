"""Supervised fine-tuning on the teacher's responses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from s2w.config.schema import LossConfig
from s2w.objectives.kernel import SparseRows
from s2w.objectives.objective import Objective, Phase, TokenBatch, TokenLoss, register
from s2w.records import SignalKind


@register("cross_entropy")
@dataclass(frozen=True)
class CrossEntropy(Objective):
    """mean over tokens of -log q(y), y the response's token.

    It is the forward KL to a teacher that is certain of the token, so the same kernel computes it.
    """

    source = "supervised fine-tuning; sequence-level distillation, arXiv 1606.07947, section 3.2"
    when = "Off-policy, before the on-policy phase: the cheapest start, since no teacher scores anything."
    phases: ClassVar[tuple[Phase, ...]] = ("off_policy",)
    signals: ClassVar[tuple[SignalKind, ...]] = ()

    def loss_settings(self, loss: LossConfig) -> LossConfig:
        return replace(loss, divergence="forward_kl", temperature=1.0)

    def loss(self, batch: TokenBatch) -> TokenLoss:
        return TokenLoss(SparseRows.certain(batch.ids), batch.weights)
