"""Which signal of the teacher carries which divergence, and how well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from s2w.learner.divergence import DIVERGENCES

Strength = Literal["exact", "lower bound", "estimate", "not possible"]

KINDS = ("hidden", "topk", "ids", "sampled")


@dataclass(frozen=True)
class Carriage:
    """How well a kind of signal carries a divergence."""

    strength: Strength
    reason: str
    """One sentence, without its full stop."""


_EXACT = Carriage("exact", "hidden rows and the teacher's head give the whole distribution")
_LOWER_BOUND = Carriage(
    "lower bound",
    "tokens outside the ids are one bucket, and merging outcomes never raises an f-divergence",
)
_COARSE = Carriage(
    "estimate",
    "tokens outside the ids are one bucket, and the weights that it puts on its parts may move either way",
)
_SCORE_FUNCTION = Carriage(
    "estimate", "the score function at the token sampled is unbiased for the gradient, not free of noise"
)
_ONE_TOKEN = Carriage(
    "not possible", "one log-prob per position is an expectation under the student, which only reverse_kl is"
)


def carries(kind: str, divergence: str) -> Carriage:
    """How well signal ``kind`` carries ``divergence``.

    Raises:
        ValueError: no such kind or divergence.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown signal {kind!r}: known are {', '.join(KINDS)}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}: known are {', '.join(sorted(DIVERGENCES))}")
    if kind == "hidden":
        return _EXACT
    if kind == "sampled":
        return _SCORE_FUNCTION if divergence == "reverse_kl" else _ONE_TOKEN
    return _LOWER_BOUND if DIVERGENCES[divergence].is_f_divergence else _COARSE


def markdown_table() -> str:
    """The table of the documentation: a row a divergence, a column a kind of signal."""
    lines = ["| divergence | " + " | ".join(KINDS) + " |", "| --- |" + " --- |" * len(KINDS)]
    for name in DIVERGENCES:
        lines.append(f"| {name} | " + " | ".join(carries(kind, name).strength for kind in KINDS) + " |")
    return "\n".join(lines) + "\n"
