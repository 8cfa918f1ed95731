"""Distillation that trusts the teacher less the further the response has left it.

A teacher scores prefixes that the student sampled. The less likely it finds them itself, the less its next token is
worth: early tokens count for more than late ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from s2w.config.schema import AboveZero, Config, Nonnegative, Positive, Share
from s2w.errors import ConfigError
from s2w.objectives.objective import TRAINED, Objective, TokenBatch, TokenLoss, register

EPSILON = 1e-8


@register("prefix")
@dataclass(frozen=True)
class PrefixDistillation(Objective):
    """mean over tokens of g_t D(p, q) up to the point where the teacher and the student have parted:
    g_t = 1 + gamma (1 - sum_(k<t) |A_k| / sum_k |A_k|), A_k = log p(y_k) - log q_sampling(y_k).

    The weights g_t, held constant in the gradient, are IW-OPD's: up to 1 + gamma at the start of a response, 1 at its
    end, not rescaled to a mean of 1. ``part_nats`` and ``length_quantile`` are ours, after two papers that train on
    prefixes: arXiv 2605.13643 (what follows a change point of the teacher's margin is left out) and arXiv 2602.15260
    (sampling stops at a length that grows by schedule). Here they part where the teacher finds the response so far
    exp(-part_nats) times as likely as the student did, and responses may be as long as it takes until then.
    """

    source = "IW-OPD, arXiv 2606.22600; prefixes: arXiv 2605.13643, arXiv 2602.15260"
    when = "Long responses that drift from what the teacher would generate; rollouts dominate the step time."
    own_samples_only: ClassVar[bool] = True
    teacher_log_probs: ClassVar[bool] = True

    gamma: Nonnegative = 0.5
    """Extra weight of a response's first token; the paper's value."""
    part_nats: AboveZero | None = None
    """Tokens are left out once sum_k (log q_sampling(y_k) - log p(y_k)) over those before them exceeds this many nats;
    null trains on all."""
    length_quantile: Share | None = None
    """With part_nats: limits the next responses to 1.5 times this quantile of the tokens that the step's responses had
    before they parted; null keeps rollout.max_tokens."""
    shortest: Positive = 64
    """The lowest limit that length_quantile sets."""

    def check(self, config: Config) -> None:
        if self.length_quantile is not None and self.part_nats is None:
            raise ConfigError(
                f"loss.options.length_quantile={self.length_quantile} follows the point where teacher and student "
                "part: write loss.options.part_nats too"
            )

    def loss(self, batch: TokenBatch) -> TokenLoss:
        assert batch.teacher_log_probs is not None
        advantages = batch.teacher_log_probs - batch.log_probs
        factors = torch.cat([self.weights(advantages[response]) for response in batch.responses()])
        return TokenLoss(batch.teacher, batch.weights * factors, metrics={TRAINED.name: (factors > 0).float()})

    def weights(self, advantages: Tensor) -> Tensor:
        """g_t of one response's tokens, [n], 0 from where it has parted, from log p - log q_sampling [n]."""
        distance = advantages.abs()
        before = distance.cumsum(0) - distance
        share = (before / (distance.sum() + EPSILON)).clamp(0, 1)
        weights = 1 + self.gamma * (1 - share)
        if self.part_nats is None:
            return weights
        together = advantages - advantages.cumsum(0) <= self.part_nats  # sum_(k<t) (log q - log p)
        # Once parted, a response does not come back.
        return weights * together.int().cumprod(0)

    def next_length_limit(self, trained_tokens: Sequence[float], longest: int) -> int:
        if self.length_quantile is None:
            return longest
        parted = float(np.quantile(trained_tokens, self.length_quantile))
        return min(longest, max(self.shortest, int(np.ceil(1.5 * parted))))
