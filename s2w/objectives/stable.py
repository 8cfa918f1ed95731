"""Distillation that keeps responses from growing without end.

A teacher scores a repetition as likely once it has begun, so on-policy distillation can drift into long, repetitive
responses that hit the token limit and dominate the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from s2w.config.schema import Nonnegative, Positive
from s2w.data.repetition import has_loop
from s2w.eval.grading import Graded
from s2w.objectives.objective import Objective, TokenBatch, TokenLoss, register
from s2w.records import Scored


@register("stable")
@dataclass(frozen=True)
class StableDistillation(Objective):
    """mean over the tokens of the kept responses of D(p, q) + reference_weight KL(q || q_0), q_0 the student's
    first weights of this phase. Truncated and repetitive responses are left out.

    Stable-OPD's other part, a share of good responses in every batch, is ``loop.off_policy_fraction``: 0.2 is the
    paper's one in five. (The paper takes them from a data set and trains on their NLL; here they are the teacher's
    and are distilled like the others.) The masks are ours: the paper has none, and only measures repetition.
    """

    source = "Stable-OPD, arXiv 2604.08527, eq. 6"
    when = "Response lengths rise from step to step, and so does the truncated share."

    truncated: bool = True
    """Leave out responses that were cut off at the token limit."""
    loop_ngram: Positive = 64
    """Leave out responses that repeat a sequence of up to this many tokens four or more times in a row ..."""
    loop_tokens: Positive = 128
    """... over at least this many tokens."""
    reference_weight: Nonnegative = 0.0
    """Weight of the KL to the first weights; above 0, a further engine runs them (``reference`` in the settings)."""

    @property
    def needs_reference(self) -> bool:
        return self.reference_weight > 0

    def credit(self, samples: Sequence[Scored], graded: Sequence[Graded]) -> list[Scored]:
        return [replace(sample, weight=float(self.keeps(sample))) for sample in samples]

    def keeps(self, sample: Scored) -> bool:
        """Whether a sample is trained on."""
        rollout = sample.rollout
        if self.truncated and rollout.finish_reason != "stop":
            return False
        return not has_loop(rollout.token_ids, self.loop_ngram, self.loop_tokens)

    def loss(self, batch: TokenBatch) -> TokenLoss:
        if batch.reference is None:
            return TokenLoss(batch.teacher, batch.weights)
        return TokenLoss(
            batch.teacher,
            batch.weights,
            reference=batch.reference,
            reference_weights=batch.weights * self.reference_weight,
        )
