"""Which kinds of teacher signal support which divergence, and how well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from s2w.objectives.divergences import DIVERGENCES
from s2w.records import SignalKind

Strength = Literal["exact", "lower bound", "estimate", "not possible"]

KINDS: tuple[SignalKind, ...] = get_args(SignalKind)


@dataclass(frozen=True)
class Support:
    """How well a kind of signal supports a divergence."""

    strength: Strength
    reason: str
    """One sentence, without its full stop."""


_EXACT = Support("exact", "hidden states and the teacher's head give the whole distribution")
_LOWER_BOUND = Support(
    "lower bound",
    "tokens outside the ids are one bucket, and merging outcomes never raises an f-divergence",
)
_COARSE = Support(
    "estimate",
    "tokens outside the ids are one bucket, and the weights that it puts on its parts may move either way",
)
_SCORE_FUNCTION = Support(
    "estimate", "the score function at the token sampled is unbiased for the gradient, not free of noise"
)
_ONE_TOKEN = Support(
    "not possible", "one log-prob per position is an expectation under the student, which only reverse_kl is"
)


def signal_support(kind: str, divergence: str) -> Support:
    """How well signals of ``kind`` support ``divergence``.

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
    """The table of the documentation: one row per divergence, one column per kind of signal."""
    lines = ["| divergence | " + " | ".join(KINDS) + " |", "| --- |" + " --- |" * len(KINDS)]
    for name in DIVERGENCES:
        lines.append(f"| {name} | " + " | ".join(signal_support(kind, name).strength for kind in KINDS) + " |")
    return "\n".join(lines) + "\n"
