"""What a phase minimises: one file per objective, one class per divergence. Importing the package registers all."""

from s2w.objectives import cross_entropy, distillation, divergences, grpo, kdrl, negative, prefix, stable
from s2w.objectives.objective import OBJECTIVES, Objective, TokenBatch, TokenLoss, help_text, objective_class

__all__ = [
    "OBJECTIVES",
    "Objective",
    "TokenBatch",
    "TokenLoss",
    "cross_entropy",
    "distillation",
    "divergences",
    "grpo",
    "help_text",
    "kdrl",
    "negative",
    "objective_class",
    "prefix",
    "stable",
]
