"""Learning rate as a function of the step number: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from s2w.config.schema import LearnerConfig


def learning_rate(config: LearnerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (the first is 0) of ``total_steps``.

    Linear warm-up reaches ``learning_rate`` on step ``warmup_steps`` - 1. Then it is constant, or falls along half a
    cosine (Loshchilov and Hutter 2017, eq. 5) to ``min_lr_ratio`` of the peak on the last step and stays there.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    decay_steps = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    ratio = config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * ratio
